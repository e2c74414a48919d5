"""Notices an adapter that is trained by someone whose steps nobody sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor

from adalora.lora.layers.triplets import TripletHandle, fresh


class WeightWatch:
    """Whether something wrote to an adapter's weights since the last `note`."""

    def __init__(self, handles: Sequence[TripletHandle]) -> None:
        self._handles = handles
        self.note()

    @property
    def _live(self) -> list[TripletHandle]:
        return [h for h in self._handles if not h.removed]

    def note(self) -> None:
        """Take the weights as they are for untrained: after attaching, and after others were loaded."""
        self._versions = {h.name: h.P_parameter._version for h in self._live}
        self._fresh = not any(h.sharded for h in self._live) and fresh(self._live)

    @property
    def moved(self) -> bool:
        """A write that leaves a fresh adapter at zero (DDP) does not count."""
        live = self._live
        if any(h.sharded for h in live):  # other parameters than before, so versions tell nothing
            return self._fresh and any(_trained_here(h) for h in live)
        if not any(h.P_parameter._version > self._versions.get(h.name, 0) for h in live):
            return False
        return not (self._fresh and fresh(live))


@torch.no_grad()
def _trained_here(handle: TripletHandle) -> bool:
    """Whether this process holds a part of P·Λ that is not zero; asks no other process."""
    carrier = handle.sharded.get("lambda", handle.sharded.get("P"))
    if not isinstance(carrier, DTensor) or carrier.is_meta:  # Accelerate empties the model before it is sharded
        return False
    return bool(carrier.to_local().any())
