"""`run_recipe`: from a validated recipe to a trained adapter, its metrics, history and report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from rich.console import Console
from transformers import Trainer, TrainerCallback, set_seed

from adalora.errors import DataError, OutOfMemory, RecipeError
from adalora.faults import is_out_of_memory
from adalora.integrations.trainer import AdaLoraCallback
from adalora.lora.processes.engines import refuse_launcher
from adalora.lora.state.checkpoint import latest_checkpoint
from adalora.report.history import History
from adalora.report.html import build_report
from adalora.tasks.data.rows import Splits, load_splits
from adalora.tasks.kinds.base import Task, make_task
from adalora.tasks.recipe.fields import Recipe
from adalora.tasks.recipe.files import dump_recipe
from adalora.tasks.runs.first_batches import follow_gradient
from adalora.tasks.runs.models import adapter_parameters, build_model, build_processor, trainable
from adalora.tasks.runs.outputs import (
    ADAPTER,
    HISTORY,
    METRICS,
    PRUNED,
    RECIPE,
    REPORT,
    WORK,
    last_plain_checkpoint,
    prepare_folder,
    save_adapter,
    write_text,
    written,
)
from adalora.tasks.runs.progress import ProgressBar, ranks_of
from adalora.tasks.runs.training import make_trainer

PACKAGES = ("adalora", "torch", "peft", "transformers", "datasets")


@dataclass(frozen=True, kw_only=True)
class RunHooks:
    """What a caller may do differently in a run, e.g. to train another method on the same recipe.

    Attributes:
        build: Makes the model to train, in place of the recipe's LoRA, from recipe, task, processor and splits.
        callbacks: Makes further trainer callbacks from the model.
        split: Rows for the final metrics; by default test, else validation, else train.
        keep_adapter: Write the adapter and the report; a run that only measures has no use for them.
    """

    build: Callable[[Recipe, Task, Any, Splits], Any] | None = None
    callbacks: Callable[[Any], Sequence[TrainerCallback]] | None = None
    split: Literal["validation", "test"] | None = None
    keep_adapter: bool = True

    def rows(self, splits: Splits) -> tuple[str, Any]:
        """The name of the split to measure on, and its rows.

        Raises:
            DataError: The data set has no such split.
        """
        if self.split is None:
            return splits.measured
        rows = getattr(splits, self.split)
        if rows is None:
            raise DataError(f"there is no {self.split} split: set data.{self.split}_fraction=0.1")
        return self.split, rows


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
    recipe: Recipe,
    *,
    overwrite: bool = False,
    resume: bool = False,
    console: Console | None = None,
    hooks: RunHooks | None = None,
) -> RunResult:
    """Train, evaluate and write everything to the recipe's output folder.

    Under a launcher (torchrun, accelerate) every process calls it; the first one writes.

    Raises:
        RecipeError: The folder holds a run already and `overwrite` is not set, or nothing that `resume` could go on
            from.
        ConfigError: The launcher cuts the model into shards.
        DataError: The data cannot be read.
        TrainingError: Training has diverged, or memory is exhausted.
        StorageError: The adapter cannot be written to the output folder; the message says where it is.
    """
    from accelerate import PartialState

    refuse_launcher()
    console, hooks = console or Console(), hooks or RunHooks()
    datasets.disable_progress_bars()  # ours is the only bar
    started = time.monotonic()
    # Without `cpu` it takes a machine without accelerator for a single process, whatever the launcher says.
    processes = PartialState(cpu=not torch.accelerator.is_available())
    first = processes.is_main_process
    checkpoint = _interrupted(recipe) if resume else None
    folder = prepare_folder(recipe.folder, overwrite=overwrite) if first and not resume else recipe.folder
    splits = load_splits(recipe)
    split, rows = hooks.rows(splits)
    set_seed(recipe.training.seed)
    task = make_task(recipe, splits)
    processor = build_processor(recipe, task)
    model = hooks.build(recipe, task, processor, splits) if hooks.build else build_model(recipe, task, processor)
    if checkpoint is None:
        follow_gradient(model, recipe, task, processor=processor, splits=splits)
    history = History(folder / HISTORY if first else None)
    adaptive = _adaptive(recipe, folder, history, first=first)
    trainer = make_trainer(recipe, task, model=model, processor=processor, splits=splits)
    for callback in hooks.callbacks(model) if hooks.callbacks else ():
        trainer.add_callback(callback)
    if first:
        write_text(folder / RECIPE, dump_recipe(recipe))
    before = trainable(model)
    _train(trainer, adaptive, console, checkpoint=checkpoint)
    if first and hooks.keep_adapter:  # before the evaluation, which may fail
        save_adapter(model, processor, folder / ADAPTER)
    size = trainer.args.per_device_eval_batch_size
    with _memory_advice(f"out of memory in the evaluation: --set training.eval_batch_size={max(1, size // 2)}"):
        scores = task.evaluate(trainer, rows, processor)
    metrics = {
        **_about(recipe, task, scores, rows=f"{len(rows):,} rows of the {split} split"),
        **(ranks_of(adaptive.controller) if adaptive is not None and adaptive.controller is not None else {}),
        "adapter_parameters": adapter_parameters(model),
        "trainable_parameters_before": before,
        "trainable_parameters_after": trainable(model),
        "steps": trainer.state.global_step,
        "seconds": round(time.monotonic() - started, 1),
    }
    if first:
        history.add("metric", step=trainer.state.global_step - 1, split=split, values=scores)
        write_text(folder / METRICS, json.dumps(metrics, indent=2) + "\n")
        if adaptive is not None and hooks.keep_adapter:
            build_report(history, folder / REPORT, names=[recipe.name])
        shutil.rmtree(folder / WORK, ignore_errors=True)
    processes.wait_for_everyone()
    return RunResult(folder, metrics, trainer)


def _adaptive(recipe: Recipe, folder: Path, history: History, *, first: bool) -> AdaLoraCallback | None:
    """What makes the run adaptive; None for plain LoRA."""
    if recipe.adalora is None:
        return None
    adaptive = AdaLoraCallback(recipe.adalora, history=history, thresholds=recipe.diagnostics)
    adaptive.pruned = folder / PRUNED if first and recipe.training.keep_pruned else None
    adaptive.resume_hint = f"adalora train {folder / RECIPE} --resume"
    adaptive.save_hint = "training.save_every"
    return adaptive


def _about(recipe: Recipe, task: Task, scores: dict[str, float], *, rows: str) -> dict[str, Any]:
    """What was run and what it scored."""
    return {
        "name": recipe.name,
        "task": recipe.task.name,
        "main_metric": task.main_metric,
        "evaluated_on": rows,
        **scores,
        "scores": scores,
        **({"published": recipe.published.model_dump()} if recipe.published is not None else {}),
        "versions": {name: version(name) for name in PACKAGES},
    }


def _interrupted(recipe: Recipe) -> str:
    """The newest whole checkpoint of a run that was stopped."""
    work = recipe.folder / WORK
    checkpoint = last_plain_checkpoint(work) if recipe.adalora is None else latest_checkpoint(work)
    if checkpoint is None:
        raise RecipeError(
            f"output={str(recipe.folder)!r} has no checkpoint to go on from: train without --resume (a run writes one "
            "each training.save_every steps, with training.keep_best at each evaluation, and at Ctrl-C)"
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
    size, parts = trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps
    cure = (
        f"out of memory: halve the batch and keep its sum, --set training.batch_size={max(1, size // 2)} "
        f"--set training.gradient_accumulation={2 * parts}; or --set training.gradient_checkpointing=true, a "
        "shorter training.max_length, a smaller LoraConfig r, or model.quantization=4bit"
    )
    try:
        with _memory_advice(cure):
            trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        bar.close()


@contextmanager
def _memory_advice(cure: str) -> Iterator[None]:
    """What to lower where memory ends inside the block."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(cure) from error
