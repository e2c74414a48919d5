import shutil

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from adalora.errors import RecipeError
from adalora.tasks.data.rows import load_splits
from adalora.tasks.kinds import base
from adalora.tasks.kinds.sequence import SequenceTask
from adalora.tasks.recipe.fields import ModelPart, Recipe
from adalora.tasks.runs import models

from ..small import deberta_v3, minilm, vit, whisper
from ..tiny import make_recipe

SIZES = {"vocab_size": 15, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


class Task(SequenceTask):
    def __init__(self):
        pass


def config(tmp_path, model, missing, **lora):
    fields = {"r": 2, "target_modules": "all-linear", **lora}
    recipe = make_recipe(tmp_path, "x", task="classification", data={"files": "rows.csv"}, lora=fields)
    return models.lora_config(recipe, Task(), model, models.fresh_modules(model, missing))


def test_a_head_that_the_checkpoint_lacks_is_trained_whole(tmp_path):
    model = RobertaForSequenceClassification(RobertaConfig(**SIZES))
    missing = {"classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight"}
    made = config(tmp_path, model, missing)
    assert set(made.exclude_modules) == {"classifier.dense", "classifier.out_proj"}
    peft_model = models.get_peft_model(model, made)
    assert made.modules_to_save == ["classifier", "score"]  # each once
    lora = {name for name, _ in peft_model.named_parameters() if ".lora_A" in name}
    assert lora
    assert not any("classifier" in name for name in lora)
    assert all(p.requires_grad for name, p in peft_model.named_parameters() if "classifier.modules_to_save" in name)


def test_an_inner_module_that_is_missing_is_named_by_itself():
    model = BertForSequenceClassification(BertConfig(**SIZES))
    missing = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight"}
    assert models.fresh_modules(model, missing) == ["bert.pooler.dense", "classifier"]
    assert models.fresh_modules(BertForQuestionAnswering(BertConfig(**SIZES)), {"qa_outputs.weight"}) == ["qa_outputs"]


def test_the_users_choice_of_modules_stays(tmp_path):
    model = BertForSequenceClassification(BertConfig(**SIZES))
    made = config(tmp_path, model, {"classifier.weight"}, modules_to_save=["classifier"], target_modules=["query"])
    assert made.exclude_modules is None
    assert made.target_modules == {"query"}


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantisation_says_what_it_needs_or_is_complete(kind, monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install bitsandbytes"):
        models.loading_arguments(ModelPart(name="x", quantization=kind))
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: object())
    settings = models.loading_arguments(ModelPart(name="x", quantization=kind))["quantization_config"]
    assert settings.load_in_4bit == (kind == "4bit")
    assert settings.load_in_8bit == (kind == "8bit")
    if kind == "4bit":
        assert (settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant) == ("nf4", True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU keeps the checkpoint's type")
def test_half_precision_checkpoints_are_float32_on_a_cpu():
    assert models.loading_arguments(ModelPart(name="x"))["dtype"] is torch.float32
    assert models.loading_arguments(ModelPart(name="x", dtype="bfloat16"))["dtype"] is torch.bfloat16


def test_a_missing_metric_package_is_named_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    recipe = make_recipe(tmp_path, "x", task="question-answering", data={"files": "rows.csv"})
    with pytest.raises(RecipeError, match=r"torchmetrics: pip install 'adalora\[metrics\]'"):
        base.make_task(recipe, None)


def test_modules_that_are_trained_whole_are_the_new_ones_and_the_recipes(tmp_path):
    model = BertForSequenceClassification(BertConfig(**SIZES))
    fields = {"modules_to_save": ["pooler"]}
    recipe = make_recipe(tmp_path, "x", task="regression", data={"files": "rows.csv"}, lora=fields)
    assert models.whole_modules(recipe, model, ["classifier"]) == ["bert.pooler", "classifier"]
    plain = make_recipe(tmp_path, "x", task="regression", data={"files": "rows.csv"})
    assert models.whole_modules(plain, model, ["classifier"]) == ["classifier"]


def test_a_head_of_another_size_is_new_and_other_sizes_are_an_error(tiny_model, data_file, tmp_path):
    """Rerankers have one output; a task with two labels makes the head anew, and keeps the encoder."""
    folder = tmp_path / "three"
    shutil.copytree(tiny_model, folder)
    trained = BertForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    trained.save_pretrained(folder)

    def loaded(**fields):
        recipe = make_recipe(tmp_path, folder, task="classification", data={"files": str(data_file)})
        recipe = recipe.model_copy(update={"model": ModelPart(name=str(folder), config=fields)})
        task = base.make_task(recipe, load_splits(recipe))
        return models.load_base(recipe, task, models.build_processor(recipe, task))

    model, fresh = loaded()
    assert fresh == ["classifier"]
    assert model.classifier.out_features == 2
    torch.testing.assert_close(model.bert.state_dict(), trained.bert.state_dict())
    with pytest.raises(RecipeError, match=r"model\.config: bert\..* is .* leave out"):
        loaded(intermediate_size=32)


def test_a_field_that_only_the_models_code_knows_is_set_and_a_typing_error_is_named(tmp_path):
    """DeBERTa reads `cls_dropout`, which its config class does not declare."""
    deberta_v3(tmp_path / "base")
    task_fields = {"name": "classification", "labels": ["a", "b"]}
    recipe = make_recipe(tmp_path, tmp_path / "base", task=task_fields, data={"files": "rows.csv"})
    task = base.make_task(recipe, None)
    processor = models.build_processor(recipe, task)

    def loaded(**fields):
        return models.load_checkpoint(ModelPart(name=recipe.model.name, config=fields), task, processor)[0]

    assert loaded(cls_dropout=0.25).dropout.p == 0.25
    assert loaded(hidden_dropout_prob=0.5).deberta.embeddings.dropout.p == 0.5
    with pytest.raises(RecipeError, match=r"model\.config\.hidden_dropuot_prob.*hidden_dropout_prob"):
        loaded(hidden_dropuot_prob=0.5)


@pytest.mark.parametrize(
    ("lora", "adalora", "rank"),
    [({}, {"target_rank": 2}, 4), ({}, {"target_rank": 20}, 30), ({"r": 5}, {"target_rank": 2}, 5), ({}, None, 12)],
)
def test_the_rank_to_start_with_follows_the_target(tmp_path, lora, adalora, rank):
    part = {"target_modules": "all-linear", **lora}
    task = {"task": "classification", "data": {"files": "rows.csv"}}
    recipe = make_recipe(tmp_path, "x", **task, lora=part, adalora=adalora)
    assert models.lora_config(recipe, Task(), BertForSequenceClassification(BertConfig(**SIZES)), []).r == rank


LABELS = {"labels": ["a", "b"]}
SMALL = {  # how a model is made, its task, its layers with LoRA, and the one Linear that has none
    "bert": (minilm, {"name": "classification", **LABELS}, 2 * 6 + 1, "classifier"),  # the pooler is the one more
    "vit": (vit, {"name": "image-classification", **LABELS}, 2 * 6, "classifier"),
    "whisper": (whisper, {"name": "speech-to-text"}, 6 + 10, "proj_out"),  # the decoder attends twice
}


@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_that_says_nothing_of_lora_adapts_every_linear_layer_below_the_head(name, tmp_path):
    save, task_fields, count, head = SMALL[name]
    save(tmp_path / "model")
    recipe = Recipe.parse({"model": str(tmp_path / "model"), "task": task_fields, "data": {"files": "rows.csv"}})
    task = base.make_task(recipe, None)
    processor = models.build_processor(recipe, task)
    plain, _ = models.load_base(recipe, task, processor)
    linear = {place for place, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    model = models.build_model(recipe, task, processor).get_base_model()
    layers = {place: module for place, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert set(layers) == linear - {head}
    assert len(layers) == count
    assert {layer.r["default"] for layer in layers.values()} == {12}
    whole = sorted(place for place, p in model.named_parameters() if p.requires_grad and "lora_" not in place)
    saved = f"{head}.modules_to_save.default"
    assert whole == ([] if name == "whisper" else [f"{saved}.bias", f"{saved}.weight"])
