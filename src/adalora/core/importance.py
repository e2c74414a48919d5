"""Weights and gradients -> smoothed sensitivity and uncertainty -> triplet scores (Eq. 9-13).

Tensors of equal shape are stacked, so that the number of operations does not grow with the number of
modules. Shape suffixes: k modules of one shape, o = d_out, i = d_in, r triplets.

All scores built on w·∂L/∂w are invariant under the rescaling P·c, λ/c: weight and gradient scale inversely.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SmoothedImportance:
    """Running averages for one stack of equally shaped tensors.

    Attributes:
        sensitivity: Ī of Eq. 10, fp32, same shape as the stack.
        uncertainty: Ū of Eq. 11, fp32, same shape.
    """

    sensitivity: Tensor
    uncertainty: Tensor

    @classmethod
    def zeros_like(cls, stack: Tensor) -> SmoothedImportance:
        """Fresh averages: zeros, fp32 whatever the type of `stack`."""
        return cls(
            torch.zeros_like(stack, dtype=torch.float32, memory_format=torch.contiguous_format),
            torch.zeros_like(stack, dtype=torch.float32, memory_format=torch.contiguous_format),
        )

    def update(
        self, product: Tensor, *, beta1: float, beta2: float, weights: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Eq. 10-12, in place. `product` is w·∂L/∂w (any sign), fp32, and is overwritten.

        Args:
            product: Of the averages' shape.
            beta1: β1 of Eq. 10.
            beta2: β2 of Eq. 11.
            weights: From `step_weights`, for a step of which the host does not know whether it is finite; None for a
                product known to be so.
        """
        importance = product.abs_()
        weight1, weight2 = weights or (1 - beta1, 1 - beta2)
        if weights is not None:
            importance.nan_to_num_(0.0, 0.0, 0.0)
        self.sensitivity.lerp_(importance, weight1)
        deviation = importance.sub_(self.sensitivity).abs_()
        self.uncertainty.lerp_(deviation, weight2)

    def score(self, kind: str | Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """S of Eq. 13 or its variants, elementwise.

        Args:
            kind: "sensitivity_uncertainty" (Ī·Ū), "ratio" (Ī/Ū), "sensitivity" (Ī), or a function of Ī and Ū.
        """
        if callable(kind):
            return kind(self.sensitivity, self.uncertainty)
        if kind == "sensitivity_uncertainty":
            return self.sensitivity * self.uncertainty
        if kind == "ratio":
            tiny = torch.finfo(torch.float32).tiny
            return self.sensitivity / self.uncertainty.clamp_min(tiny)
        return self.sensitivity.clone()


def step_weights(finite: Tensor, *, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """What one step adds to the averages: 1 - β1 and 1 - β2, or 0 where its gradients are not finite.

    One step with infinities or NaN would spoil the averages for ever. With weight 0 they stay as they are, bit by
    bit, and the host need not wait to learn whether the step counts.

    Args:
        finite: 0-dim bool, on the averages' device.
        beta1: β1 of Eq. 10.
        beta2: β2 of Eq. 11.
    """
    return finite * (1 - beta1), finite * (1 - beta2)


def left_products(P_kor: Tensor, grad_kor: Tensor) -> tuple[Tensor, Tensor]:
    """P·∂L/∂P and, summed over the rows, λ·∂L/∂λ.

    With ΔW = Σ P_i λ_i Q_i, ∂L/∂λ_i = (1/λ_i) Σ_j P_ji ∂L/∂P_ji, so λ_i·∂L/∂λ_i needs no λ in the graph.

    Returns:
        Products [k, o, r] and [k, r], fp32.
    """
    product_kor = P_kor.float() * grad_kor.float()
    return product_kor, product_kor.sum(dim=1)


def right_products(Q_kri: Tensor, grad_kri: Tensor) -> Tensor:
    """Q·∂L/∂Q, [k, r, i], fp32."""
    return Q_kri.float() * grad_kri.float()


def triplet_score(score_lambda_kr: Tensor, score_P_kor: Tensor, score_Q_kri: Tensor) -> Tensor:
    """S of Eq. 9: s(λ) + mean over rows of s(P) + mean over columns of s(Q); [k, r]."""
    return score_lambda_kr + score_P_kor.mean(dim=1) + score_Q_kri.mean(dim=2)
