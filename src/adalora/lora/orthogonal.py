"""Keeps triplets orthogonal: the regulariser's decoupled step and the exact hand-over to singular vectors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from adalora.core.initialization import balance
from adalora.core.orthogonality import relative_error, squared_gradient
from adalora.lora.optimizer_state import turn_state
from adalora.lora.triplets import TripletHandle


@torch.no_grad()
def decoupled_step(handles: Sequence[TripletHandle], *, weight: float, learning_rate: float) -> None:
    """Move P and Q towards orthogonality by lr·γ·∇R, apart from the loss, as AdamW does with weight decay.

    R is scale-free: Q's rows are asked for length ρ and right angles, P's columns, which carry the singular values,
    for right angles alone. Layers of one shape go through together.
    """
    _step_group(_by_shape(handles, left=True), weight=weight * learning_rate, left=True)
    _step_group(_by_shape(handles, left=False), weight=weight * learning_rate, left=False)


def _by_shape(handles: Sequence[TripletHandle], *, left: bool) -> list[list[TripletHandle]]:
    groups: dict[tuple[torch.Size, torch.device], list[TripletHandle]] = defaultdict(list)
    for h in handles:
        if h.rank > 1:
            tensor = h.P_or if left else h.Q_ri
            groups[tensor.shape, tensor.device].append(h)
    return list(groups.values())


def _step_group(groups: list[list[TripletHandle]], *, weight: float, left: bool) -> None:
    for group in groups:
        vectors = torch.stack([(h.P_or.T if left else h.Q_ri).float() for h in group])
        if left:
            # Relative to the longest column: the step is the same whatever the adapter's size.
            unit = vectors.square().sum(dim=2).amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
            step = squared_gradient(vectors, squared_norm=None)
        else:
            unit = torch.tensor([h.row_norm**2 for h in group], device=vectors.device)
            step = squared_gradient(vectors / unit.sqrt().view(-1, 1, 1), squared_norm=1.0)
            step, unit = step * unit.sqrt().view(-1, 1, 1), torch.ones_like(unit)
        step = step * (weight / unit).view(-1, 1, 1)
        for h, change in zip(group, step):
            (h.P_or.T if left else h.Q_ri).sub_(change.to(h.P_or.dtype))


@torch.no_grad()
def hand_over(handle: TripletHandle, optimizer: Optimizer | None) -> None:
    """Rewrite P·Q in its singular vectors, exactly, and carry Adam's moments to the new coordinates.

    Gradients transform as ∂L/∂P_new = ∂L/∂P · T⁻ᵀ and ∂L/∂Q_new = Tᵀ · ∂L/∂Q, and so do first moments; second
    moments use the squared entries, which leaves out correlations between triplets.
    """
    P_or, Q_ri = handle.P_or, handle.Q_ri
    if handle.rank == 0 or handle.rank > Q_ri.shape[1] or not bool(P_or.any()):
        return
    if not bool(P_or.isfinite().all() and Q_ri.isfinite().all()):
        return  # training has diverged: there is nothing to preserve, and no SVD
    result = balance(handle.P_or, handle.Q_ri, row_norm=handle.row_norm)
    if optimizer is not None:
        turn_state(optimizer, handle.P_parameter, handle.P_dim, gradient=result.to_Q, weight=result.to_P.T)
        turn_state(optimizer, handle.Q_parameter, handle.Q_dim, gradient=result.to_P.T, weight=result.to_Q)
    handle.P_or.copy_(result.P_or)
    handle.Q_ri.copy_(result.Q_ri)


def orthogonality_error(handles: Sequence[TripletHandle]) -> float:
    """Root mean square cosine between different vectors, over all P and Q; 0 is orthogonal."""
    errors = [
        relative_error(vectors.float().unsqueeze(0))
        for h in handles
        if h.rank > 1
        for vectors in (h.P_or.T[h.mask], h.Q_ri[h.mask])
        if len(vectors) > 1
    ]
    return float(torch.cat(errors).square().mean().sqrt()) if errors else 0.0
