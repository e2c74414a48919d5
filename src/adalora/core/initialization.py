"""How triplets start, and how a trained product P·Q becomes triplets."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Length of a row of LoRA's A under PEFT's default init, U(-1/√d_in, 1/√d_in): √(d_in · 1/(3 d_in)).
LORA_ROW_NORM = 1 / math.sqrt(3)


@dataclass(frozen=True)
class Balanced:
    """P·Q written in its singular vectors, in LoRA's gauge.

    Attributes:
        P_or: U·Σ/ρ: orthogonal columns that carry the singular values, in falling order.
        Q_ri: ρ·Vᵀ: orthogonal rows of length ρ, as long as LoRA's own, so that training goes on at its pace.
        to_P: T with P_new = P_old @ T.
        to_Q: T⁻¹, Q_new = T⁻¹ @ Q_old.
    """

    P_or: Tensor
    Q_ri: Tensor
    to_P: Tensor
    to_Q: Tensor


def balance(P_or: Tensor, Q_ri: Tensor, *, row_norm: float | Tensor = LORA_ROW_NORM) -> Balanced:
    """Exact SVD of P·Q by two thin QRs and one r × r SVD, in O((d_out + d_in)·r²).

    Where P·Q has a lower rank than r the spare columns of P are 0 (to rounding) and the spare rows of Q complete the
    orthogonal set within Q's row space, ready to grow.

    Args:
        P_or: [..., d_out, r], any float type; the result is fp32 (fp64 stays).
        Q_ri: [..., r, d_in], of full row rank, r <= d_in.
        row_norm: ρ: one number, or a tensor [..., 1, 1].
    """
    dtype = torch.float64 if P_or.dtype == torch.float64 else torch.float32
    P, Q = P_or.to(dtype), Q_ri.to(dtype)
    R_P = torch.linalg.qr(P, mode="r").R
    basis_Q, R_Q = torch.linalg.qr(Q.mT)
    _, _, Vh = torch.linalg.svd(R_P @ R_Q.mT)  # R_P has min(d_out, r) rows; Vh is r x r
    to_P = R_Q.mT @ Vh.mT / row_norm
    to_Q = row_norm * torch.linalg.solve_triangular(R_Q, Vh.mT, upper=True).mT
    return Balanced(P_or=P @ to_P, Q_ri=row_norm * Vh @ basis_Q.mT, to_P=to_P, to_Q=to_Q)
