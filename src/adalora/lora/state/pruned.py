"""What pruning takes away, kept outside the model: every pruned triplet as it was when it was last live.

A masked triplet's λ is 0, so its value is copied before the mask is applied. The copies lie on the CPU and train no
more; the run's training does not depend on them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from adalora.lora.layers.triplets import TripletHandle
from adalora.lora.state.checkpoint import write_file

PREFIX = "pruned."
PARTS = ("left", "right", "scale", "score", "step", "number")


class PrunedTriplets:
    """Copies of pruned triplets, by module.

    Each module has, for its n pruned triplets: `left` [d_out, n] and `right` [n, d_in] as an adapter file would hold
    them (`right` of a convolution with groups holds [n, groups · d_in]), `scale` [n] so that ΔW =
    left·diag(scale)·right, `score` [n], `step` [n] at which it was pruned, and `number` [n], its place in the layer, or
    -1 once it was removed from it.

    Args:
        handles: All layers of one adapter.
        path: The file that `write` makes.
    """

    def __init__(self, handles: Sequence[TripletHandle], path: Path) -> None:
        self._handles = handles
        self._kept: dict[str, dict[str, Tensor]] = {}
        self.path = path

    def keep(self, live_before: Sequence[Tensor], scores: Sequence[Tensor], *, step: int) -> None:
        """Copy what the handles' new masks are about to zero; forget what they bring back.

        Args:
            live_before: The masks until now, by layer.
            scores: Of all triplets, by layer.
            step: Now.
        """
        for h, before, score in zip(self._handles, live_before, scores):
            if h.removed:
                continue
            self._forget(h.name, h.mask.nonzero().flatten())
            new = (before & ~h.mask).nonzero().flatten()
            if not len(new):
                continue
            self._forget(h.name, new)
            at = new.to(h.Q_parameter.device)
            P, Q = h.left_or[:, at].cpu(), h.Q_ri[at].cpu()
            # An embedding's weight is transposed: in a file its Q comes first.
            left, right = (Q.T, P.T) if h.is_embedding else (P, Q)
            self._append(
                h.name,
                {
                    "left": left.contiguous(),
                    "right": right.contiguous(),
                    "scale": torch.full((len(new),), h.scale, dtype=torch.float64),
                    "score": score[new].double().cpu(),
                    "step": torch.full((len(new),), step),
                    "number": new,
                },
            )

    def remove(self) -> None:
        """Masked triplets leave the layers for good, and the others get new numbers: none of ours has one any more."""
        for part in self._kept.values():
            part["number"] = torch.full_like(part["number"], -1)

    def _forget(self, name: str, numbers: Tensor) -> None:
        part = self._kept.get(name)
        if part is not None:
            stay = (~torch.isin(part["number"], numbers)).nonzero().flatten()
            self._kept[name] = {key: value.index_select(_dim(key), stay) for key, value in part.items()}

    def _append(self, name: str, new: dict[str, Tensor]) -> None:
        old = self._kept.get(name)
        self._kept[name] = (
            new if old is None else {key: torch.cat([old[key], value], dim=_dim(key)) for key, value in new.items()}
        )

    def state_dict(self) -> dict[str, Tensor]:
        """All copies, by name; a checkpoint holds them."""
        return {
            f"{PREFIX}{name}.{key}": value.contiguous()
            for name, part in self._kept.items()
            for key, value in part.items()
        }

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `state_dict`; other tensors are passed over."""
        self._kept = {}
        for key, value in tensors.items():
            name, _, part = key.removeprefix(PREFIX).rpartition(".")
            if key.startswith(PREFIX) and part in PARTS:
                self._kept.setdefault(name, {})[part] = value.clone()

    def write(self) -> dict[str, Any]:
        """Write the file, atomically.

        Returns:
            Its name, and how many triplets and parameters it holds.
        """
        kept = {name: part for name, part in self._kept.items() if len(part["score"])}
        tensors = {f"{name}.{key}": part[key].contiguous() for name, part in kept.items() for key in PARTS[:-1]}
        kinds = {h.name: _kind(h) for h in self._handles}
        metadata = {"format": "adalora-pruned", "modules": json.dumps({name: kinds[name] for name in kept})}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path, save(tensors, metadata=metadata))
        costs = {h.name: h.parameters_per_triplet for h in self._handles}
        counts = {name: len(part["score"]) for name, part in kept.items()}
        return {
            "file": self.path.name,
            "triplets": sum(counts.values()),
            "parameters": sum(count * costs[name] for name, count in counts.items()),
            "bytes": self.path.stat().st_size,
        }


def _dim(key: str) -> int:
    """Dimension that counts triplets."""
    return 1 if key == "left" else 0


def _kind(handle: TripletHandle) -> dict[str, Any]:
    """How an adapter file has to be read: the module's kind, and a convolution's (in_channels, kernel…) and groups."""
    if handle.is_embedding:
        return {"kind": "embedding"}
    base = handle.layer.get_base_layer()
    kernel = getattr(base, "kernel_size", None)
    if not kernel:
        return {"kind": "linear"}
    return {"kind": "conv", "kernel": [base.in_channels, *kernel], "groups": handle.groups}
