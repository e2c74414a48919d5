"""Regression: a new head starts at the mean of the training rows, and learns from there."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
)

from adalora.compare.methods import MethodRun
from adalora.errors import DataError
from adalora.tasks.data.rows import load_splits
from adalora.tasks.kinds.base import make_task
from adalora.tasks.kinds.sequence import mean_label, number
from adalora.tasks.runs.models import build_processor, load_base

from ..tiny import make_recipe, run, word_tokenizer, write_rows

SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
MEAN = 4.0


@pytest.fixture
def numbers(tmp_path):
    """Texts whose number is 3 or 5 by their first word."""
    words = {"good": 5.0, "bad": 3.0}
    rows = [{"text": f"{word} flight", "text_pair": "the bag", "label": words[word]} for word in [*words] * 40]
    return write_rows(tmp_path / "numbers.jsonl", rows)


def recipe_of(tmp_path, model, numbers, **changes):
    fields = {"task": "regression", "data": {"files": numbers, "test_fraction": 0.3}, **changes}
    return make_recipe(tmp_path, model, **fields)


def loaded(recipe):
    task = make_task(recipe, load_splits(recipe))
    return load_base(recipe, task, build_processor(recipe, task))[0]


def test_a_new_heads_bias_starts_at_the_mean_of_the_training_rows(tiny_model, numbers, tmp_path):
    recipe = recipe_of(tmp_path, tiny_model, numbers, data={"files": numbers})
    assert loaded(recipe).classifier.bias.item() == pytest.approx(MEAN)
    off = recipe_of(tmp_path, tiny_model, numbers, task={"name": "regression", "start_at_mean": False})
    assert loaded(off).classifier.bias.item() == 0


def test_a_head_of_two_layers_gets_it_in_its_last_one(numbers, tmp_path):
    folder = tmp_path / "roberta"
    RobertaModel(RobertaConfig(**SIZES)).save_pretrained(folder)
    word_tokenizer(["good", "bad", "flight"]).save_pretrained(folder)
    model = loaded(recipe_of(tmp_path, folder, numbers, data={"files": numbers}))
    assert model.classifier.out_proj.bias.item() == pytest.approx(MEAN)
    assert model.classifier.dense.bias.abs().sum() == 0


def test_a_head_without_a_bias_and_one_of_the_checkpoint_stay_as_they_are(numbers, tmp_path):
    LlamaModel(LlamaConfig(**SIZES, pad_token_id=0)).save_pretrained(tmp_path / "llama")
    BertForSequenceClassification(BertConfig(**SIZES, num_labels=1)).save_pretrained(tmp_path / "bert")
    for folder in ("llama", "bert"):
        word_tokenizer(["good", "bad", "flight"]).save_pretrained(tmp_path / folder)
    assert loaded(recipe_of(tmp_path, tmp_path / "llama", numbers)).score.bias is None
    assert loaded(recipe_of(tmp_path, tmp_path / "bert", numbers)).classifier.bias.item() == 0


def test_a_stream_tells_its_mean_by_its_first_rows():
    rows = Dataset.from_dict({"label": [1.0, 2.0, 6.0]})
    assert mean_label(rows) == mean_label(rows.to_iterable_dataset()) == 3


@pytest.mark.parametrize("value", [None, "much", float("nan"), float("inf")])
def test_a_label_that_is_no_finite_number_is_named(value):
    with pytest.raises(DataError, match=f"label {value!r}: regression needs a finite number"):
        number(value)


@pytest.mark.parametrize("kind", ["head", "bitfit", "lora"])
def test_every_method_trains_the_pooler_that_the_recipe_names(kind, tiny_model, numbers, tmp_path):
    lora = {"r": 2, "modules_to_save": ["pooler"]}
    recipe = recipe_of(tmp_path, tiny_model, numbers, lora=lora, adalora=None)
    splits = load_splits(recipe)
    task = make_task(recipe, splits)
    method = MethodRun(kind, rank=2)
    model = method.build(recipe, task, build_processor(recipe, task), splits)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum("pooler" in name and name.endswith("dense.weight") for name in trained) == 1
    assert any(name.endswith("classifier.weight") or "classifier.modules_to_save" in name for name in trained)
    assert method.parameters(model) < sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_pooler_and_head_are_saved_with_the_adapter(tiny_model, numbers, tmp_path):
    lora = {"r": 3, "lora_alpha": 8, "modules_to_save": ["pooler", "classifier"]}
    training = {"max_steps": 40, "batch_size": 8, "learning_rate": 1e-2}
    recipe = recipe_of(tmp_path, tiny_model, numbers, lora=lora, training=training)
    result = run(recipe)
    assert result.metrics["mse"] < 0.25  # 1 by always answering the mean
    live = result.trainer.model.eval()
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    again = PeftModel.from_pretrained(base, result.folder / "adapter").eval()
    ids = torch.tensor([[2, 5, 9, 3]])
    torch.testing.assert_close(again(ids).logits, live(ids).logits)
