"""Running a suite: picks learning rates on dev, measures on test, writes results as they come."""

from __future__ import annotations

import io
import os
import platform
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from adalora.compare.cells import (
    RESULTS,
    Cell,
    Results,
    cells_of_rate,
    dev_cells,
    groups,
    pick_rate,
    picked_cells,
    sign,
    unknown_metric,
)
from adalora.compare.suite import Suite
from adalora.errors import AdaLoraError, OutOfMemory, TrainingError

PACKAGES = ("adalora", "torch", "peft", "transformers", "datasets", "scipy")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
Report = Callable[[Cell, dict[str, Any]], None]


def run_cell(cell: Cell) -> dict[str, Any]:
    """Train and measure one cell.

    Returns:
        The line for the results file: `status` is `ok`, `refused` (the method cannot do it; `error` says why),
        `diverged`, or `failed` (anything else; it is tried again at the next start).
    """
    started = time.monotonic()
    row: dict[str, Any] = {
        "key": cell.key,
        **{k: getattr(cell, k) for k in ("task", "budget", "method", "kind", "seed", "stage")},
        **cell.rate.fields,
    }
    try:
        row |= _train(cell)
    except OutOfMemory as error:  # of the machine, not of the method: tried again at the next start
        row |= {"status": "failed", "error": str(error)}
    except TrainingError as error:
        row |= {"status": "diverged", "error": str(error)}
    except AdaLoraError as error:
        row |= {"status": "refused", "error": str(error)}
    except Exception as error:  # one cell must not end a suite of hours
        row |= {"status": "failed", "error": repr(error), "traceback": traceback.format_exc(limit=-4)}
    finally:
        shutil.rmtree(cell.folder, ignore_errors=True)
    return {**row, "seconds": round(time.monotonic() - started, 2), "machine": machine(), "versions": versions()}


def _train(cell: Cell) -> dict[str, Any]:
    import math

    from rich.console import Console

    from adalora.compare.methods import MethodRun
    from adalora.tasks.recipe.fields import Recipe
    from adalora.tasks.runs.runner import RunHooks, run_recipe

    recipe = Recipe.parse(cell.recipe)
    rank = cell.budget or int(cell.recipe["lora"]["r"])
    method = MethodRun(cell.kind, rank=rank)
    hooks = RunHooks(
        build=method.build,
        callbacks=method.callbacks,
        split="validation" if cell.stage == "dev" else "test",
        keep_adapter=False,
    )
    result = run_recipe(recipe, overwrite=True, console=Console(file=io.StringIO()), hooks=hooks)
    metric = cell.metric or result.metrics["main_metric"]
    scores = result.metrics["scores"]
    if metric not in scores:
        raise unknown_metric(cell, scores)
    log = result.trainer.state.log_history
    row = {
        "status": "ok" if math.isfinite(scores[metric]) else "diverged",
        "metric": metric,
        "score": scores[metric],
        "scores": scores,
        "rows": result.metrics["evaluated_on"],
        "parameters": method.parameters(result.trainer.model),
        "training_seconds": next((entry["train_runtime"] for entry in log if "train_runtime" in entry), None),
        "steps": result.metrics["steps"],
        "loss_curve": [[entry["step"], entry["loss"]] for entry in log if "loss" in entry],
        "dev_curve": [[entry["step"], entry[f"eval_{metric}"]] for entry in log if f"eval_{metric}" in entry],
        **_allocated(result.trainer.model),
    }
    return {**row, "higher_is_better": sign({**row, "higher_is_better": cell.higher_is_better}) > 0}


def _allocated(model: Any) -> dict[str, Any]:
    """How steady the allocation was, of methods that this package runs."""
    from adalora import controllers

    controller = next(iter(controllers(model).values()), None)
    if controller is None:
        return {}
    rounds = controller.history.of("allocation")
    return {
        "allocations": len(rounds),
        "pruned": sum(r["pruned"] for r in rounds),
        "revived": sum(r["revived"] for r in rounds),
        "ranks": controller.ranks,
    }


def run_suite(suite: Suite, *, processes: int = 1, report: Report | None = None) -> Results:
    """Run every cell that has no outcome yet.

    Args:
        suite: What to run. Tasks come one after the other, each with its dev cells before its test cells.
        processes: Workers that share the cores; each computes with cores // processes threads.
        report: Called after each cell.
    """
    results = Results(suite.folder / RESULTS)
    tell = report or (lambda cell, row: None)
    with _executor(processes) as run:
        for task in suite.tasks:
            mine = [group for group in groups(suite) if group[0] is task]
            first = [cell for group in mine for cell in dev_cells(suite, *group)]
            _run_missing(first, run, results, tell)
            second = [cell for group in mine for cell in picked_cells(suite, *group, results=results)]
            _run_missing(second, run, results, tell)
    return results


def planned(suite: Suite, results: Results) -> list[tuple[Cell, bool, float | None]]:
    """Every cell, whether it is done, and its expected seconds where anything is known.

    Where the learning rate is not picked yet, the middle of the grid stands for it.
    """
    plan = []
    for task, budget, method in groups(suite):
        rate = pick_rate(suite, task, budget, method, results=results)
        rates = sorted(suite.rates(task, method), key=lambda each: each.learning_rate)
        cells = dev_cells(suite, task, budget, method)
        cells += cells_of_rate(suite, task, budget, method, rate=rate or rates[len(rates) // 2])
        for cell in cells:
            plan.append((cell, results.done(cell), expected_seconds(cell, results) or task.seconds))
    return plan


def expected_seconds(cell: Cell, results: Results) -> float | None:
    """Mean seconds of finished cells of this task and method, or of this task."""
    rows = [row for row in results.rows.values() if row["status"] == "ok" and row["task"] == cell.task]
    same = [row for row in rows if row["method"] == cell.method]
    chosen = [row["seconds"] for row in same or rows]
    return sum(chosen) / len(chosen) if chosen else None


def _run_missing(cells: list[Cell], run: Any, results: Results, report: Report) -> None:
    missing = {cell.key: cell for cell in cells if not results.done(cell)}
    for cell, row in run(list(missing.values())):
        results.add(row)
        report(cell, row)


@contextmanager
def _executor(processes: int) -> Iterator[Any]:
    """A function from cells to finished cells with their rows, in the order in which they finish."""
    if processes == 1:
        yield lambda cells: ((cell, run_cell(cell)) for cell in cells)
        return
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, threads))  # read by the workers when they start
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=quiet)
    try:

        def run(cells: list[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
            running = {pool.submit(run_cell, cell): cell for cell in cells}
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()

        yield run
    finally:
        pool.shutdown(cancel_futures=True)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def quiet() -> None:
    """Leave out other libraries' bars, reports of new heads and notes to developers."""
    import warnings

    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging  # its functions have no types
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(peft|transformers|torch)\b")


def machine() -> str:
    """Kind of processor, number of cores, accelerator."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {device}"


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result, and the commit of a source checkout."""
    found = {name: version(name) for name in PACKAGES}
    commit = _commit()
    return {**found, "commit": commit} if commit else found


def _commit() -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
