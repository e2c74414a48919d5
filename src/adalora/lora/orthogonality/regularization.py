"""The orthogonality term as part of the objective (Eq. 4) or as in the released code, for layers with a λ of their own.

The gradient is known in closed form and is added to the parameters' gradients right before the optimizer steps: it
passes through Adam as the loss's gradient does, whatever the loss function returned, and once per step whatever the
accumulation. It comes after gradient clipping, and the loss that is logged stays the task's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adalora.core.orthogonality import deviation, least_divisor, released_gradient, squared_gradient, step_divisor
from adalora.lora.layers.groups import by_group
from adalora.lora.layers.triplets import TripletHandle


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
    share = weight / (2 * sum(h.groups for h in live)) if kind == "released" else weight
    found = []
    for parameters, V_kgrd, rows_last in _by_shape(live):
        gradients = squared_gradient(V_kgrd, squared_norm=1.0) if kind == "squared" else released_gradient(V_kgrd)
        for parameter, gradient in zip(parameters, gradients.mul_(share).unbind()):
            shaped = gradient.mT if rows_last else gradient
            found.append((parameter, shaped.reshape(parameter.shape).to(parameter.dtype).contiguous()))
    return found


def _by_shape(handles: Sequence[TripletHandle]) -> Iterator[tuple[list[nn.Parameter], Tensor, bool]]:
    """P's columns and Q's rows of all layers, stacked by shape, in fp32 at least.

    Yields:
        Parameters, their vectors [k, groups, r, d], and whether these are the parameters' columns.
    """
    groups: dict[tuple[Any, ...], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
    for h in handles:
        for parameter, vectors, left in ((h.P_parameter, h.P_gor.mT, True), (h.Q_parameter, h.Q_gri, False)):
            groups[left != h.is_embedding, vectors.shape, vectors.device, vectors.dtype].append((parameter, vectors))
    for (rows_last, _, _, dtype), members in groups.items():
        stack = torch.stack([vectors for _, vectors in members]).to(torch.promote_types(dtype, torch.float32))
        yield [parameter for parameter, _ in members], stack, rows_last


@torch.no_grad()
def decoupled_svd_step(handles: Sequence[TripletHandle], *, weight: float, learning_rate: float | Tensor) -> None:
    """Move P's columns and Q's rows towards length 1 and right angles by lr·γ·∇R, apart from the loss.

    No step is longer than `core.orthogonality.step_divisor` allows.
    """
    least = least_divisor(weight, learning_rate)
    for parameters, V_kgrd, rows_last in _by_shape([h for h in handles if h.rank > 0]):
        D_kgrr = deviation(V_kgrd, squared_norm=1.0)
        steps = D_kgrr.div_(step_divisor(D_kgrr, least=least)) @ V_kgrd
        vectors = [by_group(p.detach().flatten(1), V_kgrd.shape[1]) for p in parameters]
        vectors = [v.mT if rows_last else v for v in vectors]
        torch._foreach_sub_(vectors, list(steps.to(vectors[0].dtype).unbind()), alpha=0.5)
