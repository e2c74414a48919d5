"""Keeps triplets orthogonal: the regulariser's decoupled step and the exact hand-over to singular vectors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from adalora.core.initialization import balance
from adalora.core.orthogonality import Lengths, least_divisor, length_pull, relative_error, turned
from adalora.lora.layers.triplets import TripletHandle
from adalora.lora.optimizers.batches import turn_states


class Groups:
    """P and Q of an adapter's layers, all whose vectors have one length together, P before Q.

    Whatever their ranks: few shapes, also after compaction. Found once, and anew whenever a parameter is another one or
    has another shape, type or place.
    """

    def __init__(self, handles: Sequence[TripletHandle]) -> None:
        self._handles = handles
        self._seen: list[Any] | None = None
        self._found: list[_Group] = []

    def now(self) -> list[_Group]:
        """The groups as they are."""
        live = [h for h in self._handles if not h.removed]
        parameters = [h.P_parameter for h in live] + [h.Q_parameter for h in live]
        seen = [(id(p), p.shape, p.dtype, p.device, p.is_contiguous()) for p in parameters]
        if seen != self._seen:
            self._found = _by_length(live)
            # A view would go stale when its parameter gets other memory; a Linear's parameters are taken themselves.
            self._seen = seen if all(_is_matrix(h) for h in live) else None
        return self._found


@torch.no_grad()
def decoupled_step(groups: Groups, *, weight: float, learning_rate: float | Tensor) -> None:
    """Turn P's columns and Q's rows towards right angles by lr·γ·∇R, apart from the loss, as AdamW does weight decay.

    No vector becomes shorter by it, so P's columns, which carry the singular values, are not held back. Q's rows are
    drawn to the length ρ, but only so much that they do not run away (`core.orthogonality.LENGTH_SHARE`). No step is
    longer than `core.orthogonality.step_divisor` allows. Vectors of one length go through together. A learning rate
    that lies on a device, as optimizers inside CUDA graphs keep it, stays there.
    """
    if not isinstance(learning_rate, Tensor) and not learning_rate:
        return
    least, drawn = least_divisor(weight, learning_rate), length_pull(weight, learning_rate)
    for group in groups.now():
        V_krd = _stack(group.vectors, alike=group.alike)
        V_krd = turned(V_krd, least=least, lengths=_lengths(group.wanted, V_krd.device), pull=drawn)
        P_kdr, Q_krd = V_krd[: group.lefts].transpose(1, 2), V_krd[group.lefts :]
        if V_krd.is_cuda:  # pragma: no cover - a GPU's: one kernel for all that are laid out alike
            P_kdr = P_kdr.contiguous()
        written = [*P_kdr.unbind(), *Q_krd.unbind()]
        torch._foreach_copy_(group.factors, written if group.alike else _parts(written, group.factors))


@lru_cache(maxsize=64)
def _lengths(wanted: tuple[float | None, ...], device: torch.device) -> Lengths:
    """ρ for each matrix of a stack, None for any: brought to the device once."""
    offsets = [[-1.0 if norm else 0.0] for norm in wanted]
    inverse = [[1 / norm**2 if norm else 0.0] for norm in wanted]
    return Lengths(*(torch.tensor(values).to(device, non_blocking=True) for values in (offsets, inverse)))


class _Group(NamedTuple):
    """Factors whose vectors have one length; of a convolution the factor of one group."""

    handles: list[TripletHandle]
    factors: list[Tensor]
    lefts: int  # so many are P
    alike: bool  # all have one rank

    @property
    def wanted(self) -> tuple[float | None, ...]:
        """The length that each one's vectors are drawn to."""
        return (None,) * self.lefts + tuple([h.row_norm for h in self.handles[self.lefts :]])

    @property
    def vectors(self) -> list[Tensor]:
        """P's columns and Q's rows as rows, views."""
        return [P.T for P in self.factors[: self.lefts]] + self.factors[self.lefts :]


def _by_length(handles: Sequence[TripletHandle]) -> list[_Group]:
    """What `Groups` keeps, for layers that are in the adapter."""
    found: dict[tuple[int, torch.device, torch.dtype], list[tuple[TripletHandle, Tensor, bool]]] = defaultdict(list)
    for left in (True, False):
        for h in handles:
            for factor in _factors(h, left=left):
                length, rank = factor.shape if left else reversed(factor.shape)
                if rank > 1:
                    found[length, factor.device, factor.dtype].append((h, factor, left))
    return [_group(members) for members in found.values()]


def _group(members: list[tuple[TripletHandle, Tensor, bool]]) -> _Group:
    handles, factors = [h for h, _, _ in members], [factor for _, factor, _ in members]
    ranks = {factor.shape[1 if left else 0] for _, factor, left in members}
    return _Group(handles, factors, sum(left for _, _, left in members), alike=len(ranks) == 1)


def _is_matrix(h: TripletHandle) -> bool:
    """Whether the layer's parameters are P and Q, row by row."""
    return h.is_matrix and h.P_parameter.is_contiguous() and h.Q_parameter.is_contiguous()


def _factors(h: TripletHandle, *, left: bool) -> Sequence[Tensor]:
    """P or Q of a layer, of each group; a Linear's parameter is taken itself: no view."""
    if h.groups > 1:
        return (h.P_gor if left else h.Q_gri).unbind()
    if _is_matrix(h):
        return (h.P_parameter if left else h.Q_parameter,)
    return (h.P_or if left else h.Q_ri,)


def _stack(factors: list[Tensor], *, alike: bool) -> Tensor:
    """Matrices of one height or width as one tensor, fp32 at least, [k, ...], filled up with zeros.

    Args:
        factors: The matrices.
        alike: They have one shape.
    """
    dtype = torch.promote_types(factors[0].dtype, torch.float32)
    if alike:
        return torch.stack(factors).to(dtype)
    rows, columns = (max(sizes) for sizes in zip(*(factor.shape for factor in factors)))
    stack = torch.zeros(len(factors), rows, columns, dtype=dtype, device=factors[0].device)
    torch._foreach_copy_(_parts(stack.unbind(), factors), factors)
    return stack


def _parts(stack: Sequence[Tensor], factors: list[Tensor]) -> list[Tensor]:
    """Views of matrices, each of its factor's own shape."""
    return [m if m.shape == f.shape else m[: f.shape[0], : f.shape[1]] for m, f in zip(stack, factors)]


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
    for group in Groups(handles).now():
        # A vector of zeros counts as none: so pruned ones are left out.
        vectors = _stack(group.vectors, alike=group.alike)
        masks = [h.mask.unsqueeze(1) for h in group.handles]
        live = _stack(masks, alike=group.alike).to(vectors.device, non_blocking=True)
        errors.append(relative_error(vectors.mul_(live)).cpu())
        several += [h.live_rank > 1 for h in group.handles]
    if True not in several:
        return 0.0
    return float(torch.cat(errors)[torch.tensor(several)].square().mean().sqrt())
