"""Keeps triplets orthogonal: the regulariser's decoupled step and the exact hand-over to singular vectors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adalora.core.initialization import balance
from adalora.core.orthogonality import least_divisor, relative_error, step_divisor
from adalora.lora.layers.triplets import TripletHandle
from adalora.lora.optimizers.batches import turn_states


@torch.no_grad()
def decoupled_step(handles: Sequence[TripletHandle], *, weight: float, learning_rate: float | Tensor) -> None:
    """Move P and Q towards orthogonality by lr·γ·∇R, apart from the loss, as AdamW does with weight decay.

    R is scale-free: Q's rows are asked for length ρ and right angles, P's columns, which carry the singular values,
    for right angles alone. No step is longer than `core.orthogonality.step_divisor` allows. Layers of one shape go
    through together. A learning rate that lies on a device, as optimizers inside CUDA graphs keep it, stays there.
    """
    least = least_divisor(weight, learning_rate)
    for group in _by_length(handles, left=True):
        _step_left([P for _, P in group], least=least)
    for group in _by_length(handles, left=False):
        _step_right([Q for _, Q in group], [h.row_norm for h, _ in group], least=least)


def _by_length(handles: Sequence[TripletHandle], *, left: bool) -> list[list[tuple[TripletHandle, Tensor]]]:
    """P or Q of every layer, of a convolution those of each group, together with all whose vectors have that length.

    Whatever their ranks: few shapes, also after compaction.
    """
    found: dict[tuple[int, torch.device, torch.dtype], list[tuple[TripletHandle, Tensor]]] = defaultdict(list)
    for h in handles:
        if h.removed:
            continue
        for factor in _factors(h, left=left):
            rows, columns = factor.shape
            length, rank = (rows, columns) if left else (columns, rows)
            if rank > 1:
                found[length, factor.device, factor.dtype].append((h, factor))
    return list(found.values())


def _factors(h: TripletHandle, *, left: bool) -> Sequence[Tensor]:
    """P or Q of a layer, of each group. Every step comes here, so a Linear's parameter is taken itself: no view."""
    if h.groups > 1:
        return (h.P_gor if left else h.Q_gri).unbind()
    parameter = h.P_parameter if left else h.Q_parameter
    if parameter.dim() == 2 and not h.is_embedding and parameter.is_contiguous():
        return (parameter,)
    return (h.P_or if left else h.Q_ri,)


def _stack(factors: list[Tensor]) -> Tensor:
    """Matrices of one height or width as one fp32 tensor, [k, ...], filled up with zeros."""
    shapes = {factor.shape for factor in factors}
    if len(shapes) == 1:
        return torch.stack(factors).float()
    rows, columns = (max(sizes) for sizes in zip(*shapes))
    stack = torch.zeros(len(factors), rows, columns, device=factors[0].device)
    torch._foreach_copy_(_parts(stack, factors), factors)
    return stack


def _parts(stack: Tensor, factors: list[Tensor]) -> list[Tensor]:
    """Views of a stack, each of its factor's own shape."""
    rows = list(stack.unbind())
    if sum(map(Tensor.numel, factors)) == stack.numel():  # every factor fills its row
        return rows
    return [row[: f.shape[0], : f.shape[1]] for row, f in zip(rows, factors)]


def _step_left(factors: list[Tensor], *, least: float | Tensor) -> None:
    """P -= P (PᵀP - diag) / 2c: relative to the longest column, whatever the adapter's size."""
    P_kor = _stack(factors)
    D_krr = P_kor.transpose(1, 2) @ P_kor
    lengths_kr = D_krr.diagonal(dim1=1, dim2=2)
    longest_k = lengths_kr.amax(dim=1)
    lengths_kr.zero_()
    tiny = _numbers((torch.finfo(torch.float32).tiny,), longest_k.device)
    if isinstance(least, Tensor):
        least_k = (longest_k * least).add_(tiny)
    else:
        least_k = torch.add(tiny, longest_k, alpha=least)
    _subtract_half(factors, P_kor @ D_krr.div_(step_divisor(D_krr, least=least_k.view(-1, 1, 1))))


def _step_right(factors: list[Tensor], row_norms: list[float], *, least: float | Tensor) -> None:
    """Q -= (QQᵀ/ρ² - I) Q / 2c."""
    Q_kri = _stack(factors)
    unit_kri = Q_kri / _numbers(tuple(row_norms), Q_kri.device).view(-1, 1, 1)
    D_krr = torch.baddbmm(_minus_one(Q_kri.shape[1], Q_kri.device), unit_kri, unit_kri.transpose(1, 2))
    ranks = tuple(len(factor) for factor in factors)
    if len(set(ranks)) > 1:
        D_krr.mul_(_filled(ranks, Q_kri.device))
    _subtract_half(factors, D_krr.div_(step_divisor(D_krr, least=least)) @ Q_kri)


