"""How far an adapter has moved its model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from adalora.lora.triplets import TripletHandle


def _is_plain(weight: object) -> TypeGuard[Tensor]:
    """A float tensor that can be read as it is: not quantised, by whatever library, and not offloaded."""
    if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point():
        return False
    return type(weight.data) is Tensor


@torch.no_grad()
def update_ratio(handles: Sequence[TripletHandle]) -> float | None:
    """‖ΔW‖_F / ‖W‖_F of the median layer.

    Layers whose base weight is quantised, offloaded or zero are left out.

    Returns:
        None if no layer is left.
    """
    ratios = []
    for h in handles:
        weight = getattr(h.layer.get_base_layer(), "weight", None)
        if h.rank == 0 or not _is_plain(weight):
            continue
        if type(weight.data) is not torch.Tensor:  # torchao's quantised tensors look like floats
            continue
        wide = torch.promote_types(weight.dtype, torch.float32)
        base = float(torch.linalg.vector_norm(weight.detach(), dtype=wide))
        P, Q = h.left_or.float(), h.Q_ri.float()
        squared = float(((P.T @ P) * (Q @ Q.T)).sum())  # ‖PQ‖² = tr(PᵀP·QQᵀ), without the product
        if base > 0:
            ratios.append(h.scale * max(squared, 0.0) ** 0.5 / base)
    return float(torch.tensor(ratios).median()) if ratios else None
