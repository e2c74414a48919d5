"""Cells of a suite: task × budget × method × learning rate × seed, and what has been measured of them."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adalora.compare.methods import METHODS, configure
from adalora.compare.suite import MethodPart, Rate, Stage, Suite, TaskPart, task_name
from adalora.config import AdaLoraConfig
from adalora.errors import DataError
from adalora.tasks.recipe.fields import Recipe

RESULTS = "results.jsonl"
LOWER_IS_BETTER = ("loss", "nll", "perplexity", "wer", "cer", "mse")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run.

    Attributes:
        task: Its name in the suite.
        budget: Target rank; 0 for methods without a size.
        method: Its name in the suite.
        kind: Its name in `METHODS`.
        rate: Peak learning rates.
        seed: Of everything.
        stage: `dev` picks the learning rate, `test` measures.
        recipe: The recipe to run, as plain data.
        metric: What counts; None for the task's main metric.
        higher_is_better: None: by the metric's name.
        folder: Working folder of the run.
    """

    task: str
    budget: int
    method: str
    kind: str
    rate: Rate
    seed: int
    stage: Stage
    recipe: dict[str, Any]
    metric: str | None
    higher_is_better: bool | None
    folder: str

    @property
    def key(self) -> str:
        """Names the cell by everything that decides its outcome."""
        fields = asdict(self) | {"learning_rate": self.rate.learning_rate}  # that of the head is in the recipe
        for incidental in ("rate", "folder", "higher_is_better", "task", "method", "metric"):
            fields.pop(incidental)
        for incidental in ("output", "name", "description", "published"):
            fields["recipe"].pop(incidental, None)
        if fields["recipe"].get("adalora"):  # defaults decide as well: another version of this package may have others
            fields["recipe"]["adalora"] = AdaLoraConfig(**fields["recipe"]["adalora"]).model_dump()
        text = json.dumps(fields, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """For people."""
        size = f" r{self.budget}" if self.budget else ""
        return f"{self.task}{size} {self.method} lr {self.rate} seed {self.seed} {self.stage}"


class Results:
    """The results file: one JSON object per line, only ever appended to.

    Args:
        path: A last line that a crash has torn is left out, and its cell runs again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        self._torn = False
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8")
        self._torn = bool(text) and not text.endswith("\n")
        lines = text.split("\n")
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                self.rows[row["key"]] = row
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                if number == len(lines) - 1 or self._is_torn_tail(lines, number):
                    continue
                raise DataError(f"{path}:{number + 1}: not a result of adalora compare: {line[:60]!r}") from error

    def _is_torn_tail(self, lines: list[str], number: int) -> bool:
        """A torn line was closed by the next start: it does not end in a brace."""
        return not lines[number].endswith("}")

    def add(self, row: dict[str, Any]) -> None:
        """Append one result in a single write, and flush it to the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = ("\n" if self._torn else "") + json.dumps(row, default=str) + "\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
            os.fsync(handle)
        finally:
            os.close(handle)
        self._torn = False
        self.rows[row["key"]] = row

    def done(self, cell: Cell) -> bool:
        """The cell has an outcome: a score, a refusal, or divergence. What merely failed is tried again."""
        return self.rows.get(cell.key, {}).get("status") in ("ok", "refused", "diverged")

    def of(self, cells: Iterable[Cell]) -> list[dict[str, Any]]:
        """Rows of those cells that have one, under the names that the suite gives them now, by what counts in it now.

        Raises:
            DataError: The cell was run before the suite counted its metric, which was not measured.
        """
        return [
            _counted(self.rows[cell.key] | {"task": cell.task, "method": cell.method, "budget": cell.budget}, cell)
            for cell in cells
            if cell.key in self.rows
        ]


def _counted(row: dict[str, Any], cell: Cell) -> dict[str, Any]:
    """A row by the metric of the suite, where another one counted when it was made: what was run is the same."""
    if cell.metric in (None, row.get("metric")) or row["status"] != "ok":
        return row
    if cell.metric not in row["scores"]:
        raise unknown_metric(cell, row["scores"])
    return row | {"metric": cell.metric, "score": row["scores"][cell.metric], "dev_curve": []}


def unknown_metric(cell: Cell, scores: Iterable[str]) -> DataError:
    """What to raise where a task has no such metric."""
    return DataError(f"tasks.metric={cell.metric!r}: {cell.task} has {', '.join(scores)}")


def groups(suite: Suite) -> list[tuple[TaskPart, int, MethodPart]]:
    """Task, budget and method of every comparison; methods without a size come once, with budget 0."""
    found = []
    for task in suite.tasks:
        for number, budget in enumerate(task.budgets or suite.budgets):
            for method in suite.methods:
                if METHODS[method.kind].budgeted:
                    found.append((task, budget, method))
                elif number == 0:
                    found.append((task, 0, method))
    return found


def dev_cells(suite: Suite, task: TaskPart, budget: int, method: MethodPart) -> list[Cell]:
    """The cells that pick a learning rate; none where there is nothing to pick."""
    rates = suite.rates(task, method)
    if len(rates) == 1 or method.rate_of is not None:
        return []
    pairs = [(rate, seed) for rate in rates for seed in suite.tuning_seeds]
    return [make_cell(suite, task, budget, method, rate=rate, seed=seed, stage="dev") for rate, seed in pairs]


def cells_of_rate(suite: Suite, task: TaskPart, budget: int, method: MethodPart, *, rate: Rate) -> list[Cell]:
    """The cells that touch the test split, once per seed."""
    return [make_cell(suite, task, budget, method, rate=rate, seed=seed, stage="test") for seed in suite.seeds]


def picked_cells(suite: Suite, task: TaskPart, budget: int, method: MethodPart, *, results: Results) -> list[Cell]:
    """The test cells at the learning rate that was picked; none while it is not."""
    rate = pick_rate(suite, task, budget, method, results=results)
    return [] if rate is None else cells_of_rate(suite, task, budget, method, rate=rate)


def pick_rate(suite: Suite, task: TaskPart, budget: int, method: MethodPart, *, results: Results) -> Rate | None:
    """The learning rates with the best mean dev score; None while dev cells are missing, or where none has a score."""
    rates = suite.rates(task, method)
    if len(rates) == 1:
        return rates[0]
    if method.rate_of is not None:
        return pick_rate(suite, task, budget, suite.method(method.rate_of), results=results)
    means: dict[Rate, float] = {}
    cells = dev_cells(suite, task, budget, method)
    for rate in rates:
        wanted = [cell for cell in cells if cell.rate == rate]
        if not all(results.done(cell) for cell in wanted):
            return None
        rows = results.of(wanted)
        if all(row["status"] == "ok" for row in rows):
            means[rate] = statistics.fmean(sign(row, task) * row["score"] for row in rows)
    return max(means, key=lambda rate: means[rate]) if means else None


def sign(row: dict[str, Any], task: TaskPart | None = None) -> int:
    """1 where a higher score is better, else -1."""
    given = task.higher_is_better if task is not None else row.get("higher_is_better")
    better = row["metric"] not in LOWER_IS_BETTER if given is None else given
    return 1 if better else -1


def make_cell(
    suite: Suite, task: TaskPart, budget: int, method: MethodPart, *, rate: Rate, seed: int, stage: Stage
) -> Cell:
    """One cell with its resolved recipe.

    Raises:
        RecipeError: The method's fields do not fit the recipe.
    """
    rank = budget or (task.budgets or suite.budgets)[0]
    alpha = None if suite.alpha_per_rank is None else suite.alpha_per_rank * rank
    recipe: Recipe = configure(
        suite.recipe(task),
        method.kind,
        rank=rank,
        alpha=alpha,
        lora=method.lora,
        adalora=method.adalora,
        start=method.start or suite.start,
        equal=suite.equal,
    )
    fields = recipe.to_dict()
    fields["training"].pop("head_learning_rate", None)
    fields["training"] |= {**rate.fields, "seed": seed}
    if recipe.adalora is not None and recipe.adalora.draws:
        fields["adalora"]["seed"] = seed
    name = f"{task_name(task)}-{budget}-{method.name}-{rate.learning_rate:g}-{rate.head or 0:g}-{seed}-{stage}"
    folder = suite.folder / "work" / name
    fields["output"] = str(folder)
    return Cell(
        task=task_name(task),
        budget=budget,
        method=method.name,
        kind=method.kind,
        rate=rate,
        seed=seed,
        stage=stage,
        recipe=fields,
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        folder=str(folder),
    )
