"""`run_recipe`: from a validated recipe to a trained adapter, its metrics, history and report."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console
from transformers import Trainer, set_seed

from adalora.errors import RecipeError, TrainingError
from adalora.integrations.trainer import AdaLoraCallback
from adalora.lora.checkpoint import latest_checkpoint
from adalora.report.history import History
from adalora.report.html import build_report
from adalora.tasks.base import make_task
from adalora.tasks.data import load_splits
from adalora.tasks.models import adapter_parameters, build_model, build_processor, trainable
from adalora.tasks.outputs import (
    ADAPTER,
    HISTORY,
    METRICS,
    RECIPE,
    REPORT,
    WORK,
    prepare_folder,
    save_adapter,
    write_text,
    written,
)
from adalora.tasks.progress import ProgressBar, ranks_of
from adalora.tasks.recipe import Recipe
from adalora.tasks.recipe_files import dump_recipe
from adalora.tasks.training import make_trainer

PACKAGES = ("adalora", "torch", "peft", "transformers", "datasets")


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: Where it was written.
        metrics: What `metrics.json` holds.
        trainer: The trainer, with the live model.
    """

    folder: Path
    metrics: dict[str, Any]
    trainer: Any

    @property
    def files(self) -> dict[str, str]:
        """What was written, for people."""
        return written(self.folder)


def run_recipe(
    recipe: Recipe, *, overwrite: bool = False, resume: bool = False, console: Console | None = None
) -> RunResult:
    """Train, evaluate and write everything to the recipe's output folder.

    Under a launcher (torchrun, accelerate) every process calls it; the first one writes.

    Raises:
        RecipeError: The folder holds a run already and `overwrite` is not set, or nothing that `resume` could go on
            from.
        DataError: The data cannot be read.
        TrainingError: Training has diverged, or memory is exhausted.
    """
    from accelerate import PartialState

    console = console or Console()
    datasets.disable_progress_bars()  # ours is the only bar
    started = time.monotonic()
    first = PartialState().is_main_process
    checkpoint = _interrupted(recipe.folder) if resume else None
    folder = prepare_folder(recipe.folder, overwrite=overwrite) if first and not resume else recipe.folder
    splits = load_splits(recipe)
    set_seed(recipe.training.seed)
    task = make_task(recipe, splits)
    processor = build_processor(recipe, task)
    model = build_model(recipe, task, processor)
    history = History(folder / HISTORY if first else None)
    adaptive = None
    if recipe.adalora is not None:
        adaptive = AdaLoraCallback(recipe.adalora, history=history, thresholds=recipe.diagnostics)
        adaptive.resume_hint = f"adalora train {folder / RECIPE} --resume"
    trainer = make_trainer(recipe, task, model=model, processor=processor, splits=splits)
    if first:
        write_text(folder / RECIPE, dump_recipe(recipe))
    before = trainable(model)
    _train(trainer, adaptive, console, checkpoint=checkpoint)
    split, rows = splits.measured
    scores = task.evaluate(trainer, rows, processor)
    metrics = {
        "name": recipe.name,
        "task": recipe.task.name,
        "evaluated_on": f"{len(rows):,} rows of the {split} split",
        **scores,
        "scores": scores,
        **(ranks_of(adaptive.controller) if adaptive is not None and adaptive.controller is not None else {}),
        "adapter_parameters": adapter_parameters(model),
        "trainable_parameters_before": before,
        "trainable_parameters_after": trainable(model),
        **({"published": recipe.published.model_dump()} if recipe.published is not None else {}),
        "steps": trainer.state.global_step,
        "seconds": round(time.monotonic() - started, 1),
        "versions": {name: version(name) for name in PACKAGES},
    }
    if first:
        history.add("metric", step=trainer.state.global_step - 1, split=split, values=scores)
        save_adapter(model, processor, folder / ADAPTER)
        write_text(folder / METRICS, json.dumps(metrics, indent=2) + "\n")
        if adaptive is not None:
            build_report(history, folder / REPORT, names=[recipe.name])
        shutil.rmtree(folder / WORK, ignore_errors=True)
    return RunResult(folder, metrics, trainer)


def _interrupted(folder: Path) -> str:
    """The newest whole checkpoint of a run that was stopped."""
    checkpoint = latest_checkpoint(folder / WORK)
    if checkpoint is None:
        raise RecipeError(
            f"output={str(folder)!r} has no checkpoint to go on from: train without --resume (a run writes one at "
            "Ctrl-C, and with training.keep_best at each evaluation)"
        )
    return checkpoint


def _train(
    trainer: Trainer, adaptive: AdaLoraCallback | None, console: Console, *, checkpoint: str | None = None
) -> None:
    bar = ProgressBar(console, adaptive)
    for callback in (adaptive, bar):
        if callback is not None:
            trainer.add_callback(callback)
    if adaptive is not None:  # before a checkpoint is loaded
        adaptive.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except torch.OutOfMemoryError as error:
        size, parts = trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps
        raise TrainingError(
            f"out of memory: halve the batch and keep its sum, --set training.batch_size={max(1, size // 2)} "
            f"--set training.gradient_accumulation={2 * parts}; or --set training.gradient_checkpointing=true, a "
            "shorter training.max_length, a smaller LoraConfig r, or model.quantization=4bit"
        ) from error
    finally:
        bar.close()
