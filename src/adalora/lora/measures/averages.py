"""Averages of importance for layers of one shape, held as one stack: ten layers take no more operations than one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from adalora.core.importance import SmoothedImportance, left_products, right_products
from adalora.lora.layers.triplets import TripletHandle

StepWeights: TypeAlias = dict[torch.device, tuple[Tensor, Tensor]]


class _Averages(ABC):
    """Layers of one shape; `look` and `observe` once a step.

    Attributes:
        members: Numbers of the layers among all of the adapter, in the order of the stack's rows.
        factors: Averages of P or Q, for each layer one.
        means: Whether `factors` holds one number for each triplet, the mean over its entries, [k, r].
    """

    entries_dim: int  # of a stack: the entries of one triplet

    def __init__(self, *, means: bool) -> None:
        self.members: list[int] = []
        self.means = means
        self._gradients: Tensor | None = None

    def look(self) -> Tensor | None:
        """Take note of the gradients there are, as one stack, [k, ...]; None where there are none.

        A layer without a gradient is left out and keeps what it had: an unused module, or an expert without tokens.
        """
        parameters = [self._parameter(h) for h in self.handles]
        gradients = [p.grad for p in parameters]
        self._present = [k for k, gradient in enumerate(gradients) if gradient is not None]
        found = [gradient for gradient in gradients if gradient is not None]
        self._gradients = torch.stack(self._matrices(found)) if found else None
        self._parameters = [parameters[k] for k in self._present]
        return self._gradients

    def _matrices(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What is shaped like the parameters of the layers that are present, as matrices."""
        if self._plain:
            return list(tensors)
        return [self._view(self.handles[k], tensor) for k, tensor in zip(self._present, tensors)]

    def observe(self, *, beta1: float, beta2: float, unscale: float, weights: StepWeights) -> None:
        """Take in the gradients that `look` saw, with the weights as they are now.

        Args:
            beta1: β1 of Eq. 10.
            beta2: β2 of Eq. 11.
            unscale: What every gradient is multiplied with.
            weights: From `step_weights`, for each device.
        """
        gradients, self._gradients = self._gradients, None
        if gradients is None:
            return
        present, handles = self._present, [self.handles[k] for k in self._present]
        factors = torch.stack(self._matrices(self._parameters))
        for average, product in self._products(factors, _unscaled(gradients, unscale), handles, unscale):
            if self.means and average is self.factors:
                product = product.abs_().mean(dim=self.entries_dim)
            _update(average, product, present, beta1=beta1, beta2=beta2, weights=weights)

    def start(self, handles: list[TripletHandle]) -> None:
        """Averages of zero for the layers that `members` counts."""
        self.handles = handles
        self._plain = all(h.is_matrix for h in handles)
        factor = self._view(handles[0], self._parameter(handles[0]))
        stack = factor.expand(len(handles), -1, -1)
        self.factors = SmoothedImportance.zeros_like(stack.select(self.entries_dim, 0) if self.means else stack)

    def factor_scores(self, kind: str | Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Mean over its entries of the score of every triplet's P or Q, [k, r]."""
        scores = self.factors.score(kind)
        return scores if self.means else scores.mean(dim=self.entries_dim)

    @abstractmethod
    def _parameter(self, handle: TripletHandle) -> torch.nn.Parameter:
        """P or Q of a layer."""

    @abstractmethod
    def _view(self, handle: TripletHandle, tensor: Tensor) -> Tensor:
        """What is shaped like that parameter, as a matrix."""

    @abstractmethod
    def _products(
        self, factors: Tensor, gradients: Tensor, handles: list[TripletHandle], unscale: float
    ) -> list[tuple[SmoothedImportance, Tensor]]:
        """Weight times gradient for some of the layers, each with the averages that it goes into."""


class LeftAverages(_Averages):
    """P of all layers with one shape of P, [k, d_out, r], and with them the λ, [k, r]."""

    entries_dim = 1

    def start(self, handles: list[TripletHandle]) -> None:
        """Averages of zero for the layers that `members` counts."""
        super().start(handles)
        sensitivity = self.factors.sensitivity
        self.weights = SmoothedImportance.zeros_like(sensitivity if self.means else sensitivity[:, 0])

    def _parameter(self, handle: TripletHandle) -> torch.nn.Parameter:
        return handle.P_parameter

    def _view(self, handle: TripletHandle, tensor: Tensor) -> Tensor:
        return handle.as_P(tensor)

    def _products(
        self, factors: Tensor, gradients: Tensor, handles: list[TripletHandle], unscale: float
    ) -> list[tuple[SmoothedImportance, Tensor]]:
        product, totals = left_products(factors, gradients)
        if handles[0].lambda_parameter is not None:
            totals = _unscaled(torch.stack([_lambda_product(h) for h in handles]), unscale)
        return [(self.factors, product), (self.weights, totals)]


class RightAverages(_Averages):
    """Q of all layers with one shape of Q, [k, r, groups · d_in]."""

    entries_dim = 2

    def _parameter(self, handle: TripletHandle) -> torch.nn.Parameter:
        return handle.Q_parameter

    def _view(self, handle: TripletHandle, tensor: Tensor) -> Tensor:
        return handle.as_Q(tensor)

    def _products(
        self, factors: Tensor, gradients: Tensor, handles: list[TripletHandle], unscale: float
    ) -> list[tuple[SmoothedImportance, Tensor]]:
        return [(self.factors, right_products(factors, gradients))]


def _unscaled(gradient: Tensor, factor: float) -> Tensor:
    return gradient if factor == 1 else gradient.float() * factor


def _lambda_product(h: TripletHandle) -> Tensor:
    """λ·∂L/∂λ of a layer with a λ of its own, [r], fp32: summed over groups, as for one factor on them all."""
    weights = h.lambda_parameter
    assert weights is not None
    if weights.grad is None:
        return torch.zeros(h.rank, device=weights.device)
    return h.by_group(weights.detach().float() * weights.grad.float()).sum(dim=0)


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
