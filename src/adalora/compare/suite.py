"""A suite: which methods are compared on which recipes, with which learning rates, seeds and budgets."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from adalora.compare.methods import METHODS
from adalora.tasks.recipe.fields import Recipe
from adalora.tasks.recipe.files import load_recipe
from adalora.tasks.recipe.problems import suggest


class Rate(NamedTuple):
    """A point of a grid: the peak learning rate, and the new head's where it has one of its own."""

    learning_rate: float
    head: float | None = None

    @classmethod
    def of(cls, row: dict[str, Any]) -> Rate:
        """That of a row of results."""
        return cls(row["learning_rate"], row.get("head_learning_rate"))

    @property
    def fields(self) -> dict[str, float]:
        """As rows of results and a recipe's training have it."""
        found = {"learning_rate": self.learning_rate, "head_learning_rate": self.head}
        return {name: rate for name, rate in found.items() if rate is not None}

    def __str__(self) -> str:
        return f"{self.learning_rate:g}" + ("" if self.head is None else f", head {self.head:g}")


def _above_0(rate: float) -> float:
    if not rate > 0:
        raise ValueError(f"{rate} must be above 0")
    return rate


PositiveRate: TypeAlias = Annotated[float, AfterValidator(_above_0)]


class Part(BaseModel):
    """Base of a suite's parts: immutable, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskPart(Part):
    """One task of a suite.

    Attributes:
        recipe: Name or file of a recipe; it brings model, data and task.
        name: Short name in tables; by default the recipe's.
        set: Overrides of the recipe, `{training.batch_size: 8}`.
        steps: Optimizer steps of every method; by default the suite's.
        budgets: Target ranks for this task; by default the suite's.
        learning_rates: The grid for this task; by default the suite's.
        head_learning_rates: What `training.head_learning_rate` is tried with, each beside each learning rate; null is
            the adapter's. By default the recipe's alone.
        metric: What counts; by default the task's main metric.
        higher_is_better: Whether a higher value of it is better; by default by its name.
        seconds: Expected seconds of one cell, for `--dry-run`, until cells have been measured.
    """

    recipe: str = Field(min_length=1)
    name: str | None = None
    set: dict[str, Any] = {}
    steps: int | None = Field(default=None, ge=1)
    budgets: list[int] | None = Field(default=None, min_length=1)
    learning_rates: list[PositiveRate] | None = Field(default=None, min_length=1)
    head_learning_rates: list[PositiveRate | None] | None = Field(default=None, min_length=1)
    metric: str | None = None
    higher_is_better: bool | None = None
    seconds: float | None = Field(default=None, gt=0)


class MethodPart(Part):
    """One method of a suite: one of the known ones, or a variation of it.

    Attributes:
        name: In tables.
        base: The known method that it varies; by default the one of this name.
        adalora: Fields of `AdaLoraConfig` to change; only for methods of this package.
        lora: Fields of `LoraConfig` to change.
        start: Initial rank, as a multiple of the target rank; only for methods that allocate.
        learning_rates: A grid of its own.
        head_learning_rates: A grid of its own for the new head.
        rate_of: The method whose picked learning rates it takes, untuned itself.
    """

    name: str = Field(min_length=1)
    base: str = ""
    adalora: dict[str, Any] = {}
    lora: dict[str, Any] = {}
    start: float | None = Field(default=None, ge=1)
    learning_rates: list[PositiveRate] | None = Field(default=None, min_length=1)
    head_learning_rates: list[PositiveRate | None] | None = Field(default=None, min_length=1)
    rate_of: str | None = None

    @model_validator(mode="after")
    def _known(self) -> MethodPart:
        for grid in ("learning_rates", "head_learning_rates"):
            if self.rate_of is not None and getattr(self, grid) is not None:
                raise ValueError(f"method {self.name!r}: {grid} has no effect beside rate_of; leave one of them out")
        if self.kind not in METHODS:
            raise ValueError(suggest(self.kind, METHODS, "methods"))
        if self.adalora and not METHODS[self.kind].adaptive:
            allowed = [name for name, method in METHODS.items() if method.adaptive]
            raise ValueError(f"method {self.name!r}: adalora fields need base: {', '.join(allowed)}")
        if self.start is not None and not METHODS[self.kind].allocates:
            allowed = [name for name, method in METHODS.items() if method.allocates]
            raise ValueError(f"method {self.name!r}: start={self.start:g} needs base: {', '.join(allowed)}")
        if self.start is not None and "r" in self.lora:
            raise ValueError(f"method {self.name!r}: start and lora.r are the same; leave one of them out")
        return self

    @property
    def kind(self) -> str:
        """Name of the known method."""
        return self.base or self.name


class Suite(Part):
    """A comparison.

    Attributes:
        name: Short name; by default that of the file.
        description: One line.
        tasks: A plain text is a recipe.
        methods: A plain text is a known method.
        baseline: The method that others are measured against.
        learning_rates: The grid of every method.
        tuning_seeds: Seeds that the learning rate is picked with, on the dev split, by their mean.
        seeds: Seeds of the test cells; the same for every method, so that they can be paired.
        steps: Optimizer steps, unless a task has its own.
        start: Initial rank of the methods that allocate, as a multiple of the target rank, unless a method has its own;
            by default the method's.
        budgets: Budgets as target ranks: a method gets the parameters of a LoRA of that rank.
        equal: What allocated adapters have in common with a LoRA of the target rank: `parameters`, so that preferring
            large layers buys nothing, or `rank`, the number of triplets.
        alpha_per_rank: α divided by the target rank, the same for all LoRA-like methods; None: the recipe's α.
        evaluate_every: Steps between dev evaluations of a run, for learning curves; none by default.
        confidence: Of the intervals.
        output: Folder of results and report.
    """

    name: str = "suite"
    description: str = ""
    tasks: list[TaskPart] = Field(min_length=1)
    methods: list[MethodPart] = Field(min_length=1)
    baseline: str = "lora"
    learning_rates: list[PositiveRate] = Field(min_length=1)
    tuning_seeds: list[int] = Field(default=[0], min_length=1)
    seeds: list[int] = Field(default=[1, 2, 3, 4, 5], min_length=1)
    steps: int | None = Field(default=None, ge=1)
    start: float | None = Field(default=None, ge=1)
    budgets: list[int] = Field(default=[8], min_length=1)
    equal: Literal["parameters", "rank"] = "parameters"
    alpha_per_rank: float | None = Field(default=2.0, gt=0)
    evaluate_every: int | None = Field(default=None, ge=1)
    confidence: float = Field(default=0.95, gt=0, lt=1)
    output: str = Field(min_length=1)

    @field_validator("tasks", mode="before")
    @classmethod
    def _short_tasks(cls, value: Any) -> Any:
        return [{"recipe": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value

    @field_validator("methods", mode="before")
    @classmethod
    def _short_methods(cls, value: Any) -> Any:
        return [{"name": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        names = [method.name for method in self.methods]
        lists: list[tuple[str, list[Any]]] = [
            ("methods", names),
            ("seeds", self.seeds),
            ("tuning_seeds", self.tuning_seeds),
            ("learning_rates", self.learning_rates),
            ("budgets", self.budgets),
            ("tasks", [task_name(task) for task in self.tasks]),
            *[("head_learning_rates", task.head_learning_rates or []) for task in self.tasks],
            *[("head_learning_rates", method.head_learning_rates or []) for method in self.methods],
        ]
        for what, values in lists:
            twice = sorted({str(v) for v in values if values.count(v) > 1})
            if twice:
                raise ValueError(f"{what}: {', '.join(twice)} comes twice; give tasks and methods names of their own")
        tuned = [method.name for method in self.methods if method.rate_of is None]
        for method in self.methods:
            sized = METHODS[method.kind].budgeted
            allowed = [name for name in tuned if METHODS[self.method(name).kind].budgeted == sized]
            if method.rate_of is not None and method.rate_of not in allowed:
                wanted = ", ".join(allowed) or "none here"
                raise ValueError(f"method {method.name!r}: rate_of={method.rate_of!r}; methods to follow: {wanted}")
        if self.baseline not in names:
            raise ValueError(f"baseline={self.baseline!r} is not among methods: {', '.join(names)}")
        for task in self.tasks:
            if task.steps is None and self.steps is None:
                raise ValueError(f"tasks: {task_name(task)} needs steps, of its own or of the suite")
        return self

    _recipes: dict[str, Recipe] = PrivateAttr(default_factory=dict)  # by task: every cell asks for its own

    @cached_property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.output)

    def method(self, name: str) -> MethodPart:
        """The method of that name."""
        return next(method for method in self.methods if method.name == name)

    def rates(self, task: TaskPart, method: MethodPart) -> list[Rate]:
        """The grid that a method's learning rates are picked from, by itself or by the method that it follows."""
        chooser = method if method.rate_of is None else self.method(method.rate_of)
        rates = chooser.learning_rates or task.learning_rates or self.learning_rates
        heads = chooser.head_learning_rates or task.head_learning_rates
        heads = heads or [self.recipe(task).training.head_learning_rate]
        return [Rate(rate, head) for rate in rates for head in heads]

    def recipe(self, task: TaskPart) -> Recipe:
        """A task's recipe with its overrides, for the steps of the suite.

        Raises:
            RecipeError: No such recipe, or a field is wrong.
        """
        name = task_name(task)
        if name not in self._recipes:
            self._recipes[name] = self._read(task)
        return self._recipes[name]

    def _read(self, task: TaskPart) -> Recipe:
        import json

        changes = [f"{field}={json.dumps(value)}" for field, value in task.set.items()]
        changes.append(f"training.max_steps={task.steps or self.steps}")
        if self.evaluate_every is not None:
            changes.append(f"training.evaluate_every={self.evaluate_every}")
        return load_recipe(task.recipe, overrides=changes)


def task_name(task: TaskPart) -> str:
    """A task's name in tables."""
    return task.name or Path(task.recipe.replace(":", "-")).stem


Stage = Literal["dev", "test"]
