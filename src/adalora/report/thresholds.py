"""When a diagnostic speaks up."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from adalora.errors import ConfigError
from adalora.report.history import History

CODES = (
    "unstable-scores",
    "budget-too-low",
    "ranks-unbalanced",
    "orthogonality-not-reached",
    "slow-start",
    "final-phase-too-short",
    "no-gradient",
    "ranks-differ-between-seeds",
)


class DiagnosticThresholds(BaseModel):
    """Limits of all diagnostics; a finding is raised when its limit is passed.

    Attributes:
        ignore: Codes never to raise.
        min_steps: Shorter runs are not judged at all: too few losses and scores to tell anything.
        revived_share: Share of the live triplets that an allocation revived, mean over `allocations`.
        revivals: So many times the same triplet was revived ...
        revived_often: ... and such triplets are this share of the target budget.
        allocations: How many allocations in a row a condition is averaged over or must hold for.
        loss_rise: Loss after the budget reached its target against the lowest before, as a share of it.
        loss_errors: The same difference in standard errors: what noise alone does not reach.
        threshold_share: Threshold against the 95 % quantile of the scores: above it, what is pruned matters.
        recovery: Share of the final phase that the loss has to recover in.
        largest_share: Share of all triplets that one module holds ...
        largest_ratio: ... while being so many times an even share.
        zero_share: Share of modules at rank 0.
        min_modules: Balance is judged from this many modules on.
        orthogonality: Root mean square cosine between different left (or right) vectors of a module.
        update_ratio: ‖ΔW‖ / ‖W‖ of the median module at the end of warm-up.
        final_share: Length of the final phase as a share of the run.
        seed_correlation: Spearman correlation of the final ranks, mean over pairs of runs ...
        seed_shared: ... unless this share of the triplets sits in the same modules anyway (even ranks).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ignore: tuple[str, ...] = ()
    min_steps: int = Field(default=100, ge=1)
    revived_share: float = Field(default=0.1, gt=0, le=1)
    revivals: int = Field(default=4, ge=1)
    revived_often: float = Field(default=0.05, gt=0, le=1)
    allocations: int = Field(default=5, ge=1)
    loss_rise: float = Field(default=0.1, gt=0)
    loss_errors: float = Field(default=3.0, ge=0)
    threshold_share: float = Field(default=0.2, ge=0, le=1)
    recovery: float = Field(default=0.3, gt=0, lt=1)
    largest_share: float = Field(default=0.25, gt=0, le=1)
    largest_ratio: float = Field(default=3.0, ge=1)
    zero_share: float = Field(default=0.5, gt=0, le=1)
    min_modules: int = Field(default=4, ge=2)
    orthogonality: float = Field(default=0.4, gt=0, le=1)
    update_ratio: float = Field(default=1e-4, ge=0)
    final_share: float = Field(default=0.1, ge=0, lt=1)
    seed_correlation: float = Field(default=0.5, ge=-1, le=1)
    seed_shared: float = Field(default=0.9, gt=0, le=1)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(_describe(error, known=list(type(self).model_fields))) from error

    @field_validator("ignore")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [code for code in value if code not in CODES]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no diagnostic; known: {', '.join(CODES)}")
        return value


def recorded_thresholds(history: History) -> DiagnosticThresholds:
    """The limits that the run was watched with; the defaults where none were recorded."""
    record = history.last("thresholds") or {}
    known = DiagnosticThresholds.model_fields
    return DiagnosticThresholds(**{name: value for name, value in record.items() if name in known})


def _describe(error: ValidationError, *, known: list[str]) -> str:
    """One line per problem: field, value, what is allowed."""
    lines = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"DiagnosticThresholds has no field {field!r}; known fields: {', '.join(known)}")
        else:
            lines.append(f"{field}={problem['input']!r}: {problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(lines)
