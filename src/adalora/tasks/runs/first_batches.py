"""Training batches that are looked at before training: a start along their gradient, PEFT's EVA."""

from __future__ import annotations

import inspect
from typing import Any

from torch.utils.data import DataLoader

from adalora.errors import RecipeError
from adalora.lora.starts.gradient_sketch import GradientSketch
from adalora.tasks.data.rows import Splits
from adalora.tasks.kinds.base import Task
from adalora.tasks.recipe.fields import Recipe


def follow_gradient(model: Any, recipe: Recipe, task: Task, *, processor: Any, splits: Splits) -> None:
    """Turn the triplets of a new adapter to the gradient of `training.gradient_batches` training batches.

    Every process of a launcher looks at the same rows.

    Args:
        model: PEFT model with a fresh adapter.
        recipe: Number of batches, their size, and the seed.
        task: Makes the features.
        processor: For the features.
        splits: Only `train` is read.

    Raises:
        RecipeError: The rows are a stream, or fewer than one batch.
    """
    wanted = recipe.training.gradient_batches
    if wanted is None:
        return
    loader = first_batches(model, recipe, task, processor=processor, splits=splits, batches=wanted)
    GradientSketch(model, loader, seed=recipe.training.seed).initialize()


def first_batches(
    model: Any, recipe: Recipe, task: Task, *, processor: Any, splits: Splits, batches: int, labels: bool = True
) -> DataLoader[Any]:
    """The first training batches as the model takes them, on its device.

    Args:
        model: PEFT model.
        recipe: Batch size and seed.
        task: Makes the features.
        processor: For the features.
        splits: Only `train` is read.
        batches: At most this many.
        labels: With what the loss is computed from.

    Raises:
        RecipeError: The rows are a stream, or fewer than one batch.
    """
    if recipe.data.streaming:
        raise RecipeError("training batches cannot be looked at first in a stream: data.streaming=false")
    size = recipe.training.batch_size
    if len(splits.train) < size:
        raise RecipeError(f"{len(splits.train)} training rows are less than a batch: lower training.batch_size={size}")
    rows = splits.train.shuffle(seed=recipe.training.seed)
    features = task.features(rows.select(range(min(len(rows), batches * size))), processor)
    known = inspect.signature(model.get_base_model().forward).parameters
    features = features.select_columns([name for name in features.column_names if name in known])
    collate = task.collator(processor)

    def batch(items: list[dict[str, Any]]) -> dict[str, Any]:
        made = dict(collate(items))
        if not labels:  # PEFT's EVA takes labels for a mask of tokens
            made = {name: value for name, value in made.items() if not name.startswith(("label", "start_", "end_"))}
        return {name: value.to(model.device) for name, value in made.items() if hasattr(value, "to")}

    return DataLoader(features, batch_size=size, collate_fn=batch, drop_last=True)
