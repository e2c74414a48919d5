"""The budget curve of a finished run: its adapter cut to many budgets, each measured."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from adalora.errors import AdapterFileError, DataError
from adalora.export.adapter import Adapter
from adalora.export.cleanup import clean
from adalora.export.compression import score_with, sensitivities, with_extras
from adalora.export.ordered import TripletOrder, cut_by, energy_order
from adalora.export.pruned import Pruned, read_pruned, revive
from adalora.export.reading import read_adapter
from adalora.report.figures.budget_curve import plot_curve
from adalora.report.history import History
from adalora.tasks.data.rows import Splits, load_splits
from adalora.tasks.kinds.base import Task, make_task
from adalora.tasks.recipe.fields import DataPart, Recipe
from adalora.tasks.recipe.files import load_recipe
from adalora.tasks.runs.models import load_checkpoint
from adalora.tasks.runs.outputs import ADAPTER, HISTORY, PRUNED, RECIPE, write_text
from adalora.tasks.runs.training import make_trainer

BUDGETS = tuple(n / 10 for n in range(1, 11))
ABOVE = (1.1, 1.2, 1.3, 1.4, 1.5)  # measured too where the run has kept what it pruned
ORDERS = ("score", "sensitivity", "energy")
BATCHES = 32  # training batches that sensitivities are measured on


@dataclass(frozen=True)
class CurvePoint:
    """One cut, or above 1 the whole adapter with pruned triplets added back.

    Attributes:
        budget: Share of the adapter's LoRA parameters.
        parameters: LoRA parameters.
        triplets: Triplets, with those added back.
        scores: The task's metrics.
        revived: Of the triplets, those added back.
    """

    budget: float
    parameters: int
    triplets: int
    scores: dict[str, float]
    revived: int = 0


@dataclass(frozen=True)
class Curve:
    """A measured curve.

    Attributes:
        order: The order of the triplets that the cuts follow.
        metric: The task's main metric.
        split: Rows that it was measured on.
        rows: How many.
        points: Smallest budget first.
        note: What else has to be known of the order.
    """

    order: TripletOrder
    metric: str
    split: str
    rows: int
    points: tuple[CurvePoint, ...]
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain data; `adalora export --curve` reads it."""
        points = [asdict(point) for point in self.points]
        head = {"metric": self.metric, "split": self.split, "rows": self.rows, "note": self.note, "points": points}
        return {**head, **self.order.to_json()}


def budget_curve(
    run: Path,
    *,
    data: str | None = None,
    split: str | None = None,
    order: str | None = None,
    budgets: Sequence[float] | None = None,
    progress: Callable[[CurvePoint], None] | None = None,
) -> Curve:
    """Cut a run's adapter to several budgets and measure each cut.

    Args:
        run: Folder of a finished run of `adalora train`.
        data: File with other rows to measure on, with the columns of the run's data.
        split: `validation`, `test` or `train` of the run's data; by default what the run was measured on.
        order: `score` (the run's own, from its last allocation), `sensitivity` (measured on training rows) or
            `energy`. By default `score` where the run has recorded it, else `energy`.
        budgets: Shares of the adapter's LoRA parameters; one that keeps no triplet is left out. Above 1 the best
            pruned triplets come back, as they were when they were pruned, until the run's `pruned.safetensors` is used
            up. By default 0.1 to 1, and to 1.5 where that file is.
        progress: Called with every point.

    Raises:
        AdapterFileError: The run is not finished, its adapter and the order do not fit, or budgets above 1 are wanted
            of a run that has not kept what it pruned.
        DataError: No such rows.
    """
    if data is not None and split is not None:
        raise DataError("give data or split, not both")
    if order is not None and order not in ORDERS:
        raise AdapterFileError(f"order {order!r}; allowed are {', '.join(ORDERS)}")
    if budgets is not None and not (budgets and all(0 < b < 10 for b in budgets)):
        raise AdapterFileError(f"budgets {list(budgets)}: shares above 0 are wanted, such as 0.5")
    if not (run / RECIPE).is_file() or not (run / ADAPTER).is_dir():
        raise AdapterFileError(f"{run} holds no finished run of adalora train (recipe.yaml and adapter/)")
    pruned = _pruned(run, budgets)
    recipe, adapter = load_recipe(run / RECIPE), read_adapter(run / ADAPTER)
    splits = load_splits(recipe)
    task = make_task(recipe, splits)
    processor = task.processor(str(run / ADAPTER))
    name, rows = _rows(recipe, splits, data=data, split=split)
    with tempfile.TemporaryDirectory() as work:
        trainer = _trainer(recipe, task, adapter, processor=processor, splits=splits, work=work)
        triplets, note = _order(run, adapter, order, trainer=trainer)
        points = []
        for budget, some in _adapters(adapter, triplets, pruned, budgets):
            scores = score_with(trainer.model, some, lambda _: task.evaluate(trainer, rows, processor))
            count = sum(some.ranks.values())
            revived = max(0, count - sum(adapter.ranks.values()))
            points.append(CurvePoint(budget, some.parameters, count, scores, revived))
            if progress is not None:
                progress(points[-1])
    return Curve(triplets, task.main_metric, name, len(rows), tuple(points), note)


