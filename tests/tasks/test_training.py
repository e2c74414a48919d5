import dataclasses

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

from adalora.errors import RecipeError
from adalora.tasks import training
from adalora.tasks.recipe import TrainingPart

from .tiny import make_recipe, run

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
