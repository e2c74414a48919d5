import dataclasses

import pytest
import torch
from transformers import TrainingArguments

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
