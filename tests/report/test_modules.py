"""Module names of real architectures become layers and types."""

import pytest

from adalora.report.modules import family, place_modules

BERT = "base_model.model.bert.encoder.layer.{}.{}"
T5 = "base_model.model.{}.block.{}.layer.{}.{}"


def test_bert_labels_are_short_and_distinct():
    kinds = ["attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"]
    places = place_modules([BERT.format(i, k) for i in (0, 11) for k in kinds])
    assert [p.type for p in places[:4]] == [
        "query",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ]
    assert [p.row for p in places] == ["0"] * 4 + ["11"] * 4


def test_encoder_and_decoder_are_told_apart():
    names = [f"base_model.model.model.{s}.layers.{i}.self_attn.q_proj" for s in ("encoder", "decoder") for i in (0, 1)]
    names.append("base_model.model.model.decoder.layers.0.encoder_attn.q_proj")
    places = place_modules(names)
    assert [p.row for p in places] == ["encoder 0", "encoder 1", "decoder 0", "decoder 1", "decoder 0"]
    assert places[0].type == "self_attn.q_proj"
    assert places[-1].type == "encoder_attn.q_proj"


def test_experts_share_a_cell():
    names = [f"base_model.model.model.layers.0.mlp.experts.{i}.w1" for i in range(3)]
    assert {(p.row, p.type) for p in place_modules(names)} == {("0", "w1")}


def test_outside_the_layers():
    places = place_modules(["base_model.model.lm_head", BERT.format(0, "attention.self.key")])
    assert (places[0].row, places[0].type, places[0].layer) == ("other", "lm_head", None)
    assert (places[1].row, places[1].type) == ("0", "key")


def test_a_number_at_the_end_is_no_layer():
    places = place_modules(["model.classifier.0", "model.classifier.3"])
    assert [p.layer for p in places] == [None, None]


@pytest.mark.parametrize(
    ("label", "word"),
    [
        ("q_proj", "query"),
        ("self_attn.k_proj", "key"),
        ("attention.output.dense", "attention output"),
        ("output.dense", "feed-forward"),
        ("down_proj", "feed-forward"),
        ("unheard_of", "unheard_of"),
    ],
)
def test_family(label, word):
    assert family(label) == word
