"""The Hugging Face Trainer of a recipe."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from adalora.errors import DataError, RecipeError
from adalora.tasks.data.rows import Splits
from adalora.tasks.kinds.base import Task
from adalora.tasks.recipe.fields import Recipe, TrainingPart
from adalora.tasks.runs.head import RecipeTrainer, check_rate
from adalora.tasks.runs.outputs import WORK
from adalora.tasks.runs.streams import Endless


def make_trainer(recipe: Recipe, task: Task, *, model: Any, processor: Any, splits: Splits) -> Trainer:
    """Trainer with the task's features, collator and metrics.

    Raises:
        DataError: Evaluation during training is wanted, and there is no validation split.
        RecipeError: The head is to have a learning rate of its own, and there is none.
    """
    evaluates = recipe.training.evaluate_every is not None
    if evaluates and splits.validation is None:
        raise DataError("training.evaluate_every needs a validation split: set data.validation_fraction=0.1")
    train = task.features(splits.train, processor)
    trainer = RecipeTrainer(
        model=model,
        args=training_arguments(recipe, task),
        train_dataset=Endless(train) if recipe.data.streaming else train,
        eval_dataset=task.features(splits.validation, processor) if evaluates else None,
        processing_class=processor,
        data_collator=task.collator(processor),
        compute_loss_func=task.loss(),
        compute_metrics=task.metrics(),
        preprocess_logits_for_metrics=task.reduce_outputs(),
    )
    trainer.head_learning_rate = check_rate(recipe.training.head_learning_rate, model)
    trainer.model_accepts_loss_kwargs = task.loss_per_token and _counts_items(model)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _counts_items(model: Any) -> bool:
    """Whether the model divides its loss by the items that the Trainer counts over processes and micro-batches.

    The Trainer takes every `forward(**kwargs)` for one that does, and multiplies the loss of the others by the number
    of processes and of micro-batches. transformers' own divide in `self.loss_function`.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    code = getattr(inspect.unwrap(type(base).forward), "__code__", None)
    return code is not None and "loss_function" in code.co_names


def training_arguments(recipe: Recipe, task: Task) -> TrainingArguments:
    """A recipe's training part in the Trainer's words."""
    training = recipe.training
    evaluates = training.evaluate_every is not None
    grouping = training.length_grouping and task.groups_by_length and not recipe.data.streaming
    fields: dict[str, Any] = {
        "output_dir": str(recipe.folder / WORK),
        "num_train_epochs": training.epochs,
        "max_steps": training.max_steps or -1,
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": training.eval_batch_size or 4 * training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "learning_rate": training.learning_rate,
        "weight_decay": training.weight_decay,
        "lr_scheduler_type": training.lr_schedule,
        "warmup_steps": training.lr_warmup,
        "max_grad_norm": training.max_grad_norm,
        "label_smoothing_factor": training.label_smoothing,
        "optim": training.optimizer,
        **precision(training),
        "train_sampling_strategy": "group_by_length" if grouping else "random",
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": training.evaluate_every,
        **saving(training),
        "load_best_model_at_end": training.keep_best,
        "metric_for_best_model": task.main_metric,
        "label_names": list(task.label_names),
        "logging_steps": training.log_every,
        "dataloader_num_workers": training.workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Each process takes its share of a stream. Batches of different lengths cannot be handed out by the first one.
        "accelerator_config": {"dispatch_batches": False},
        "seed": training.seed,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if training.gradient_checkpointing:
        fields |= checkpointing()
    return TrainingArguments(**{**fields, **task.arguments()})


def saving(training: TrainingPart) -> dict[str, Any]:
    """When checkpoints are written into the run's work folder, and how many stay."""
    if training.keep_best:  # the best one stays beside the newest
        return {"save_strategy": "steps", "save_steps": training.evaluate_every, "save_total_limit": 1}
    if training.save_every is not None:
        return {"save_strategy": "steps", "save_steps": training.save_every, "save_total_limit": 2}
    return {"save_strategy": "no"}


def precision(training: TrainingPart) -> dict[str, bool]:
    """bf16 or fp16 autocast; `auto` is bf16 where the GPU has it.

    Raises:
        RecipeError: fp16 is wanted without a GPU.
    """
    gpu_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    on_cpu = not torch.accelerator.is_available()
    if on_cpu and training.precision == "fp16":
        raise RecipeError("training.precision='fp16' needs a GPU; here: bf16 or fp32")
    return {
        "bf16": training.precision == "bf16" or (training.precision == "auto" and gpu_bf16),
        "fp16": training.precision == "fp16",
        "use_cpu": on_cpu,  # or the Trainer takes bf16 for a mistake
    }


def checkpointing() -> dict[str, Any]:
    """Recompute activations in the backward pass.

    Not re-entrant: that kind finds no input that wants a gradient above frozen embeddings.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}