@lru_cache(maxsize=64)
def _numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The same few numbers at every step: brought to the device once, fp32."""
    return torch.tensor(values).to(device, non_blocking=True)


@lru_cache(maxsize=64)
def _minus_one(rank: int, device: torch.device) -> Tensor:
    """-I, [1, r, r]."""
    return torch.tensor([[[-float(i == j) for j in range(rank)] for i in range(rank)]]).to(device, non_blocking=True)


@lru_cache(maxsize=64)
def _filled(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """1 for the rows of a stack of factors, 0 for what fills it up, [k, r, 1]."""
    rows = [[[float(row < rank)] for row in range(max(ranks))] for rank in ranks]
    return torch.tensor(rows).to(device, non_blocking=True)


def _subtract_half(factors: list[Tensor], steps: Tensor) -> None:
    torch._foreach_sub_(factors, _parts(steps.to(factors[0].dtype), factors), alpha=0.5)


@torch.no_grad()
def hand_over(handles: Sequence[TripletHandle], optimizer: Optimizer | None) -> None:
    """Rewrite every P·Q, of a convolution that of each group, in its singular vectors and carry Adam's moments along.

    Gradients transform as ∂L/∂P_new = ∂L/∂P · T⁻ᵀ and ∂L/∂Q_new = Tᵀ · ∂L/∂Q, and so do first moments; second
    moments use the squared entries, which leaves out correlations between triplets. Layers of one shape go through
    together.
    """
    groups: dict[tuple[Any, ...], list[TripletHandle]] = defaultdict(list)
    for h in handles:
        if 0 < h.rank <= h.d_in:
            P, Q = h.P_parameter, h.Q_parameter
            groups[h.is_embedding, h.groups, P.shape, Q.shape, P.device, P.dtype, Q.dtype].append(h)
    for group in groups.values():
        _hand_over_alike(group, optimizer)


def _hand_over_alike(handles: list[TripletHandle], optimizer: Optimizer | None) -> None:
    """`hand_over` for layers of one shape, but for those that have not learned anything, or have diverged: no SVD."""
    P_kgor, Q_kgri = torch.stack([h.P_gor for h in handles]), torch.stack([h.Q_gri for h in handles])
    finite = P_kgor.isfinite().all(dim=(1, 2, 3)) & Q_kgri.isfinite().all(dim=(1, 2, 3))
    sound = P_kgor.any(dim=(1, 2, 3)) & finite
    chosen = [k for k, is_sound in enumerate(sound.tolist()) if is_sound]
    if not chosen:
        return
    if len(chosen) < len(handles):
        handles, P_kgor, Q_kgri = [handles[k] for k in chosen], P_kgor[chosen], Q_kgri[chosen]
    P_kor, Q_kri = P_kgor.flatten(0, 1), Q_kgri.flatten(0, 1)  # k counts groups from here
    row_norms = torch.tensor([h.row_norm for h in handles for _ in range(h.groups)], dtype=torch.float64).view(-1, 1, 1)
    wide = torch.promote_types(P_kor.dtype, torch.float32)
    result = balance(P_kor, Q_kri, row_norm=row_norms.to(P_kor.device, wide, non_blocking=True))
    if optimizer is not None:
        P, Q = [h.P_parameter for h in handles], [h.Q_parameter for h in handles]
        turn_states(optimizer, P, handles[0].P_dim, gradient=result.to_Q, weight=result.to_P.mT)
        turn_states(optimizer, Q, handles[0].Q_dim, gradient=result.to_P.mT, weight=result.to_Q)
    torch._foreach_copy_([P for h in handles for P in h.P_gor.unbind()], list(result.P_or.unbind()))
    torch._foreach_copy_([Q for h in handles for Q in h.Q_gri.unbind()], list(result.Q_ri.unbind()))


@torch.no_grad()
def orthogonality_error(handles: Sequence[TripletHandle]) -> float:
    """Root mean square cosine between different live vectors, over all P and Q of rank 2 or more; 0 is orthogonal."""
    errors: list[Tensor] = []
    several: list[bool] = []
    for left in (True, False):
        for group in _by_length(handles, left=left):
            # A vector of zeros counts as none: so pruned ones are left out.
            vectors = _stack([factor.T if left else factor for _, factor in group])
            live = _stack([h.mask.unsqueeze(1) for h, _ in group]).to(vectors.device, non_blocking=True)
            errors.append(relative_error(vectors.mul_(live)).cpu())
            several += [h.live_rank > 1 for h, _ in group]
    if True not in several:
        return 0.0
    return float(torch.cat(errors)[torch.tensor(several)].square().mean().sqrt())
