"""Step -> budget and phase (Eq. 14)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from adalora.config import AdaLoraConfig
from adalora.errors import ConfigError

Phase: TypeAlias = Literal["warmup", "decrease", "final"]

POWERS = {"cubic": 3.0, "linear": 1.0}


@dataclass(frozen=True)
class BudgetSchedule:
    """The global budget b(t) of Eq. 14, in whatever unit the two budgets have.

    Attributes:
        initial_budget: b0, held for t < warmup_steps.
        target_budget: b_T, held for t >= decrease_end.
        warmup_steps: t_i, optimizer steps.
        decrease_end: T - t_f, the first step of the final phase.
        total_steps: T.
        interval: ΔT, steps between allocations.
        shape: "cubic", "linear", "step", "constant", or the exponent.
        released: The released code's arithmetic: allocations where ΔT divides the step's number, and b(t) rounded in
            floating point, one too low where Eq. 14 is a whole number that floating point lands below.
        curve: A registered schedule, instead of the shape's: part of the decrease that is done, 0 to 1, to the share
            of b0 - b_T that is left, 1 to 0. What is outside is cut to that.
    """

    initial_budget: int
    target_budget: int
    warmup_steps: int
    decrease_end: int
    total_steps: int
    interval: int
    shape: str | float
    released: bool = False
    curve: Callable[[float], float] | None = None

    def phase(self, step: int) -> Phase:
        """Phase of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return "warmup"
        return "decrease" if step < self.decrease_end else "final"

    def budget(self, step: int) -> int:
        """b(step): b0 up to the end of warm-up, b_T from `decrease_end` on. Only a registered curve may rise."""
        if self.shape == "constant" or step < self.warmup_steps:
            return self.initial_budget
        if step >= self.decrease_end:
            return self.target_budget
        done, length = step - self.warmup_steps, self.decrease_end - self.warmup_steps
        if self.curve is not None:
            left = min(1.0, max(0.0, self.curve(done / length)))
            return self.target_budget + math.floor((self.initial_budget - self.target_budget) * left)
        if self.shape == "step":
            return self.initial_budget if 2 * done < length else self.target_budget
        power: float = POWERS[self.shape] if isinstance(self.shape, str) else self.shape
        surplus = self.initial_budget - self.target_budget
        share: float = (1 - done / length) ** power
        if self.released:
            return int(surplus * share + self.target_budget)
        if float(power).is_integer() and power < 64:  # in whole numbers: no rounding below a whole b(t)
            exponent = int(power)
            whole: int = surplus * (length - done) ** exponent // length**exponent
            return self.target_budget + whole
        return self.target_budget + math.floor(surplus * share)

    def allocates(self, step: int) -> bool:
        """Whether an allocation follows optimizer step `step`: every ΔT of the decrease, and its end."""
        if self.shape == "constant" or step < self.warmup_steps or step > self.decrease_end:
            return False
        origin = 0 if self.released else self.warmup_steps
        return step == self.decrease_end or (step > self.warmup_steps and (step - origin) % self.interval == 0)

    def passes(self, step: int, fractions: Sequence[float]) -> bool:
        """Whether the allocation after `step` is the first at or after one of these fractions of the decrease."""
        length = self.decrease_end - self.warmup_steps
        if not fractions or step >= self.decrease_end:
            return False
        last, now = (step - self.interval - self.warmup_steps) / length, (step - self.warmup_steps) / length
        return any(last < fraction <= now for fraction in fractions)


def span_to_steps(span: int | float, total_steps: int) -> int:
    """A span of the config in optimizer steps: fractions (floats) are of `total_steps`, rounded."""
    return round(span * total_steps) if isinstance(span, float) else span


def plan_schedule(
    config: AdaLoraConfig, *, initial_budget: int, target_budget: int, total_steps: int
) -> BudgetSchedule:
    """The schedule of a run of `total_steps` optimizer steps.

    Raises:
        ConfigError: Not a positive number, or warm-up and final phase do not fit into it.
    """
    if total_steps < 1:
        raise ConfigError(f"total_steps={total_steps} must be at least 1: the number of optimizer steps of the run")
    warmup = span_to_steps(config.warmup, total_steps)
    decrease_end = total_steps - span_to_steps(config.final, total_steps)
    if decrease_end < warmup:
        raise ConfigError(
            f"warmup ({warmup} steps) and final ({total_steps - decrease_end} steps) are more than "
            f"total_steps={total_steps}; use fractions, e.g. warmup=0.12, final=0.48"
        )
    return BudgetSchedule(
        initial_budget=initial_budget,
        target_budget=target_budget,
        warmup_steps=warmup,
        decrease_end=min(decrease_end, total_steps - 1),
        total_steps=total_steps,
        interval=max(1, span_to_steps(config.allocation_interval, total_steps)),
        shape=config.schedule,
        released=config.released_schedule,
        curve=config.registered_schedule(),
    )
