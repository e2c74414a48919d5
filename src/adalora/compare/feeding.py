"""Starts that look at training rows first: PEFT's EVA and the gradient's sketch."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import initialize_lora_eva_weights
from torch.utils.data import DataLoader

from adalora.errors import RecipeError
from adalora.lora.starts.gradient_sketch import GradientSketch
from adalora.tasks.data.rows import Splits
from adalora.tasks.kinds.base import Task
from adalora.tasks.recipe.fields import Recipe

EVA_BATCHES = 64  # at most; EVA stops by itself when its directions have settled
GRADIENT_BATCHES = 8


def fill_eva(model: Any, recipe: Recipe, task: Task, *, processor: Any, splits: Splits) -> Any:
    """Compute EVA's initial factors and ranks from training batches.

    Args:
        model: PEFT model whose config says `init_lora_weights="eva"`.
        recipe: Batch size and seed.
        task: Makes the features.
        processor: For the features.
        splits: Only `train` is read.

    Raises:
        RecipeError: The rows are a stream, or the inputs are not token ids.
    """
    if not task.groups_by_length:
        raise RecipeError("method eva: PEFT's EVA is fed with batches of token ids")
    per_token = model.peft_config[model.active_adapter].task_type == "CAUSAL_LM"
    loader = _loader(model, recipe, task, processor=processor, splits=splits, batches=EVA_BATCHES, labels=per_token)
    initialize_lora_eva_weights(model, loader, prepare_layer_inputs_fn=rows_of, show_progress_bar=False)
    return model


def follow_gradient(model: Any, recipe: Recipe, task: Task, *, processor: Any, splits: Splits) -> None:
    """Turn the triplets of a new adapter to the gradient of a few training batches.

    Args:
        model: PEFT model with a fresh adapter.
        recipe: Batch size and seed.
        task: Makes the features.
        processor: For the features.
        splits: Only `train` is read.

    Raises:
        RecipeError: The rows are a stream.
    """
    loader = _loader(model, recipe, task, processor=processor, splits=splits, batches=GRADIENT_BATCHES, labels=True)
    GradientSketch(model, loader, seed=recipe.training.seed).initialize()


def _loader(
    model: Any, recipe: Recipe, task: Task, *, processor: Any, splits: Splits, batches: int, labels: bool
) -> DataLoader[Any]:
    """The first training batches as the model takes them."""
    if recipe.data.streaming:
        raise RecipeError("a method that looks at training batches first needs rows in memory: data.streaming=false")
    rows = splits.train.shuffle(seed=recipe.training.seed)
    wanted = min(len(rows), batches * recipe.training.batch_size)
    features = task.features(rows.select(range(wanted)), processor)
    known = inspect.signature(model.get_base_model().forward).parameters
    features = features.select_columns([name for name in features.column_names if name in known])
    collate = task.collator(processor)

    def batch(items: list[dict[str, Any]]) -> dict[str, Any]:
        made = dict(collate(items))
        if not labels:  # PEFT's EVA takes labels for a mask of tokens
            made = {name: value for name, value in made.items() if not name.startswith(("label", "start_", "end_"))}
        return {name: value.to(model.device) for name, value in made.items() if hasattr(value, "to")}

    return DataLoader(features, batch_size=recipe.training.batch_size, collate_fn=batch, drop_last=True)


def rows_of(layer_input: Any, tokens: torch.Tensor, layer_name: str) -> torch.Tensor:
    """A layer's inputs as (rows, d_in): those of real tokens; a pooler, which sees one vector per text, gives all.

    Args:
        layer_input: What PEFT's hook caught: (batch, length, d_in) or (batch, d_in), alone or first in a tuple.
        tokens: (n, 2): batch and position of each token that is not padding.
        layer_name: Not used; PEFT gives it.
    """
    states: torch.Tensor = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
    if states.dim() == 2:
        return states.contiguous()  # PEFT hashes it through a view
    return states[tokens[:, 0], tokens[:, 1]]
