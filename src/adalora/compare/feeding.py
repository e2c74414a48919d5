"""PEFT's EVA, fed with a recipe's training batches."""

from __future__ import annotations

from typing import Any

import torch
from peft import initialize_lora_eva_weights

from adalora.errors import RecipeError
from adalora.tasks.data.rows import Splits
from adalora.tasks.kinds.base import Task
from adalora.tasks.recipe.fields import Recipe
from adalora.tasks.runs.first_batches import first_batches

EVA_BATCHES = 64  # at most; EVA stops by itself when its directions have settled


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
    loader = first_batches(
        model, recipe, task, processor=processor, splits=splits, batches=EVA_BATCHES, labels=per_token
    )
    initialize_lora_eva_weights(model, loader, prepare_layer_inputs_fn=rows_of, show_progress_bar=False)
    return model


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
