"""`AdaLoraConfig`: every setting of the method, validated and immutable."""

from __future__ import annotations

import difflib
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from adalora.errors import ConfigError

Importance: TypeAlias = Literal[
    "sensitivity_uncertainty",
    "ratio",
    "sensitivity",
    "magnitude",
    "lambda_sensitivity",
    "random",
]
Schedule: TypeAlias = Literal["cubic", "linear", "step", "constant"]
Orthogonality: TypeAlias = Literal["decoupled", "off"]
Span: TypeAlias = int | float

BUDGET_FIELDS = ("target_rank", "total_rank")
DEFAULT_TARGET_RANK = 8


class AdaLoraConfig(BaseModel):
    """Settings of one adaptive adapter. Steps are optimizer steps, counted from 0.

    A span (`warmup`, `final`, `allocation_interval`) is a fraction of the run when it is a float below 1
    and a number of steps when it is an integer.

    Attributes:
        target_rank: Budget as the average rank per module at the end. The budget unless another is given.
        total_rank: Budget as the number of triplets in the whole model.
        min_rank: No module keeps fewer triplets than this.
        max_rank: No module keeps more triplets than this once the budget has reached its target.
        warmup: Span at full rank before the budget shrinks (t_i).
        final: Span at the target budget (t_f).
        allocation_interval: Span between two allocations while the budget shrinks (ΔT).
        schedule: Shape of the decrease (Eq. 14 is `"cubic"`), or an exponent; `"step"` drops at the middle of
            the decrease; `"constant"` never allocates (SVD-LoRA).
        importance: The triplet score (Eq. 9-13 is `"sensitivity_uncertainty"`).
        sensitivity_beta: Smoothing of the sensitivity (β1 of Eq. 10).
        uncertainty_beta: Smoothing of the uncertainty (β2 of Eq. 11).
        handover: At the end of warm-up, up to which the adapter trains exactly as LoRA does, turn every P·Q
            to its exact singular vectors.
        scale: α/r with r the target rank (`"target"`: each triplet moves like one of a LoRA of that rank) or the
            initial rank (`"initial"`: what LoraConfig says). An adapter that is trained already keeps its scale.
        orthogonality: `"decoupled"`: R(P, Q) of Eq. 4 acts once per optimizer step, apart from the loss, like
            decoupled weight decay; `"off"`.
        orthogonality_weight: γ of Eq. 4.
        revival: Pruned triplets may return while the budget shrinks, as in the paper.
        compact: Remove pruned triplets physically when the budget has reached its target.
        compact_at: Remove them earlier too, at these fractions of the decrease, e.g. `(0.5, 0.75)`: what is removed
            cannot return. None: once, at its end.
        nested: In the final phase, leave out a random tail of the triplets' order at half of the steps, so that the
            adapter can be cut to smaller budgets afterwards. It costs quality at the full budget.
        seed: Of importance `"random"` and of `nested`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    target_rank: float | None = None
    total_rank: int | None = None
    min_rank: int = Field(default=0, ge=0)
    max_rank: int | None = Field(default=None, ge=1)
    warmup: Span = 0.12
    final: Span = 0.48
    allocation_interval: Span = 0.01
    schedule: Schedule | float = "cubic"
    importance: Importance = "sensitivity_uncertainty"
    sensitivity_beta: float = Field(default=0.85, gt=0, lt=1)
    uncertainty_beta: float = Field(default=0.85, gt=0, lt=1)
    handover: bool = True
    scale: Literal["target", "initial"] = "target"
    orthogonality: Orthogonality = "decoupled"
    orthogonality_weight: float = Field(default=0.1, ge=0)
    revival: bool = True
    compact: bool = True
    compact_at: tuple[float, ...] | None = None
    nested: bool = False
    seed: int = 0

    def __init__(self, **fields: Any) -> None:
        unknown = [name for name in fields if name not in type(self).model_fields]
        if unknown:
            raise ConfigError(_unknown_field(unknown[0], list(type(self).model_fields)))
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(_describe(error)) from error

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name not in ("handover", "revival", "compact", "nested"):
            raise ValueError("is true or false where a number or a name is wanted")
        return value

    @field_validator("warmup", "final", "allocation_interval")
    @classmethod
    def _span(cls, value: Span) -> Span:
        if value < 0:
            raise ValueError("is a fraction of the run (0.0 to 1.0) or a number of optimizer steps, not negative")
        if isinstance(value, float):
            if value >= 1 and value.is_integer():
                return int(value)
            if value > 1:
                raise ValueError(f"is a fraction of at most 1.0 or a whole number of steps, e.g. {round(value)}")
        return value

    @field_validator("compact_at")
    @classmethod
    def _stages(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and (not value or any(not 0 < f <= 1 for f in value)):
            raise ValueError("is a list of fractions of the decrease, above 0 and at most 1, e.g. (0.5, 0.75)")
        return value

    @field_validator("schedule")
    @classmethod
    def _power(cls, value: str | float) -> str | float:
        if not isinstance(value, str) and value <= 0:
            raise ValueError("as a number is the exponent of the decrease and must be above 0; cubic is 3.0")
        return value

    @model_validator(mode="after")
    def _together(self) -> AdaLoraConfig:
        given = [name for name in BUDGET_FIELDS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one budget, not {' and '.join(given)}: keep {given[0]}={getattr(self, given[0])!r}")
        if not given:
            object.__setattr__(self, "target_rank", float(DEFAULT_TARGET_RANK))
        for name in BUDGET_FIELDS:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be above 0")
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise ValueError(f"max_rank={self.max_rank} is below min_rank={self.min_rank}")
        if isinstance(self.warmup, float) and isinstance(self.final, float) and self.warmup + self.final > 1:
            raise ValueError(f"warmup={self.warmup} and final={self.final} are together more than the run (1.0)")
        self._refuse_without_effect()
        return self

    def _refuse_without_effect(self) -> None:
        """An option that changes nothing in this combination is a mistake of the user's: say so."""
        given = self.model_fields_set
        if self.compact_at is not None and not self.compact:
            raise ValueError("compact_at has no effect with compact=False: leave one of them out")
        if self.orthogonality == "off" and "orthogonality_weight" in given and self.orthogonality_weight:
            raise ValueError('orthogonality_weight has no effect with orthogonality="off": leave it out')
        if self.nested and not self.compact:
            raise ValueError("nested=True needs compact=True: the order is that of the triplets that stay")
        if self.schedule == "constant":
            for name in (
                "importance",
                "min_rank",
                "max_rank",
                "allocation_interval",
                "revival",
                "nested",
                "budget_scope",
                "compact_at",
            ):
                if name in given:
                    raise ValueError(f'{name} has no effect with schedule="constant" (no allocation): leave it out')

    def to_dict(self) -> dict[str, Any]:
        """The fields that were given, JSON-ready; `AdaLoraConfig(**config.to_dict())` equals the original."""
        return self.model_dump(mode="json", exclude_unset=True)


def _unknown_field(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(known)}"
    return f"AdaLoraConfig has no field {name!r}: {hint}"


def _describe(error: ValidationError) -> str:
    """One part per wrong field: field, value, what is allowed. A union's branches are joined by "or"."""
    wrong: dict[str, tuple[Any, list[str]]] = {}
    for problem in error.errors():
        field = str(problem["loc"][0]) if problem["loc"] else ""
        wrong.setdefault(field, (problem["input"], []))[1].append(problem["msg"].removeprefix("Value error, "))
    return "; ".join(
        f"{field}={value!r}: {' or '.join(messages)}" if field else messages[0]
        for field, (value, messages) in wrong.items()
    )
