"""Exact singular value decomposition of a factored matrix P·Q, without forming the product."""

from __future__ import annotations

import torch
from torch import Tensor


def factored_svd(P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of P @ Q by two thin QRs and one small SVD.

    Costs O((d_out + d_in)·r² + r³) instead of the full matrix's O(d_out·d_in·min(d_out, d_in)).
    U and Vh have orthonormal columns and rows even where P @ Q has a lower rank than r; the sign of
    each pair is fixed (the largest entry of each row of Vh is positive), so equal inputs give equal outputs
    on any machine up to rounding.

    Args:
        P: [d_out, r], any floating dtype. Half precisions are computed in float32.
        Q: [r, d_in], same device as P.

    Returns:
        U [d_out, k], S [k] in falling order, Vh [k, d_in] with k = min(r, d_out, d_in) and
        P @ Q = U @ diag(S) @ Vh; float64 where P or Q is float64, else float32.

    Raises:
        ValueError: P and Q are not matrices that can be multiplied.
    """
    if P.dim() != 2 or Q.dim() != 2 or P.shape[1] != Q.shape[0]:
        raise ValueError(f"P [d_out, r] and Q [r, d_in] wanted, got {tuple(P.shape)} and {tuple(Q.shape)}")
    dtype = torch.float64 if torch.float64 in (P.dtype, Q.dtype) else torch.float32
    left, right = P.detach().to(dtype), Q.detach().to(dtype)
    d_out, r = left.shape
    k = min(r, d_out, right.shape[1])
    if k == 0:
        return left.new_zeros(d_out, 0), left.new_zeros(0), left.new_zeros(0, right.shape[1])
    Q_left, R_left = torch.linalg.qr(left)  # [d_out, min(d_out, r)]
    Q_right, R_right = torch.linalg.qr(right.T)  # [d_in, min(d_in, r)]
    U_small, S, Vh_small = torch.linalg.svd(R_left @ R_right.T, full_matrices=False)
    U, Vh = Q_left @ U_small[:, :k], Vh_small[:k] @ Q_right.T
    largest = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    sign = torch.where(largest < 0, -1.0, 1.0).to(dtype)
    return U * sign, S[:k], Vh * sign.unsqueeze(1)
