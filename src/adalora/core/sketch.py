"""A streaming randomised sketch of a matrix that is only ever seen as a sum of outer products.

Tropp, Yurtsever, Udell and Cevher (2017), "Practical sketching algorithms for low-rank matrix approximation", Alg. 7:
G is known through G·Ω and Ψ·G alone, O((d_out + d_in)·k) numbers, and never formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adalora.core.factored_svd import factored_svd


class MatrixSketch:
    """Sketch of G = Σ δᵀx, of which pairs (x, δ) arrive one by one.

    Args:
        d_out: Rows of G.
        d_in: Columns of G.
        rank: Singular directions wanted; at most min(d_out, d_in) are given.
        oversampling: Directions looked at beyond `rank`.
        seed: Of the random test matrices, so that equal streams give equal sketches.
        device: Where x and δ are.
    """

    def __init__(
        self,
        d_out: int,
        d_in: int,
        *,
        rank: int,
        oversampling: int = 8,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rank = min(rank, d_out, d_in)
        k = min(self.rank + oversampling, d_out, d_in)
        wide = min(2 * k + 1, d_out)
        generator = torch.Generator().manual_seed(seed)
        self._omega_ik = torch.randn(d_in, k, generator=generator).to(device)
        self._psi_lo = torch.randn(wide, d_out, generator=generator).to(device)
        self._range_ok = torch.zeros(d_out, k, device=device)
        self._corange_li = torch.zeros(wide, d_in, device=device)

    @property
    def numbers(self) -> int:
        """Numbers held in memory."""
        return sum(t.numel() for t in (self._omega_ik, self._psi_lo, self._range_ok, self._corange_li))

    @property
    def is_finite(self) -> bool:
        """Whether all that was added is."""
        return bool(self._range_ok.isfinite().all() and self._corange_li.isfinite().all())

    def add(self, inputs_ni: Tensor, gradients_no: Tensor) -> None:
        """Add δᵀx.

        Args:
            inputs_ni: x, [n, d_in], any float type: what a linear layer was given.
            gradients_no: δ, [n, d_out]: the gradient of the loss with respect to what it gave.
        """
        x, delta = inputs_ni.float(), gradients_no.float()
        self._range_ok.addmm_(delta.T, x @ self._omega_ik)
        self._corange_li.addmm_((delta @ self._psi_lo.T).T, x)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [d_out, rank], S [rank] falling, Vh [rank, d_in], fp32: exact where G has at most `rank` directions."""
        basis = torch.linalg.qr(self._range_ok.double()).Q
        core_ki = torch.linalg.pinv(self._psi_lo.double() @ basis) @ self._corange_li.double()
        U, S, Vh = factored_svd(basis, core_ki)
        return U[:, : self.rank].float(), S[: self.rank].float(), Vh[: self.rank].float()
