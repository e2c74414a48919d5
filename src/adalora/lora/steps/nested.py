"""Nested training: random truncation keeps the triplets in an order, so that the adapter can be cut afterwards.

DyLoRA's idea (Valipour et al., 2023) on a global order: it draws a rank for each step and trains the first columns of
every module; here a share of the whole budget is drawn, and what the run's scores put last is left out wherever it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from adalora.errors import AttachError
from adalora.lora.layers.forward import DROPPED
from adalora.lora.layers.triplets import TripletHandle


def refuse_unfit(handles: Sequence[TripletHandle]) -> None:
    """Only layers that run through our own forward pass can leave triplets out.

    Raises:
        AttachError: A layer is no Linear.
    """
    for h in handles:
        if not (h.adapter in h.layer.lora_A and isinstance(h.layer.lora_A[h.adapter], nn.Linear)):
            raise AttachError(f"nested=True takes Linear layers; {h.name} is another: leave it out of target_modules")


class NestedTruncation:
    """Leaves out the tail of a fixed order of triplets, newly drawn for every optimizer step, in training mode only.

    Args:
        handles: All layers of one adapter, at their final ranks.
        scores: Of the triplets that each layer kept, in order of position; larger is better.
        seed: Of the draws; a step's draw depends on seed and step alone, so a resumed run goes on as it would have.
    """

    def __init__(
        self, handles: Sequence[TripletHandle], scores: Sequence[Sequence[float | None]], *, seed: int
    ) -> None:
        self._handles = [h for h in handles if not h.removed]
        self._seed = seed
        kept = [torch.tensor([s or 0.0 for s in part], dtype=torch.float64) for part in scores if part]
        costs = torch.repeat_interleave(
            torch.tensor([float(h.parameters_per_triplet) for h in self._handles], dtype=torch.float64),
            torch.tensor([h.live_rank for h in self._handles]),
        )
        worth = torch.cat(kept) / costs
        order = torch.sort(worth, descending=True, stable=True).indices
        # Share of all parameters up to and with each triplet, in order of position.
        self._share = torch.empty_like(worth)
        self._share[order] = costs[order].cumsum(0) / costs.sum()

    def draw(self, step: int) -> float:
        """Draw what the coming step leaves out.

        Half of the steps train the whole adapter, the others a share of its parameters between 0 and 1.

        Args:
            step: Number of the coming optimizer step.

        Returns:
            The share.
        """
        random = torch.Generator().manual_seed(1_000_003 * self._seed + step)
        whole, share = torch.rand(2, generator=random).tolist()
        share = 1.0 if whole < 0.5 else share
        keep = self._share <= max(share, float(self._share.min())) + 1e-12
        live = torch.cat([h.mask for h in self._handles])
        live[live.clone()] = keep
        ranks = [h.rank for h in self._handles]
        devices = {h.Q_parameter.device for h in self._handles}
        moved = {device: torch.split(live.to(device, non_blocking=True), ranks) for device in devices}  # one copy each
        parts = torch.split(keep, [h.live_rank for h in self._handles])
        for n, (h, part) in enumerate(zip(self._handles, parts)):
            _set(h, None if bool(part.all()) else moved[h.Q_parameter.device][n])
        return share

    def stop(self) -> None:
        """Use all triplets again."""
        for h in self._handles:
            _set(h, None)


def _set(handle: TripletHandle, live: torch.Tensor | None) -> None:
    dropped = handle.layer.__dict__.setdefault(DROPPED, {})
    if live is None:
        dropped.pop(handle.adapter, None)
    else:
        dropped[handle.adapter] = live
