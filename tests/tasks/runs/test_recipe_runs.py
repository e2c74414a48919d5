"""Every recipe of the package is trained for a few steps as it stands.

Its model is a small random one of the same architecture, its rows are made ones with the columns and splits of the
hub's data set, and phases are as short as the run; all else is the recipe's own.
"""

import io
import math

import pytest
from peft.tuners.lora import LoraLayer
from rich.console import Console

from adalora.tasks.data import rows, sources
from adalora.tasks.recipe.files import catalogue, load_recipe
from adalora.tasks.runs import runner
from adalora.tasks.runs.progress import show_result
from adalora.tasks.runs.runner import run_recipe

from ..small import MODELS
from ..small_hub import load_hub

STEPS = 6
QWEN, STREAM = "instruct-llama-4bit:qwen3", "instruct-llama-4bit:stream"
# Each once: variants that differ only in the budget, or in where the same model comes from, would be the same runs.
RUN = [e.name for e in catalogue() if ":" not in e.name or e.name in ("embedding-squad:package", QWEN, STREAM)]
LAYERS = {"microsoft/deberta-v3-base": 2 * 6, "facebook/bart-large": 6 + 10}  # six kinds; BART's decoder attends twice


def shortened(name, folder):
    """The recipe with a small model, a few rows and a few steps."""
    recipe = load_recipe(name)
    changes = {
        "output": folder / "run",
        "training.max_steps": STEPS,
        "training.batch_size": 4,
        "training.eval_batch_size": 4,
        "training.gradient_accumulation": min(2, recipe.training.gradient_accumulation),
        "training.workers": min(1, recipe.training.workers),
        "model.gguf_file": "null",
        "data.limit": "{train: 24, validation: 8, test: 8}",
    }
    for field in ("name", "tokenizer"):
        if (wanted := getattr(recipe.model, field)) is not None:
            path = folder / field
            MODELS[wanted](path)
            changes[f"model.{field}"] = path
    if name.startswith("paper/"):
        changes |= {"adalora.warmup": 1, "adalora.final": 1, "adalora.allocation_interval": 1}
    return load_recipe(name, overrides=[f"{field}={value}" for field, value in changes.items()])


def test_what_is_not_run_says_no_more_than_another():
    for entry in catalogue():
        if entry.name not in RUN:
            variant, whole = (load_recipe(name).to_dict() for name in (entry.name, entry.name.partition(":")[0]))
            different = {field for field in whole if variant.get(field) != whole[field]}
            names = {"name", "description", "output", "published"}
            assert different <= {*names, "lora", "adalora"} or different <= {*names, "model"}
            assert MODELS[variant["model"]["name"]] is MODELS[whole["model"]["name"]]


def assert_stored_as_the_recipe_says(model, quantization):
    """What LoRA lies on is stored in 4 bits as QLoRA does, or in the checkpoint's type."""
    below = [layer.get_base_layer() for layer in model.modules() if isinstance(layer, LoraLayer)]
    assert below
    assert quantization in (None, "4bit")
    assert {type(layer).__name__ == "Linear4bit" for layer in below} == {quantization == "4bit"}
    if quantization is not None:
        assert {(layer.weight.quant_type, layer.weight.compress_statistics) for layer in below} == {("nf4", True)}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("name", RUN)
def test_a_recipe_runs(name, tmp_path, monkeypatch):
    monkeypatch.delenv(sources.DATA_VARIABLE, raising=False)
    monkeypatch.setattr(sources, "load_hub", load_hub)
    monkeypatch.setattr(rows, "load_hub", load_hub)
    monkeypatch.setattr(runner, "build_report", lambda *_, **__: None)  # most of a short run's time; tested elsewhere
    recipe = shortened(name, tmp_path)
    if recipe.model.quantization is not None:
        pytest.importorskip("bitsandbytes")
    console = Console(file=io.StringIO(), width=200)
    result = run_recipe(recipe, console=console)
    metrics = result.metrics
    assert metrics["steps"] == STEPS
    assert metrics["final_rank_total"] == metrics["target_rank_total"] < metrics["initial_rank_total"]
    assert all(math.isfinite(value) for value in metrics["scores"].values())
    assert_stored_as_the_recipe_says(result.trainer.model, recipe.model.quantization)
    losses = [entry["train_loss"] for entry in result.trainer.state.log_history if "train_loss" in entry]
    assert all(math.isfinite(loss) for loss in losses)
    assert (result.folder / "adapter" / "adapter_model.safetensors").is_file()
    wanted = load_recipe(name).model.name
    if name.startswith("paper/"):
        assert len(metrics["ranks"]) == LAYERS[wanted]
        show_result(console, metrics, result.files)
        shown = console.file.getvalue()
        for metric, value in recipe.published.metrics.items():
            assert metric in metrics["scores"]
            assert f"published {value:.4f}" in shown
            assert f"this run {metrics['scores'][metric]:.4f}" in shown
