import dataclasses
import io

import pytest
import torch
from rich.console import Console
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

from adalora.errors import RecipeError
from adalora.tasks.data.rows import load_splits
from adalora.tasks.kinds.base import make_task
from adalora.tasks.recipe.fields import TrainingPart
from adalora.tasks.runs import training
from adalora.tasks.runs.models import build_model, build_processor
from adalora.tasks.runs.runner import RunHooks, run_recipe

from ..tiny import make_recipe, run, write_rows

CPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")


@CPU
def test_bf16_on_a_cpu(tiny_model, data_file, tmp_path):
    changes = {"max_steps": 4, "batch_size": 8, "precision": "bf16"}
    recipe = make_recipe(tmp_path, tiny_model, task="classification", data={"files": str(data_file)}, training=changes)
    result = run(recipe)
    assert result.trainer.args.bf16
    assert result.metrics["final_rank_total"] == result.metrics["target_rank_total"]
    assert all(p.dtype == torch.float32 for p in result.trainer.model.parameters() if p.requires_grad)


@CPU
def test_fp16_needs_a_gpu():
    with pytest.raises(RecipeError, match="bf16 or fp32"):
        training.precision(TrainingPart(precision="fp16"))


def test_checkpointing_has_a_name_that_transformers_knows():
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(training.checkpointing()) <= known


def test_accumulation_changes_neither_the_loss_nor_the_run(tiny_model, data_file, tmp_path):
    """The Trainer would report four times the loss of a model that does not count items, and clip its gradients so."""

    def trained(name, **sizes):
        changes = {"max_steps": 12, "learning_rate": 1e-2, "log_every": 1, "length_grouping": False, **sizes}
        recipe = make_recipe(
            tmp_path / name, tiny_model, task="classification", data={"files": str(data_file)}, training=changes
        )
        result = run(recipe)
        losses = [entry["loss"] for entry in result.trainer.state.log_history if "loss" in entry]
        return torch.tensor(losses), result.metrics

    losses, metrics = trained("whole", batch_size=8)
    parts, its_metrics = trained("parts", batch_size=2, gradient_accumulation=4)
    assert 0.5 < float(losses[0]) < 1
    torch.testing.assert_close(parts, losses, atol=2e-4, rtol=0)
    assert metrics["ranks"] == its_metrics["ranks"]


def test_who_counts_items():
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    assert training._counts_items(LlamaForCausalLM(LlamaConfig(intermediate_size=8, **sizes)))
    assert not training._counts_items(BertForSequenceClassification(BertConfig(intermediate_size=8, **sizes)))


@pytest.fixture
def uneven(tmp_path):
    """Rows of one and of twenty words, in turn."""
    rows = [{"text": " ".join(["good", *["flight"] * (n % 2 * 19)]), "label": "ab"[n % 2]} for n in range(64)]
    return write_rows(tmp_path / "uneven.jsonl", rows)


@pytest.mark.parametrize("grouping", [True, False])
def test_padding_goes_to_the_longest_row_of_a_batch_and_grouping_saves_it(grouping, tiny_model, uneven, tmp_path):
    fields = {"batch_size": 8, "length_grouping": grouping, "max_steps": 1, "max_length": 16}
    recipe = make_recipe(tmp_path, tiny_model, task="classification", data={"files": uneven}, training=fields)
    splits = load_splits(recipe)
    task = make_task(recipe, splits)
    processor = build_processor(recipe, task)
    model = build_model(recipe, task, processor)
    trainer = training.make_trainer(recipe, task, model=model, processor=processor, splits=splits)
    batches = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
    assert all(mask.shape[1] == mask.sum(dim=1).max() for mask in batches)
    assert {mask.shape[1] for mask in batches} <= {3, 16}  # with the two special tokens; cut at 16
    padded = sum(int((mask == 0).sum()) for mask in batches)
    assert (padded <= 2 * 8 * 13) == grouping  # the longest row is put first, which mixes two batches


@pytest.mark.parametrize("adalora", [None, {"target_rank": 2}, {"target_rank": 2, "parametrization": "svd"}])
def test_activations_are_computed_again_where_the_recipe_wants_it(adalora, tiny_model, data_file, tmp_path):
    """Twice as many forward passes of a layer, and the same run."""

    def trained(checkpointing):
        fields = {"max_steps": 6, "batch_size": 8, "learning_rate": 1e-2, "gradient_checkpointing": checkpointing}
        folder, data = tmp_path / str(checkpointing), {"files": str(data_file)}
        recipe = make_recipe(folder, tiny_model, task="classification", data=data, adalora=adalora, training=fields)
        passes = []

        def count(model):
            layer = model.get_base_model().bert.encoder.layer[0].attention
            layer.register_forward_hook(lambda module, *_: passes.append(module.training))
            return ()

        console = Console(file=io.StringIO())
        metrics = run_recipe(recipe, console=console, hooks=RunHooks(callbacks=count, keep_adapter=False)).metrics
        return passes.count(True), metrics

    (passes, metrics), (its_passes, its_metrics) = trained(checkpointing=False), trained(checkpointing=True)
    assert (passes, its_passes) == (6, 12)
    assert its_metrics["scores"] == pytest.approx(metrics["scores"], abs=1e-5)
    assert its_metrics.get("ranks") == metrics.get("ranks")
    assert ("ranks" in metrics) == (adalora is not None)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_fp16_on_a_gpu(tiny_model, data_file, tmp_path):
    fields = {"max_steps": 8, "batch_size": 8, "precision": "fp16"}
    recipe = make_recipe(tmp_path, tiny_model, task="classification", data={"files": str(data_file)}, training=fields)
    result = run(recipe)
    assert result.trainer.args.fp16
    assert result.metrics["final_rank_total"] == result.metrics["target_rank_total"]
