"""Averages of importance for layers of one shape, held as one stack: ten layers take no more operations than one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from adalora.core.importance import SmoothedImportance, left_products, right_products
from adalora.lora.triplets import TripletHandle

StepWeights: TypeAlias = dict[torch.device, tuple[Tensor, Tensor]]


class LeftAverages:
    """P of all layers with one shape of P, and with them the λ.

    Attributes:
        members: Numbers of the layers among all of the adapter, in the order of the stack's rows.
        factors: Averages of P, [k, d_out, r].
        weights: Averages of λ, [k, r].
    """

    def __init__(self) -> None:
        self.members: list[int] = []

    def start(self, handles: list[TripletHandle]) -> None:
        """Averages of zero for the layers that `members` counts."""
        self.handles = handles
        P_or = handles[0].P_or
        stack = P_or.expand(len(handles), *P_or.shape)
        self.factors = SmoothedImportance.zeros_like(stack)
        self.weights = SmoothedImportance.zeros_like(stack[:, 0])

    def observe(self, *, beta1: float, beta2: float, unscale: float, weights: StepWeights) -> None:
        """Take in weights and gradients as they are; a layer without a gradient keeps what it had.

        Args:
            beta1: β1 of Eq. 10.
            beta2: β2 of Eq. 11.
            unscale: What every gradient is multiplied with.
            weights: From `step_weights`, for each device.
        """
        present = _present(self.handles, lambda h: h.P_parameter.grad)
        if not present:
            return
        handles = [self.handles[k] for k in present]
        P = torch.stack([h.P_or for h in handles])
        gradient = torch.stack([h.as_P(_gradient(h.P_parameter)) for h in handles])
        product, totals = left_products(P, _unscaled(gradient, unscale))
        if handles[0].lambda_parameter is not None:
            totals = _unscaled(torch.stack([_lambda_product(h) for h in handles]), unscale)
        _update(self.factors, product, present, beta1=beta1, beta2=beta2, weights=weights)
        _update(self.weights, totals, present, beta1=beta1, beta2=beta2, weights=weights)


class RightAverages:
    """Q of all layers with one shape of Q.

    Attributes:
        members: Numbers of the layers among all of the adapter, in the order of the stack's rows.
        factors: Averages of Q, [k, r, groups · d_in].
    """

    def __init__(self) -> None:
        self.members: list[int] = []

    def start(self, handles: list[TripletHandle]) -> None:
        """Averages of zero for the layers that `members` counts."""
        self.handles = handles
        Q_ri = handles[0].Q_ri
        self.factors = SmoothedImportance.zeros_like(Q_ri.expand(len(handles), *Q_ri.shape))

    def observe(self, *, beta1: float, beta2: float, unscale: float, weights: StepWeights) -> None:
        """Take in weights and gradients as they are; a layer without a gradient keeps what it had.

        Args:
            beta1: β1 of Eq. 10.
            beta2: β2 of Eq. 11.
            unscale: What every gradient is multiplied with.
            weights: From `step_weights`, for each device.
        """
        present = _present(self.handles, lambda h: h.Q_parameter.grad)
        if not present:
            return
        handles = [self.handles[k] for k in present]
        Q = torch.stack([h.Q_ri for h in handles])
        gradient = torch.stack([h.as_Q(_gradient(h.Q_parameter)) for h in handles])
        product = right_products(Q, _unscaled(gradient, unscale))
        _update(self.factors, product, present, beta1=beta1, beta2=beta2, weights=weights)


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _unscaled(gradient: Tensor, factor: float) -> Tensor:
    return gradient if factor == 1 else gradient.float() * factor


def _lambda_product(h: TripletHandle) -> Tensor:
    """λ·∂L/∂λ of a layer with a λ of its own, [r], fp32: summed over groups, as for one factor on them all."""
    weights = h.lambda_parameter
    assert weights is not None
    if weights.grad is None:
        return torch.zeros(h.rank, device=weights.device)
    return h.by_group(weights.detach().float() * weights.grad.float()).sum(dim=0)


def _present(handles: list[TripletHandle], gradient: Callable[[TripletHandle], Tensor | None]) -> list[int]:
    """Layers that got a gradient this step: an unused module or an expert without tokens has none."""
    return [k for k, h in enumerate(handles) if gradient(h) is not None]


def all_finite(gradients: list[Tensor]) -> Tensor:
    """Whether no gradient has an infinity or NaN, 0-dim bool, on the device of the first; nobody waits for it.

    Norms are fp32 at least: in float16 they would overflow.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        alike[gradient.device, gradient.dtype].append(gradient)
    flags = [
        torch.stack(torch._foreach_norm(group, 2, dtype=torch.promote_types(dtype, torch.float32))).isfinite().all()
        for (_, dtype), group in alike.items()
    ]
    if len(flags) == 1:
        return flags[0]
    return torch.stack([flag.to(flags[0].device, non_blocking=True) for flag in flags]).all()


def _update(
    average: SmoothedImportance,
    product: Tensor,
    present: list[int],
    *,
    beta1: float,
    beta2: float,
    weights: StepWeights,
) -> None:
    """Update the rows `present` of a stack; the others keep what they had."""
    averaging: dict[str, Any] = {"beta1": beta1, "beta2": beta2, "weights": weights[product.device]}
    if len(present) == len(average.sensitivity):
        average.update(product, **averaging)
        return
    rows = torch.tensor(present).to(product.device, non_blocking=True)
    part = SmoothedImportance(average.sensitivity.index_select(0, rows), average.uncertainty.index_select(0, rows))
    part.update(product, **averaging)
    average.sensitivity.index_copy_(0, rows, part.sensitivity)
    average.uncertainty.index_copy_(0, rows, part.uncertainty)
