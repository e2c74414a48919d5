"""How far an adapter has moved its model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from adalora.lora.layers.triplets import TripletHandle


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
    measured = [(h, weight) for h, weight in ((h, _base_weight(h)) for h in handles) if weight is not None]
    bases = _norms([weight for _, weight in measured])
    updates = _update_norms([h for h, _ in measured])
    ratios = [update / base for update, base in zip(updates, bases) if base > 0]
    return float(torch.tensor(ratios).median()) if ratios else None


def _base_weight(handle: TripletHandle) -> Tensor | None:
    weight = getattr(handle.layer.get_base_layer(), "weight", None)
    return weight.detach() if handle.rank > 0 and _is_plain(weight) else None


def _norms(weights: list[Tensor]) -> list[float]:
    """‖W‖_F of each, those of one type in one operation."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for n, weight in enumerate(weights):
        groups[weight.device, weight.dtype].append(n)
    found = [0.0] * len(weights)
    for (_, dtype), numbers in groups.items():
        wide = torch.promote_types(dtype, torch.float32)
        norms = torch.stack(torch._foreach_norm([weights[n] for n in numbers], 2, dtype=wide)).tolist()
        for n, norm in zip(numbers, norms):
            found[n] = norm
    return found


def _update_norms(handles: list[TripletHandle]) -> list[float]:
    """‖s·P·Λ·Q‖_F of each, all groups of a convolution together; layers of one shape together."""
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for n, h in enumerate(handles):
        P, Q = h.P_gor, h.Q_gri
        groups[P.shape, Q.shape, P.device, P.dtype, h.lambda_parameter is None].append(n)
    found = [0.0] * len(handles)
    for numbers in groups.values():
        group = [handles[n] for n in numbers]
        P, Q = torch.stack([h.P_gor for h in group]).float(), torch.stack([h.Q_gri for h in group]).float()
        weights = [h.lambda_gr for h in group]
        if weights[0] is not None:
            P = P * torch.stack([w for w in weights if w is not None]).float().unsqueeze(2)
        squared = ((P.mT @ P) * (Q @ Q.mT)).sum(dim=(1, 2, 3))  # ‖PQ‖² = tr(PᵀP·QQᵀ), without the product
        for n, h, value in zip(numbers, group, squared.tolist()):
            found[n] = h.scale * max(value, 0.0) ** 0.5
    return found
