"""`AdaLoraConfig`: every setting of the method, validated and immutable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from adalora import plugins
from adalora.config.messages import describe, read_amount, unknown_field
from adalora.config.presets import PAPER, RELEASED, with_preset
from adalora.config.rules import settle
from adalora.errors import ConfigError

Importance: TypeAlias = Literal[
    "sensitivity_uncertainty",
    "ratio",
    "sensitivity",
    "magnitude",
    "lambda_magnitude",
    "lambda_sensitivity",
    "random",
]
Schedule: TypeAlias = Literal["cubic", "linear", "step", "constant"]
Orthogonality: TypeAlias = Literal["decoupled", "squared", "released", "off"]
Span: TypeAlias = int | float
Limits: TypeAlias = dict[str, Annotated[int, Field(ge=0, strict=True)]]

SWITCHES = ("handover", "revival", "compact", "reorthonormalize", "released_schedule", "nested")
GRADIENT_SCORES = ("sensitivity_uncertainty", "ratio", "sensitivity", "lambda_sensitivity")


class AdaLoraConfig(BaseModel):
    """Settings of one adaptive adapter. Steps are optimizer steps, counted from 0.

    A span (`warmup`, `final`, `allocation_interval`) is a fraction of the run when it is a float below 1
    and a number of steps when it is an integer.

    Attributes:
        target_rank: Budget as the average rank per module at the end, as LoraConfig's `r` counts. The budget unless
            another is given.
        total_rank: Budget as the number of triplets in the whole model. Of a convolution with groups the k-th of all
            groups are one: its `r` is a multiple of the groups.
        total_parameters: Budget as the number of parameters the adapter trains at the end: `300_000` or `"0.3M"`.
        adapter_bytes: Budget as the size of the adapter's tensors in a file: `1_200_000`, `"1.2MB"` or `"1MiB"`.
        budget_cost: What a triplet takes of the budget: `"rank"`, 1 each, as in the paper; `"parameters"`,
            d_out + d_in (+ 1 with a λ of its own): the choice then has the highest total importance that the budget
            can buy. Budgets in parameters or bytes always count so.
        budget_scope: Who competes: all triplets of the model (`"global"`), those of one layer (`"layer"`), or of one
            kind of module (`"module_type"`). Each group gets its share of the budget.
        group_budgets: Budgets of single groups as average ranks at the end, e.g. `{"query": 2, "down_proj": 6}` with
            `budget_scope="module_type"`. Other groups share the rest; without a budget for the model each group needs
            one, and their sum is the budget.
        min_rank: No module gets a smaller rank than this: one number, or numbers by module name, e.g.
            `{"layer.0.*": 2}`. A name is the module's whole name or its end, with wildcards; the first one counts.
        max_rank: No module keeps a larger rank than this from the first allocation on; by name as well, e.g.
            `{"key": 0}`. Together the caps must leave as much as the budget has.
        warmup: Span at full rank before the budget shrinks (t_i).
        final: Span at the target budget (t_f).
        allocation_interval: Span between two allocations while the budget shrinks (ΔT).
        schedule: Shape of the decrease (Eq. 14 is `"cubic"`), or an exponent; `"step"` drops at the middle of
            the decrease; `"constant"` never allocates (SVD-LoRA) and has no phases. Or a name that a package has
            registered (`adalora.plugins`).
        released_schedule: Allocate at steps that ΔT divides, counted from the start of the run, and round b(t) in
            floating point, as the released code does: one triplet less where Eq. 14 is a whole number.
        importance: The triplet score (Eq. 9-13 is `"sensitivity_uncertainty"`). `"magnitude"` is |λ|·‖P‖·‖Q‖,
            `"sensitivity"` needs next to no memory. Or a name that a package has registered.
        sensitivity_beta: Smoothing of the sensitivity (β1 of Eq. 10).
        uncertainty_beta: Smoothing of the uncertainty (β2 of Eq. 11).
        score_gradient: The gradient in the score: what the optimizer got, the orthogonality term included
            (`"total"`), or the loss's alone (`"task"`).
        score_weights: The weights in the score: as the optimizer step left them (`"after"`) or found them
            (`"before"`).
        parametrization: `"lora"`: LoRA's own two factors, with λ as the length of P's columns; `"svd"`: P, λ and Q
            are trained as in Eq. 3, with λ a parameter of its own.
        initialization: How a new adapter starts with `"svd"`: `"orthonormal"` P and Q and λ = 0 (default), both
            `"gaussian"` with standard deviation 0.02 and λ = 0 (paper), or `"keep"`: LoRA's start, P = 0 and λ = 1.
        handover: At the end of warm-up, up to which the adapter trains as LoRA does (with the orthogonality term), turn
            every P·Q to its exact singular vectors. `"lora"` only.
        reorthonormalize: After each allocation turn P·Λ·Q to its exact singular vectors; the averages start anew.
        scale: s in ΔW = s·P·Λ·Q, r being the target and r₀ the initial rank. `"initial"` (default): α/r₀, what
            LoraConfig says; a step changes the layer's output as much as in a LoRA of the target rank. `"matched"`: a
            step is as long, ‖ΔW‖, as in such a LoRA: α/r divided by √(r₀/r), rounded to a whole number so that
            `lora_alpha` stays one; with `"svd"` whatever makes Adam's first step as long as LoRA's. `"target"`: α/r,
            each triplet moves like one of a LoRA of that rank (default with `"svd"`). `"released"`: α/(r₀ + 1e-5). Or
            a number. An adapter that is trained keeps its scale, and takes no other.
        pace: `"steady"` (default with `"lora"` and the initial scale): as the budget shrinks, the optimizer's steps of
            P become longer, up to r₀/r times, so that what is left trains as a LoRA of its rank with s = α/r does.
            `"fixed"`: a step changes a layer's output less as the budget shrinks.
        orthogonality: `"decoupled"`: R(P, Q) of Eq. 4 acts once per optimizer step, apart from the loss, like
            decoupled weight decay; on angles, and with a hundredth of γ on the lengths of Q's rows, until the final
            phase, where triplets are no longer compared (with `"svd"` on lengths as well, to the end); `"squared"`:
            γ·R is part of the objective, as in Eq. 4; `"released"`: γ times the mean of the unsquared norms, as in
            the released code; `"off"`.
        orthogonality_weight: γ of Eq. 4. The decoupled term takes deviations down by 8·lr·γ a step, and never by more
            than a quarter. With `"svd"` 0.1 by default, as in the paper: there lengths get all of it.
        revival: Pruned triplets may return while the budget shrinks, as in the paper.
        compact: Remove pruned triplets physically when the budget has reached its target.
        compact_at: Remove them earlier too, at these fractions of the decrease, e.g. `(0.5, 0.75)`: what is removed
            cannot return. None: once, at its end.
        nested: In the final phase, leave out a random tail of the triplets' order at half of the steps, so that the
            adapter can be cut to smaller budgets afterwards. It costs quality at the full budget.
        seed: Of importance `"random"`, of the initialization and of `nested`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    target_rank: float | None = None
    total_rank: int | None = None
    total_parameters: int | None = None
    adapter_bytes: int | None = None
    budget_cost: Literal["rank", "parameters"] = "rank"
    budget_scope: Literal["global", "layer", "module_type"] = "global"
    group_budgets: dict[str, Annotated[float, Field(ge=0, strict=True)]] | None = None
    min_rank: Annotated[int, Field(ge=0)] | Limits = 0
    max_rank: Annotated[int, Field(ge=1)] | Limits | None = None
    warmup: Span = 0.12
    final: Span = 0.48
    allocation_interval: Span = 0.01
    schedule: Schedule | float | str = "cubic"
    released_schedule: bool = False
    importance: Importance | str = "sensitivity_uncertainty"
    sensitivity_beta: float = Field(default=0.85, gt=0, lt=1)
    uncertainty_beta: float = Field(default=0.85, gt=0, lt=1)
    score_gradient: Literal["total", "task"] = "total"
    score_weights: Literal["after", "before"] = "after"
    parametrization: Literal["lora", "svd"] = "lora"
    initialization: Literal["keep", "orthonormal", "gaussian"] = "keep"
    handover: bool = True
    reorthonormalize: bool = False
    scale: Literal["target", "initial", "matched", "released"] | float = "initial"
    pace: Literal["steady", "fixed"] = "steady"
    orthogonality: Orthogonality = "decoupled"
    orthogonality_weight: float = Field(default=10.0, ge=0)
    revival: bool = True
    compact: bool = True
    compact_at: tuple[float, ...] | None = None
    nested: bool = False
    seed: int = 0

    def __init__(self, **fields: Any) -> None:
        unknown = [name for name in fields if name not in type(self).model_fields]
        if unknown:
            raise ConfigError(unknown_field(unknown[0], list(type(self).model_fields)))
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(describe(error)) from error

    @classmethod
    def given(cls, config: AdaLoraConfig | None, fields: dict[str, Any]) -> AdaLoraConfig:
        """The config of a call that takes one or its fields as keywords.

        Raises:
            ConfigError: Both are given, or a setting is wrong.
        """
        if config is not None and fields:
            raise ConfigError(f"give config or keywords, not both: config={config!r} and {', '.join(fields)}")
        return config or cls(**fields)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name not in SWITCHES:
            raise ValueError("is true or false where a number or a name is wanted")
        return value

    @field_validator("total_parameters", "adapter_bytes", mode="before")
    @classmethod
    def _amount(cls, value: Any, info: ValidationInfo) -> Any:
        return read_amount(value, of_bytes=info.field_name == "adapter_bytes") if isinstance(value, str) else value

    @field_validator("importance", "schedule")
    @classmethod
    def _ours_or_registered(cls, value: str | float, info: ValidationInfo) -> str | float:
        """A name of ours, or one that another package has registered."""
        score = info.field_name == "importance"
        ours = get_args(Importance if score else Schedule)
        if isinstance(value, str) and value not in ours:
            theirs = plugins.names("importance" if score else "schedules")
            if value not in theirs:
                allowed = [repr(name) for name in (*ours, *theirs)]
                raise ValueError(f"Input should be {', '.join(allowed[:-1])} or {allowed[-1]}")
        return value

    @field_validator("scale")
    @classmethod
    def _positive_scale(cls, value: str | float) -> str | float:
        if not isinstance(value, str) and value <= 0:
            raise ValueError("as a number is s in ΔW = s·P·Λ·Q and must be above 0")
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

    @field_validator("min_rank", "max_rank", "group_budgets")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if value == {}:
            raise ValueError('has no entry: give names with numbers, e.g. {"query": 2}, or leave it out')
        return value

    @field_validator("schedule")
    @classmethod
    def _power(cls, value: str | float) -> str | float:
        if not isinstance(value, str) and value <= 0:
            raise ValueError("as a number is the exponent of the decrease and must be above 0; cubic is 3.0")
        return value

    @model_validator(mode="after")
    def _together(self) -> AdaLoraConfig:
        settle(self)
        return self

    @property
    def draws(self) -> bool:
        """Whether anything is random: scores, a new adapter's vectors, or what nested training leaves out."""
        new = self.parametrization == "svd" and self.initialization != "keep"
        return self.nested or new or (self.importance == "random" and self.schedule != "constant")

    @classmethod
    def paper(cls, **fields: Any) -> AdaLoraConfig:
        """The paper to the letter: Eq. 3-14 with the objective of Eq. 4 and the scores of the step's own weights.

        Args:
            **fields: Fields to set or to change, e.g. `target_rank=2`.
        """
        return cls(**with_preset(PAPER, fields))

    @classmethod
    def released(cls, **fields: Any) -> AdaLoraConfig:
        """What PEFT's AdaLoRA and the authors' released code compute; `docs/method.md` has the field table.

        Args:
            **fields: Fields to set or to change, e.g. `target_rank=8, warmup=200, final=1000`.
        """
        return cls(**with_preset(RELEASED, fields))

    @property
    def needs_gradients(self) -> bool:
        """Whether the score is built on gradients' averages: magnitudes are not, registered scores are."""
        return self.importance in GRADIENT_SCORES or self.importance not in get_args(Importance)

    @property
    def needs_uncertainty(self) -> bool:
        """Whether a score that is built on gradients reads their uncertainty Ū too."""
        return self.importance not in ("sensitivity", "lambda_sensitivity")

    def registered_importance(self) -> Callable[..., Any] | None:
        """Another package's score function; None where the score is one of ours."""
        return None if self.importance in get_args(Importance) else plugins.load("importance", self.importance)

    def registered_schedule(self) -> Callable[..., Any] | None:
        """Another package's schedule function; None where the schedule is one of ours, or an exponent."""
        name = self.schedule
        return None if not isinstance(name, str) or name in get_args(Schedule) else plugins.load("schedules", name)

    def to_dict(self) -> dict[str, Any]:
        """The fields that were given, JSON-ready; `AdaLoraConfig(**config.to_dict())` equals the original."""
        return self.model_dump(mode="json", exclude_unset=True)
