"""`run_recipe`: from a validated recipe to a trained adapter, its metrics, history and report."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import (
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from adalora.errors import DataError, RecipeError
from adalora.integrations.trainer import AdaLoraCallback
from adalora.report.history import History
from adalora.report.html import build_report
from adalora.tasks.data import Splits, load_splits
from adalora.tasks.progress import ProgressBar, ranks_of
from adalora.tasks.recipe import ModelPart, Recipe
from adalora.tasks.recipe_files import dump_recipe
from adalora.tasks.sequence import SequenceTask

ADAPTER, METRICS, HISTORY, REPORT, RECIPE, WORK = (
    "adapter",
    "metrics.json",
    "history.jsonl",
    "report.html",
    "recipe.yaml",
    "work",
)
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


def written(folder: Path) -> dict[str, str]:
    """The files of a run, for people."""
    names = {"adapter": ADAPTER, "metrics": METRICS, "history": HISTORY, "report": REPORT}
    return {what: str(folder / name) for what, name in names.items()}


def run_recipe(recipe: Recipe, *, overwrite: bool = False, console: Console | None = None) -> RunResult:
    """Train, evaluate and write everything to the recipe's output folder.

    Raises:
        RecipeError: The folder holds a run already and `overwrite` is not set.
        DataError: The data cannot be read.
    """
    console = console or Console()
    datasets.disable_progress_bars()  # ours is the only bar
    started = time.monotonic()
    folder = prepare_folder(recipe.folder, overwrite=overwrite)
    splits = load_splits(recipe)
    set_seed(recipe.training.seed)
    task = SequenceTask(recipe, splits)
    tokenizer = AutoTokenizer.from_pretrained(ModelPart(name=recipe.model.tokenizer or recipe.model.name).resolve())
    model = build_model(recipe, task)
    write_text(folder / RECIPE, dump_recipe(recipe))
    history = History(folder / HISTORY)
    adaptive = None
    if recipe.adalora is not None:
        adaptive = AdaLoraCallback(recipe.adalora, history=history, thresholds=recipe.diagnostics)
    bar = ProgressBar(console, adaptive)
    trainer = make_trainer(recipe, task, model=model, tokenizer=tokenizer, splits=splits)
    for callback in (adaptive, bar):
        if callback is not None:
            trainer.add_callback(callback)
    before = trainable(model)
    try:
        trainer.train()
    finally:
        bar.close()
    split, rows = splits.held_out or ("train", splits.train)
    scores = evaluate(trainer, task.features(rows, tokenizer))
    history.add("metric", step=trainer.state.global_step - 1, split=split, values=scores)
    save_adapter(model, tokenizer, folder / ADAPTER)
    metrics = {
        "name": recipe.name,
        "evaluated_on": f"{len(rows):,} rows of the {split} split",
        **scores,
        "scores": scores,
        **(ranks_of(adaptive.controller) if adaptive is not None and adaptive.controller is not None else {}),
        "adapter_parameters": sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n),
        "trainable_parameters_before": before,
        "trainable_parameters_after": trainable(model),
        "steps": trainer.state.global_step,
        "seconds": round(time.monotonic() - started, 1),
        "versions": {name: version(name) for name in PACKAGES},
    }
    write_text(folder / METRICS, json.dumps(metrics, indent=2) + "\n")
    if adaptive is not None:
        build_report(history, folder / REPORT, names=[recipe.name])
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return RunResult(folder, metrics, trainer)


def prepare_folder(folder: Path, *, overwrite: bool) -> Path:
    """Make the output folder; refuse, or empty, one that holds a run.

    Raises:
        RecipeError: It holds a run, or files that are not a run's.
    """
    ours = (ADAPTER, METRICS, HISTORY, REPORT, RECIPE, WORK)
    present = [name for name in ours if (folder / name).exists()]
    if present and not overwrite:
        raise RecipeError(
            f"output={str(folder)!r} already holds a run ({', '.join(present)}); add --overwrite to train it anew, or "
            "choose another folder with --set output=…"
        )
    for name in present:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def build_model(recipe: Recipe, task: SequenceTask) -> Any:
    """Base model with its head and the LoRA of the recipe."""
    part = recipe.model
    dtype: Any = "auto" if part.dtype == "auto" and torch.cuda.is_available() else None
    if part.dtype != "auto":
        dtype = getattr(torch, part.dtype)
    loading: dict[str, Any] = {"dtype": dtype if dtype is not None else torch.float32, **part.config}
    if part.revision:
        loading["revision"] = part.revision
    if part.gguf_file:
        loading["gguf_file"] = part.gguf_file
    if part.attention:
        loading["attn_implementation"] = part.attention
    if part.quantization:
        from transformers import BitsAndBytesConfig

        four = part.quantization == "4bit"
        settings: Any = BitsAndBytesConfig
        loading["quantization_config"] = settings(
            load_in_4bit=four,
            load_in_8bit=not four,
            **({"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} if four else {}),
        )
    model = task.model(part.resolve(), **loading)
    fields = {"r": 12, "target_modules": "all-linear", **recipe.lora}
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **fields))


def make_trainer(recipe: Recipe, task: SequenceTask, *, model: Any, tokenizer: Any, splits: Splits) -> Trainer:
    """The Hugging Face Trainer of a recipe."""
    training = recipe.training
    evaluates = training.evaluate_every is not None
    if evaluates and splits.validation is None:
        raise DataError("training.evaluate_every needs a validation split: set data.validation_fraction=0.1")
    cuda_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    grouping = training.length_grouping and not recipe.data.streaming
    # Given only where it is wanted: newer versions warn of the old name.
    options: dict[str, Any] = {"gradient_checkpointing": True} if training.gradient_checkpointing else {}
    arguments = TrainingArguments(
        output_dir=str(recipe.folder / WORK),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.eval_batch_size or 4 * training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        lr_scheduler_type=training.lr_schedule,
        warmup_steps=training.lr_warmup,
        max_grad_norm=training.max_grad_norm,
        label_smoothing_factor=training.label_smoothing,
        optim=training.optimizer,
        bf16=training.precision == "bf16" or (training.precision == "auto" and cuda_bf16),
        fp16=training.precision == "fp16",
        **options,
        train_sampling_strategy="group_by_length" if grouping else "random",
        eval_strategy="steps" if evaluates else "no",
        eval_steps=training.evaluate_every,
        save_strategy="steps" if training.keep_best else "no",
        save_steps=training.evaluate_every or 500,
        save_total_limit=1,
        load_best_model_at_end=training.keep_best,
        metric_for_best_model=task.main_metric,
        logging_steps=training.log_every,
        dataloader_num_workers=training.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=training.seed,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=task.features(splits.train, tokenizer),
        eval_dataset=task.features(splits.validation, tokenizer) if splits.validation is not None else None,
        processing_class=tokenizer,
        data_collator=task.collator(tokenizer),
        compute_metrics=task.metrics(),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def evaluate(trainer: Trainer, rows: Any) -> dict[str, float]:
    """Task metrics of the live model on held-out rows."""
    prefix = "final_"
    values = trainer.predict(rows, metric_key_prefix=prefix.rstrip("_")).metrics or {}
    timing = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    return {
        key.removeprefix(prefix): float(value)
        for key, value in values.items()
        if key.startswith(prefix) and not key.endswith(timing)
    }


def save_adapter(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the plain LoRA adapter and the tokenizer; the folder appears whole or not at all."""
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    labels = getattr(model.config, "id2label", None)
    write_text(unfinished / "labels.json", json.dumps(labels))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


def write_text(path: Path, text: str) -> None:
    """Write a file in one go: a reader sees the old text or the new, never half of it."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def trainable(model: Any) -> int:
    """Parameters that training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
