"""P·Λ·Q of the live triplets rewritten in its exact singular vectors, at any time in the run."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from adalora.core.factored_svd import factored_svd
from adalora.lora.layers.groups import vectors_by_group
from adalora.lora.layers.triplets import TripletHandle


@torch.no_grad()
def reorthonormalize(handle: TripletHandle, optimizer: Optimizer | None) -> None:
    """Make P's and Q's live vectors orthonormal (Q's of length ρ where P carries λ) without changing P·Λ·Q.

    With P·Λ -> P·Λ·S and Q -> S⁻¹·Q, gradients transform by S⁻ᵀ and Sᵀ, and Adam's first moments with them; second
    moments by the squared entries, which leaves out correlations between triplets. Pruned triplets stay as they are.
    A layer, or a group of a convolution, that has not learned anything or has diverged is left alone.
    """
    turned = [_turn(handle, group, optimizer) for group in range(handle.groups)]
    if handle.lambda_parameter is not None and all(turned):
        handle.row_norm = 1.0


def _turn(handle: TripletHandle, group: int, optimizer: Optimizer | None) -> bool:
    """`reorthonormalize` for one group; whether anything was done."""
    live = handle.mask.nonzero().squeeze(1).to(handle.P_parameter.device)
    P_or, Q_ri = handle.P_gor[group], handle.Q_gri[group]
    left, right = handle.by_group(handle.left_or)[group][:, live].float(), Q_ri[live].float()
    if not 1 < len(live) <= min(left.shape[0], right.shape[1]) or not bool(
        left.isfinite().all() and right.isfinite().all()
    ):
        return False
    U, singular, Vh = factored_svd(left, right)
    weights, norm = handle.lambda_gr, handle.row_norm
    before = None if weights is None else weights[group, live].float()
    if float(singular.min()) <= 1e-6 * float(singular.max()) or (before is not None and not bool(before.all())):
        return False  # a direction without any weight: its vectors are not determined
    if before is None:
        back = (Vh * norm) @ torch.linalg.pinv(right)  # S⁻¹
        P_new, lengths = U * (singular / norm), None
    else:
        back, P_new, lengths = Vh @ torch.linalg.pinv(right), U, singular
    forth = torch.linalg.inv(back)
    _carry_moments(handle, group, optimizer, live=live, forth=forth, back=back, before=before, after=lengths)
    P_or[:, live] = P_new.to(P_or.dtype)
    Q_ri[live] = (Vh * (norm if before is None else 1.0)).to(Q_ri.dtype)
    if weights is not None and lengths is not None:
        weights[group, live] = lengths.to(weights.dtype)
    return True


def _carry_moments(
    handle: TripletHandle,
    group: int,
    optimizer: Optimizer | None,
    *,
    live: Tensor,
    forth: Tensor,
    back: Tensor,
    before: Tensor | None,
    after: Tensor | None,
) -> None:
    """∂L/∂(PΛ)·S⁻ᵀ and Sᵀ·∂L/∂Q; where λ is a parameter, ∂L/∂P = ∂L/∂(PΛ)·Λ on either side. λ's own moments stay."""
    state = optimizer.state if optimizer is not None else {}
    left = back if before is None or after is None else after.unsqueeze(1) * back / before
    for (parameter, dim), matrix in ((handle.factors["P"], left), (handle.factors["Q"], forth.T)):
        for key, moment in state.get(parameter, {}).items():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape and moment.is_floating_point():
                rows = vectors_by_group(moment, dim, handle.groups)[group].flatten(1)
                turn = (matrix.square() if "sq" in key else matrix).to(rows.device)
                rows[live] = (turn @ rows[live].float()).to(rows.dtype)