def write_curve(curve: Curve, folder: Path) -> list[Path]:
    """Write `curve.json`, `curve.svg` and `curve.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"curve.{ending}" for ending in ("json", "svg", "png")]
    write_text(files[0], json.dumps(curve.to_json(), indent=1) + "\n")
    points = [(float(p.parameters), p.scores[curve.metric]) for p in curve.points]
    whole = max((p.parameters for p in curve.points if not p.revived), default=None)
    beyond = float(whole) if whole is not None and any(p.revived for p in curve.points) else None
    figure = plot_curve({curve.order.name: points}, metric=curve.metric, split=curve.split, whole=beyond)
    for file in files[1:]:
        figure.savefig(file, dpi=150)
    return files


def _pruned(run: Path, budgets: Sequence[float] | None) -> Pruned | None:
    file = run / PRUNED
    wanted = file.is_file() if budgets is None else any(b > 1 for b in budgets)
    return read_pruned(file) if wanted else None


def _adapters(
    adapter: Adapter, order: TripletOrder, pruned: Pruned | None, budgets: Sequence[float] | None
) -> Iterator[tuple[float, Adapter]]:
    """What is measured, smallest first: cuts, the whole, and the whole with pruned triplets."""
    least = min((f.d_out + f.d_in for f in adapter.factors.values()), default=0)
    largest = adapter.parameters
    for budget in sorted(set(budgets or (*BUDGETS, *ABOVE))):
        if budget > 1 and pruned is not None:
            more = revive(adapter, budget, pruned)
            if more.parameters > largest:  # else nothing is left to come back
                largest = more.parameters
                yield budget, more
        elif budget == 1 or (budget < 1 and budget * adapter.parameters >= least):  # else not one triplet fits
            yield budget, cut_by(adapter, budget, order).adapter


def recorded_order(history: History, adapter: Adapter) -> TripletOrder | None:
    """The run's own scores of the triplets that it kept, from its last allocation.

    None where there are none, or where they are of other triplets: the best checkpoint, which came back at the end, was
    written before them.
    """
    start, record = history.last("start"), history.last("allocation")
    found = (record or {}).get("triplet_scores")
    if start is None or found is None or any(value is None for values in found for value in values):
        return None
    if foreign_scores(history) is not None:
        return None
    scores = {m["name"]: torch.tensor(v, dtype=torch.float64) for m, v in zip(start["modules"], found)}
    if any(len(scores.get(name, ())) != f.rank for name, f in adapter.factors.items()):
        return None
    return TripletOrder("score", "saved", {name: scores[name] for name in adapter.factors})


def foreign_scores(history: History) -> str | None:
    """Why the last scores are not of the run's adapter, where `keep_best` has brought back an older one; else None."""
    restored, record = history.last("restored"), history.last("allocation")
    if restored is None or record is None or restored["of_step"] > record["step"]:
        return None
    return (
        f"the run kept the best checkpoint, {restored['checkpoint']}, and its last scores are of step "
        f"{record['step']}: they describe other triplets than the adapter has"
    )


def _order(run: Path, adapter: Adapter, order: str | None, *, trainer: Any) -> tuple[TripletOrder, str]:
    if order == "sensitivity":
        batches = list(itertools.islice(trainer.get_train_dataloader(), BATCHES))
        measured = sensitivities(trainer.model.eval(), clean(adapter), batches, trainer.compute_loss)
        return TripletOrder("sensitivity", "clean", measured), ""
    if order == "energy" or not (order or (run / HISTORY).is_file()):
        return energy_order(adapter), ""
    history = History.read(run / HISTORY) if (run / HISTORY).is_file() else History()
    recorded = recorded_order(history, adapter)
    if recorded is not None:
        return recorded, ""
    why = foreign_scores(history) or f"{run} has no scores of this adapter's triplets in its history"
    if order == "score":
        raise AdapterFileError(f"{why}; --order energy or --order sensitivity")
    return energy_order(adapter), f"cut by energy: {why}"


def _trainer(recipe: Recipe, task: Task, adapter: Adapter, *, processor: Any, splits: Splits, work: str) -> Any:
    """A Trainer that holds the base model with the run's trained head, and no LoRA."""
    model = with_extras(load_checkpoint(recipe.model, task, processor)[0], adapter)
    training = recipe.training.model_copy(update={"evaluate_every": None, "keep_best": False, "save_every": None})
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
