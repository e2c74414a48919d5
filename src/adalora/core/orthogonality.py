"""R(P, Q) of Eq. 4 and its gradient in closed form.

`V` stands for P with its columns, or Q with its rows, as vectors: the functions take row vectors,
V = Pᵀ or V = Q, stacked [k, r, d].
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# Of γ, for lengths: enough that Q's rows do not run away at high learning rates, little enough that they may grow.
LENGTH_SHARE = 0.01

# Steps in which a deviation may go at the least: with fewer, ranks were found less exactly at high learning rates.
SHORTEST = 4.0

# A step that moves nothing, as a divisor: infinity times a length of 0 would be no number.
NO_STEP = 1e30


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
    """The c in V -= D V / (2c), which is a decoupled step of lr·γ·∇R for c = 1 / (8·γ·lr), and at least `SHORTEST`.

    c = 1 would be the step of Newton and Schulz, V·(3 - VᵀV)/2 for vectors of length 1, and longer ones overshoot. The
    optimizer has to follow a turn, and does not at that pace.

    Args:
        weight: γ, at least 0.
        learning_rate: A number, or a tensor on any device, which is not asked for its value.
    """
    rate = 8 * weight * learning_rate
    if isinstance(rate, Tensor):
        return rate.float().reciprocal().clamp(SHORTEST, NO_STEP)
    return min(max(1 / rate, SHORTEST), NO_STEP) if rate else NO_STEP


def step_divisor(D_krr: Tensor, *, least: float | Tensor) -> Tensor:
    """The c in V -= D V / (2c): `least`, or ‖D‖ where vectors are further from orthogonal than that, [..., 1, 1].

    No eigenvalue of D is larger than its Frobenius norm, so no direction turns around, or grows by more than half, in a
    step: vectors that are all but parallel come apart, whatever the rank, γ and the learning rate.

    Args:
        D_krr: Deviations from the wanted Gram matrix.
        least: `least_divisor`, in D's units; a tensor broadcasts against [..., 1, 1].
    """
    norm: Tensor = torch.linalg.vector_norm(D_krr, dim=(-2, -1), keepdim=True)
    return norm.clamp_min_(least)


def length_pull(weight: float, learning_rate: float | Tensor) -> float | Tensor:
    """What a decoupled step takes of a deviation in length, relative, half of that in squares; at most 1/2.

    Args:
        weight: γ, at least 0; lengths get `LENGTH_SHARE` of it.
        learning_rate: A number, or a tensor on any device, which is not asked for its value.
    """
    size = 4 * LENGTH_SHARE * weight * learning_rate
    return size.float().clamp(max=0.5) if isinstance(size, Tensor) else min(size, 0.5)


class Lengths(NamedTuple):
    """Which of k stacked matrices have vectors that are drawn to a length, and to which, fp32.

    Attributes:
        offsets: -1 where vectors are drawn to ρ, else 0, [k, 1].
        inverse_squares: 1/ρ² there, else 0, [k, 1].
    """

    offsets: Tensor
    inverse_squares: Tensor


def turned(V_krd: Tensor, *, least: float | Tensor, lengths: Lengths, pull: float | Tensor) -> Tensor:
    """Vectors turned towards right angles; then each as long as it was, or a little nearer to ρ, [k, r, d].

    V -= D V / (2c) with D the products of different vectors, relative to the longest one's square: long vectors turn
    short ones and not the other way round. A length l that is drawn to ρ becomes l / (1 + pull·(l²/ρ² - 1)). Vectors of
    0 stay and turn none.

    Args:
        V_krd: Vectors, one a row, fp32.
        least: `least_divisor`.
        lengths: Those that are wanted.
        pull: `length_pull`.
    """
    before_kr = torch.linalg.vector_norm(V_krd, dim=-1)  # not by the products: those may be TF32
    D_krr = V_krd @ V_krd.transpose(-1, -2)
    squares_kr = D_krr.diagonal(dim1=-2, dim2=-1)
    longest_k = squares_kr.amax(dim=-1)
    squares_kr.zero_()
    D_krr.div_(step_divisor(D_krr, least=_above_zero(longest_k, least)[:, None, None]))
    with _without_autocast(V_krd.device):  # which would round the vectors themselves
        turned_krd = torch.baddbmm(V_krd, D_krr.to(V_krd.dtype), V_krd, alpha=-0.5)
    after_kr = torch.linalg.vector_norm(turned_krd, dim=-1).clamp_min_(torch.finfo(torch.float32).tiny)
    excess_kr = torch.addcmul(lengths.offsets, lengths.inverse_squares, before_kr.square())
    if isinstance(pull, Tensor):
        after_kr.addcmul_(after_kr, excess_kr.mul_(pull))
    else:
        after_kr.addcmul_(after_kr, excess_kr, value=pull)
    return turned_krd.mul_(before_kr.div_(after_kr).unsqueeze(-1))


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _above_zero(longest_k: Tensor, least: float | Tensor) -> Tensor:
    """`longest · least`, and above 0 where all vectors are 0: one operation where `least` is a number."""
    tiny = _tiny(longest_k.device, longest_k.dtype)
    if isinstance(least, Tensor):
        return (longest_k * least).add_(tiny)
    return torch.add(tiny, longest_k, alpha=least)


@lru_cache(maxsize=16)
def _tiny(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(torch.finfo(torch.float32).tiny, dtype=dtype).to(device, non_blocking=True)


def relative_error(V_krd: Tensor) -> Tensor:
    """How far from orthogonal, 0 to 1: root mean square of the cosines between different vectors, [k]."""
    lengths = V_krd.norm(dim=-1, keepdim=True)
    unit = V_krd / lengths.clamp_min(torch.finfo(V_krd.dtype).tiny)
    off = deviation(unit, squared_norm=None)
    live = (lengths.squeeze(-1) > 0).sum(dim=-1)
    pairs = (live * (live - 1)).clamp_min(1)
    error: Tensor = (off.square().sum(dim=(-1, -2)) / pairs).sqrt()
    return error
