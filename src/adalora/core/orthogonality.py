"""R(P, Q) of Eq. 4 and its gradient in closed form.

`V` stands for P with its columns, or Q with its rows, as vectors: the functions take row vectors,
V = Pᵀ or V = Q, stacked [k, r, d].
"""

from __future__ import annotations

import torch
from torch import Tensor


def deviation(V_krd: Tensor, *, squared_norm: float | None) -> Tensor:
    """V Vᵀ minus its target Gram matrix, [k, r, r].

    Args:
        V_krd: Vectors, one a row.
        squared_norm: Target of the diagonal: ρ² (1 in Eq. 4). None leaves the lengths free and asks for
            orthogonality alone.
    """
    gram = V_krd @ V_krd.transpose(-1, -2)
    if squared_norm is None:
        return gram - torch.diag_embed(torch.diagonal(gram, dim1=-2, dim2=-1))
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return gram.sub_(eye, alpha=squared_norm)


def squared_gradient(V_krd: Tensor, *, squared_norm: float | None) -> Tensor:
    """Gradient of ‖V Vᵀ - D‖²_F with D as in `deviation`: 4 (V Vᵀ - D) V, [k, r, d]."""
    gradient: Tensor = deviation(V_krd, squared_norm=squared_norm) @ V_krd
    return gradient.mul_(4)


def released_gradient(V_krd: Tensor) -> Tensor:
    """Gradient of the unsquared norm ‖V Vᵀ - I‖_F, as in the released code: 2 (V Vᵀ - I) V / ‖V Vᵀ - I‖_F, [k, r, d].

    0 where V is exactly orthonormal, as autograd has it.
    """
    gap = deviation(V_krd, squared_norm=1.0)
    norm = torch.linalg.matrix_norm(gap, keepdim=True)
    gradient: Tensor = (gap / norm.clamp_min(torch.finfo(gap.dtype).tiny)) @ V_krd
    return gradient.mul_(2)


def least_divisor(weight: float, learning_rate: float | Tensor) -> float | Tensor:
    """What a decoupled step is divided by at least: V -= D V / c is lr·γ·∇R with c = 1 / (4·γ·lr), and c ≥ 2.

    At c = 2 the step is that of Newton and Schulz, V·(3 - VᵀV)/2 for orthonormal V: deviations are squared at each
    step. Longer ones overshoot.

    Args:
        weight: γ, at least 0.
        learning_rate: A number, or a tensor on any device, which is not asked for its value. Infinite where it is 0.
    """
    size = 4 * weight * learning_rate
    if isinstance(size, Tensor):
        return size.float().reciprocal().clamp_min(2.0)
    return max(1 / size, 2.0) if size else float("inf")


def step_divisor(D_krr: Tensor, *, unit: float | Tensor, least: float | Tensor) -> Tensor:
    """What a decoupled step D V is divided by: `least`, or more where vectors are far from orthogonal, [..., 1, 1].

    With 2·‖D‖∞ as the divisor, and ‖D‖∞ at least the largest eigenvalue's size, no direction turns around or grows by
    more than half in a step: vectors that are all but parallel come apart, whatever the rank, γ and the learning rate.

    Args:
        D_krr: Deviations from the wanted Gram matrix, in units of `unit`; symmetric.
        unit: What stands for 1 in D.
        least: `least_divisor`.
    """
    norm: Tensor = D_krr.abs().sum(dim=-1, keepdim=True).amax(dim=-2, keepdim=True)
    norm = norm.mul_(2)
    if isinstance(unit, Tensor):
        return torch.maximum(norm, unit * least)
    return norm.clamp_min_(least)


def relative_error(V_krd: Tensor) -> Tensor:
    """How far from orthogonal, 0 to 1: root mean square of the cosines between different vectors, [k]."""
    lengths = V_krd.norm(dim=-1, keepdim=True)
    unit = V_krd / lengths.clamp_min(torch.finfo(V_krd.dtype).tiny)
    off = deviation(unit, squared_norm=None)
    live = (lengths.squeeze(-1) > 0).sum(dim=-1)
    pairs = (live * (live - 1)).clamp_min(1)
    error: Tensor = (off.square().sum(dim=(-1, -2)) / pairs).sqrt()
    return error
