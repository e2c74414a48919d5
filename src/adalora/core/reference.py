"""Eq. 9-14 written down literally: one module, one triplet, one number at a time.

Slow on purpose and used by tests alone: plain Python numbers (float64), no stacking, no in-place updates, no
sharing of code with the fast path, which has to give the same averages, scores, budgets and masks. Who is kept where
modules have floors, caps and prices is in `adalora.core.reference_allocation`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal, localcontext
from fractions import Fraction

from torch import Tensor

SMALLEST = 2.0**-126  # the smallest normal number of float32, for a ratio without uncertainty


@dataclass
class Average:
    """Running averages of one number's importance.

    Attributes:
        sensitivity: Ī(w), 0 before the first step.
        uncertainty: Ū(w), 0 before the first step.
    """

    sensitivity: float = 0.0
    uncertainty: float = 0.0

    def update(self, weight_times_gradient: float, *, beta1: float, beta2: float) -> None:
        """Eq. 12, then 10, then 11; the deviation is from the average that holds the new value already."""
        importance = abs(weight_times_gradient)
        self.sensitivity = beta1 * self.sensitivity + (1 - beta1) * importance
        deviation = abs(importance - self.sensitivity)
        self.uncertainty = beta2 * self.uncertainty + (1 - beta2) * deviation

    def score(self, kind: str = "sensitivity_uncertainty") -> float:
        """Eq. 13: s(w) = Ī(w)·Ū(w); Ī/Ū for "ratio", Ī for "sensitivity" and "lambda_sensitivity"."""
        if kind == "ratio":
            return self.sensitivity / max(self.uncertainty, SMALLEST)
        if kind in ("sensitivity", "lambda_sensitivity"):
            return self.sensitivity
        return self.sensitivity * self.uncertainty


@dataclass
class ReferenceModule:
    """The triplets of one module and their averages.

    Attributes:
        d_out: Rows of P.
        d_in: Columns of Q.
        rank: Triplets.
        P: Averages of P[j][i], row j of triplet i.
        weights: Averages of λ[i].
        Q: Averages of Q[i][j], column j of triplet i.
    """

    d_out: int
    d_in: int
    rank: int
    P: list[list[Average]] = field(init=False)
    weights: list[Average] = field(init=False)
    Q: list[list[Average]] = field(init=False)

    def __post_init__(self) -> None:
        self.P = [[Average() for _ in range(self.rank)] for _ in range(self.d_out)]
        self.weights = [Average() for _ in range(self.rank)]
        self.Q = [[Average() for _ in range(self.d_in)] for _ in range(self.rank)]

    def observe(
        self,
        *,
        P: Tensor,
        grad_P: Tensor,
        Q: Tensor,
        grad_Q: Tensor,
        weights: Tensor | None = None,
        grad_weights: Tensor | None = None,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        """One optimizer step.

        Without a λ of its own λ is the length that P's column may be rescaled by: λ·∂L/∂λ = Σ_j P_ji·∂L/∂P_ji at
        any λ.

        Args:
            P: Factor after the step, [d_out, r], λ included where it has no value of its own.
            grad_P: Its gradient, the same shape.
            Q: Factor after the step, [r, d_in].
            grad_Q: Its gradient, the same shape.
            weights: λ, [r], where it is a parameter.
            grad_weights: Its gradient, [r].
            beta1: β1 of Eq. 10.
            beta2: β2 of Eq. 11.
        """
        p, dp, q, dq = P.tolist(), grad_P.tolist(), Q.tolist(), grad_Q.tolist()
        own = None if weights is None or grad_weights is None else (weights * grad_weights).tolist()
        for i in range(self.rank):
            total = 0.0
            for j in range(self.d_out):
                self.P[j][i].update(p[j][i] * dp[j][i], beta1=beta1, beta2=beta2)
                total += p[j][i] * dp[j][i]
            self.weights[i].update(total if own is None else own[i], beta1=beta1, beta2=beta2)
            for j in range(self.d_in):
                self.Q[i][j].update(q[i][j] * dq[i][j], beta1=beta1, beta2=beta2)

    def scores(self, kind: str = "sensitivity_uncertainty") -> list[float]:
        """Eq. 9: S_i = s(λ_i) + (1/d_out) Σ_j s(P_ji) + (1/d_in) Σ_j s(Q_ij), for every triplet i.

        Args:
            kind: As in `Average.score`; "lambda_sensitivity" is s(λ_i) alone.
        """
        result = []
        for i in range(self.rank):
            score = self.weights[i].score(kind)
            if kind != "lambda_sensitivity":
                score += sum(self.P[j][i].score(kind) for j in range(self.d_out)) / self.d_out
                score += sum(self.Q[i][j].score(kind) for j in range(self.d_in)) / self.d_in
            result.append(score)
        return result

    def remove(self, keep: Sequence[bool]) -> None:
        """Forget the triplets that are not kept; the averages of the others go on."""
        self.P = [[average for average, stays in zip(row, keep) if stays] for row in self.P]
        self.weights = [average for average, stays in zip(self.weights, keep) if stays]
        self.Q = [row for row, stays in zip(self.Q, keep) if stays]
        self.rank = sum(keep)


def reference_surplus(
    step: int,
    *,
    initial_budget: int,
    target_budget: int,
    warmup: int,
    final: int,
    total: int,
    shape: str | float = "cubic",
) -> Fraction:
    """b(t) - b_T before it is rounded down: exact, but for exponents that are no whole numbers (50 digits).

    Args:
        step: t, optimizer steps from 0.
        initial_budget: b0.
        target_budget: b_T.
        warmup: t_i, optimizer steps.
        final: t_f, optimizer steps.
        total: T.
        shape: "cubic" (Eq. 14), "linear", "step", "constant", or the exponent in place of Eq. 14's 3.
    """
    surplus = Fraction(initial_budget - target_budget)
    if step < warmup or shape == "constant":
        return surplus
    if step >= total - final:
        return Fraction(0)
    left = 1 - Fraction(step - warmup, total - warmup - final)
    if shape == "step":
        return surplus if left > Fraction(1, 2) else Fraction(0)
    if shape == "linear":
        return surplus * left
    exponent = Fraction(3) if isinstance(shape, str) else Fraction(shape)
    if exponent.denominator == 1:
        return surplus * left**exponent.numerator
    with localcontext(prec=50):
        power = Decimal(exponent.numerator) / Decimal(exponent.denominator)
        return surplus * Fraction((Decimal(left.numerator) / Decimal(left.denominator)) ** power)


def reference_budget(
    step: int,
    *,
    initial_budget: int,
    target_budget: int,
    warmup: int,
    final: int,
    total: int,
    shape: str | float = "cubic",
) -> int:
    """b(t) in whole triplets, rounded down; arguments as in `reference_surplus`."""
    surplus = reference_surplus(
        step,
        initial_budget=initial_budget,
        target_budget=target_budget,
        warmup=warmup,
        final=final,
        total=total,
        shape=shape,
    )
    return target_budget + math.floor(surplus)


def reference_keep(scores: Sequence[float], *, budget: int) -> list[bool]:
    """Eq. 5: a triplet is kept if fewer than `budget` others come before it.

    Of two triplets the one with the higher score comes first; of equal ones the one that stands first.
    """
    keep = []
    for i, mine in enumerate(scores):
        before = 0
        for j, other in enumerate(scores):
            if other > mine or (other == mine and j < i):
                before += 1
        keep.append(before < budget)
    return keep
