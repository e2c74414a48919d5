"""The orthogonality term as part of the objective (Eq. 4) or as in the released code, for layers with a λ of their own.

The gradient is known in closed form and is added to the parameters' gradients right before the optimizer steps: it
passes through Adam as the loss's gradient does, whatever the loss function returned, and once per step whatever the
accumulation. It comes after gradient clipping, and the loss that is logged stays the task's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adalora.core.orthogonality import released_gradient, squared_gradient
from adalora.lora.triplets import TripletHandle


@torch.no_grad()
def coupled_gradients(
    handles: Sequence[TripletHandle], *, kind: str, weight: float
) -> list[tuple[nn.Parameter, Tensor]]:
    """Gradient of γ·R for every P and Q, shaped and typed like the parameter.

    Args:
        handles: Layers; those without triplets are left out.
        kind: "squared" (Σ ‖VVᵀ - I‖², Eq. 4) or "released" (mean of ‖VVᵀ - I‖ over all P and Q).
        weight: γ.
    """
    live = [h for h in handles if h.rank > 0]
    share = weight / (2 * len(live)) if kind == "released" else weight
    found = []
    for h in live:
        for parameter, vectors, left in ((h.P_parameter, h.P_or.T, True), (h.Q_parameter, h.Q_ri, False)):
            V = vectors.to(torch.promote_types(vectors.dtype, torch.float32)).unsqueeze(0)
            gradient = squared_gradient(V, squared_norm=1.0) if kind == "squared" else released_gradient(V)
            shaped = gradient[0].T if left != h.is_embedding else gradient[0]
            found.append((parameter, (share * shaped).reshape(parameter.shape).to(parameter.dtype).contiguous()))
    return found


@torch.no_grad()
def decoupled_svd_step(handles: Sequence[TripletHandle], *, weight: float, learning_rate: float) -> None:
    """Move P's columns and Q's rows towards length 1 and right angles by lr·γ·∇R, apart from the loss."""
    for h in handles:
        for vectors in (h.P_or.T, h.Q_ri):
            step = squared_gradient(vectors.float().unsqueeze(0), squared_norm=1.0)[0]
            vectors.sub_((weight * learning_rate * step).to(vectors.dtype))
