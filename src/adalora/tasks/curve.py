"""The budget curve of a finished run: its adapter cut to many budgets, each measured."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from adalora.errors import AdapterFileError, DataError
from adalora.export.adapter import Adapter
from adalora.export.cleanup import clean
from adalora.export.compression import score_with, sensitivities, with_extras
from adalora.export.ordered import TripletOrder, cut_by, energy_order
from adalora.export.reading import read_adapter
from adalora.report.curves import plot_curve
from adalora.report.history import History
from adalora.tasks.base import Task, make_task
from adalora.tasks.data import Splits, load_splits
from adalora.tasks.models import loading_arguments
from adalora.tasks.outputs import ADAPTER, HISTORY, RECIPE, write_text
from adalora.tasks.recipe import DataPart, Recipe
from adalora.tasks.recipe_files import load_recipe
from adalora.tasks.training import make_trainer

BUDGETS = tuple(n / 10 for n in range(1, 11))
ORDERS = ("score", "sensitivity", "energy")
BATCHES = 32  # training batches that sensitivities are measured on


@dataclass(frozen=True)
class CurvePoint:
    """One cut. `budget` is a share of the adapter's LoRA parameters."""

    budget: float
    parameters: int
    triplets: int
    scores: dict[str, float]


@dataclass(frozen=True)
class Curve:
    """A measured curve.

    Attributes:
        order: The order of the triplets that the cuts follow.
        metric: The task's main metric.
        split: Rows that it was measured on.
        rows: How many.
        points: Smallest budget first.
    """

    order: TripletOrder
    metric: str
    split: str
    rows: int
    points: tuple[CurvePoint, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain data; `adalora export --curve` reads it."""
        points = [asdict(point) for point in self.points]
        head = {"metric": self.metric, "split": self.split, "rows": self.rows, "points": points}
        return {**head, **self.order.to_json()}


def budget_curve(
    run: Path,
    *,
    data: str | None = None,
    split: str | None = None,
    order: str | None = None,
    budgets: Sequence[float] = BUDGETS,
    progress: Callable[[CurvePoint], None] | None = None,
) -> Curve:
    """Cut a run's adapter to several budgets and measure each cut.

    Args:
        run: Folder of a finished run of `adalora train`.
        data: File with other rows to measure on, with the columns of the run's data.
        split: `validation`, `test` or `train` of the run's data; by default what the run was measured on.
        order: `score` (the run's own, from its last allocation), `sensitivity` (measured on training rows) or
            `energy`. By default `score` where the run has recorded it, else `energy`.
        budgets: Shares of the adapter's LoRA parameters, above 0 and up to 1; one that keeps no triplet is left out.
        progress: Called with every point.

    Raises:
        AdapterFileError: The run is not finished, or its adapter and the order do not fit.
        DataError: No such rows.
    """
    if data is not None and split is not None:
        raise DataError("give data or split, not both")
    if order is not None and order not in ORDERS:
        raise AdapterFileError(f"order {order!r}; allowed are {', '.join(ORDERS)}")
    if not budgets or not all(0 < b <= 1 for b in budgets):
        raise AdapterFileError(f"budgets {list(budgets)}: shares above 0 and up to 1 are wanted")
    if not (run / RECIPE).is_file() or not (run / ADAPTER).is_dir():
        raise AdapterFileError(f"{run} holds no finished run of adalora train (recipe.yaml and adapter/)")
    recipe, adapter = load_recipe(run / RECIPE), read_adapter(run / ADAPTER)
    splits = load_splits(recipe)
    task = make_task(recipe, splits)
    processor = task.processor(str(run / ADAPTER))
    name, rows = _rows(recipe, splits, data=data, split=split)
    with tempfile.TemporaryDirectory() as work:
        trainer = _trainer(recipe, task, adapter, processor=processor, splits=splits, work=work)
        triplets = _order(run, adapter, order, trainer=trainer)
        points = []
        least = min((f.d_out + f.d_in for f in adapter.factors.values()), default=0)
        for budget in sorted(set(budgets)):
            if budget * adapter.parameters < least and budget < 1:
                continue  # not one triplet fits
            cut = cut_by(adapter, budget, triplets)
            scores = score_with(trainer.model, cut.adapter, lambda _: task.evaluate(trainer, rows, processor))
            points.append(CurvePoint(budget, cut.parameters_after, sum(cut.adapter.ranks.values()), scores))
            if progress is not None:
                progress(points[-1])
    return Curve(triplets, task.main_metric, name, len(rows), tuple(points))


def write_curve(curve: Curve, folder: Path) -> list[Path]:
    """Write `curve.json`, `curve.svg` and `curve.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"curve.{ending}" for ending in ("json", "svg", "png")]
    write_text(files[0], json.dumps(curve.to_json(), indent=1) + "\n")
    points = [(float(p.parameters), p.scores[curve.metric]) for p in curve.points]
    figure = plot_curve({curve.order.name: points}, metric=curve.metric, split=curve.split)
    for file in files[1:]:
        figure.savefig(file, dpi=150)
    return files


def recorded_order(history: History, adapter: Adapter) -> TripletOrder | None:
    """The run's own scores of the triplets that it kept, from its last allocation; None where there are none."""
    start, record = history.last("start"), history.last("allocation")
    found = (record or {}).get("triplet_scores")
    if start is None or found is None or any(value is None for values in found for value in values):
        return None
    scores = {m["name"]: torch.tensor(v, dtype=torch.float64) for m, v in zip(start["modules"], found)}
    if any(len(scores.get(name, ())) != f.rank for name, f in adapter.factors.items()):
        return None
    return TripletOrder("score", "saved", {name: scores[name] for name in adapter.factors})


def _order(run: Path, adapter: Adapter, order: str | None, *, trainer: Any) -> TripletOrder:
    if order == "sensitivity":
        batches = list(itertools.islice(trainer.get_train_dataloader(), BATCHES))
        measured = sensitivities(trainer.model.eval(), clean(adapter), batches, trainer.compute_loss)
        return TripletOrder("sensitivity", "clean", measured)
    file = run / HISTORY
    recorded = recorded_order(History.read(file), adapter) if order != "energy" and file.is_file() else None
    if order == "score" and recorded is None:
        raise AdapterFileError(
            f"{run} has no scores of this adapter's triplets in its history; --order energy or --order sensitivity"
        )
    return recorded or energy_order(adapter)


def _trainer(recipe: Recipe, task: Task, adapter: Adapter, *, processor: Any, splits: Splits, work: str) -> Any:
    """A Trainer that holds the base model with the run's trained head, and no LoRA."""
    part = recipe.model
    settings = {**task.head(processor), **part.config, **loading_arguments(part)}
    model = with_extras(task.auto_class.from_pretrained(part.resolve(), **settings), adapter)
    training = recipe.training.model_copy(update={"evaluate_every": None, "keep_best": False})
    quiet = recipe.model_copy(update={"output": work, "training": training})
    quiet.__dict__.pop("folder", None)  # it is cached by the recipe that was copied
    return make_trainer(quiet, task, model=model, processor=processor, splits=splits)


def _rows(recipe: Recipe, splits: Splits, *, data: str | None, split: str | None) -> tuple[str, Any]:
    if data is not None:
        kept = {name: getattr(recipe.data, name) for name in ("columns", "header", "delimiter", "format")}
        other = recipe.model_copy(update={"data": DataPart(files=data, **kept)})
        return Path(data).name, load_splits(other).train
    if split is None:
        return splits.measured
    rows = getattr(splits, split, None) if split in Splits._fields else None
    if rows is None:
        there = [name for name in Splits._fields if getattr(splits, name) is not None]
        raise DataError(f"split {split!r}: this run's data have {', '.join(there)}")
    return split, rows
