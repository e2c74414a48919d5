"""Training batches that are looked at before training."""

import io

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import set_seed

from adalora.errors import RecipeError
from adalora.tasks.data.rows import load_splits
from adalora.tasks.kinds.base import make_task
from adalora.tasks.runs.first_batches import first_batches, follow_gradient
from adalora.tasks.runs.models import build_model, build_processor
from adalora.tasks.runs.runner import RunHooks, run_recipe

from ..tiny import make_recipe, run


def recipe(folder, model, data, **changes):
    training = {"max_steps": 20, "batch_size": 8, "gradient_batches": 3, **changes.pop("training", {})}
    return make_recipe(
        folder,
        model,
        task="classification",
        data={"files": str(data), "test_fraction": 0.2},
        training=training,
        **changes,
    )


def built(chosen):
    splits = load_splits(chosen)
    set_seed(chosen.training.seed)
    task = make_task(chosen, splits)
    processor = build_processor(chosen, task)
    return build_model(chosen, task, processor), task, {"processor": processor, "splits": splits}


def lora_layers(model):
    found = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    return {name: m for name, m in found.items() if isinstance(m.base_layer, nn.Linear)}


def starts(model):
    return {name: layer.lora_A.default.weight.detach().clone() for name, layer in lora_layers(model).items()}


def test_triplets_start_along_the_gradient_of_the_first_batches(tiny_model, data_file, tmp_path):
    """Against singular vectors of gradients that are formed whole."""
    chosen = recipe(tmp_path, tiny_model, data_file)
    model, task, data = built(chosen)
    before = starts(model)
    model.eval()
    for layer in lora_layers(model).values():
        layer.base_layer.weight.requires_grad_(True)
    batches = list(first_batches(model, chosen, task, batches=3, **data))
    assert [len(batch["input_ids"]) for batch in batches] == [8, 8, 8]
    for batch in batches:
        model(**batch).loss.backward()
    gradients = {name: layer.base_layer.weight.grad.clone() for name, layer in lora_layers(model).items()}
    for layer in lora_layers(model).values():
        layer.base_layer.weight.requires_grad_(False)
    follow_gradient(model, chosen, task, **data)
    assert len(before) > 10
    for name, layer in lora_layers(model).items():
        first = layer.lora_A.default.weight[0].detach()
        _, values, vectors = torch.linalg.svd(gradients[name])
        if values[0] > 2 * values[1]:  # a direction of its own
            torch.testing.assert_close((first / first.norm() @ vectors[0]).abs(), torch.tensor(1.0), atol=1e-2, rtol=0)
        assert not torch.equal(layer.lora_A.default.weight, before[name])
        assert not layer.lora_B.default.weight.any()


def test_a_recipe_asks_for_it(tiny_model, data_file, tmp_path):
    chosen = recipe(tmp_path, tiny_model, data_file, training={"seed": 5})
    model, task, data = built(chosen)
    without = starts(model)
    follow_gradient(model, chosen, task, **data)
    seen = []
    hooks = RunHooks(callbacks=lambda model: seen.append(starts(model)) or ())
    run_recipe(chosen, hooks=hooks, console=Console(file=io.StringIO()))
    assert all(torch.equal(found, starts(model)[name]) for name, found in seen[0].items())
    assert not any(torch.equal(found, without[name]) for name, found in seen[0].items())


@pytest.mark.parametrize("adalora", [{"target_rank": 2}, None])
def test_it_trains_with_and_without_the_method(tiny_model, data_file, tmp_path, adalora):
    metrics = run(recipe(tmp_path, tiny_model, data_file, adalora=adalora, training={"learning_rate": 1e-2})).metrics
    assert metrics["steps"] == 20
    assert metrics["accuracy"] >= metrics["majority_accuracy"]


def test_a_stream_and_too_few_rows_are_refused(tiny_model, data_file, tmp_path):
    few = recipe(tmp_path, tiny_model, data_file, training={"batch_size": 500})
    with pytest.raises(RecipeError, match=r"96 training rows are less than a batch: lower training.batch_size=500"):
        run(few)
    stream = few.model_copy(update={"data": few.data.model_copy(update={"streaming": True})})
    model, task, data = built(few)
    with pytest.raises(RecipeError, match=r"data\.streaming=false"):
        follow_gradient(model, stream, task, **data)
