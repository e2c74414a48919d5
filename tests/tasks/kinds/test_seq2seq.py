import math

import pytest
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from ..tiny import WORDS, make_recipe, run, word_tokenizer, write_rows


@pytest.fixture(params=["t5", "bart"])
def model(request, tmp_path):
    folder = tmp_path / "model"
    word_tokenizer(WORDS, end=True).save_pretrained(folder)
    ids = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
    if request.param == "t5":
        config = T5Config(vocab_size=24, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, **ids)
        T5ForConditionalGeneration(config).save_pretrained(folder)
    else:
        sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        config = BartConfig(
            vocab_size=24, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, init_std=0.5,
            bos_token_id=2, forced_eos_token_id=3, **sizes, **ids,
        )  # fmt: skip
        BartForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_targets_are_learnt_and_texts_generated(model, tmp_path):
    rows = [{"source": f"{WORDS[n % 5]} {WORDS[n % 7]}", "target": ["w1 w2 w3", "w4"]} for n in range(60)]
    recipe = make_recipe(
        tmp_path,
        model,
        task={"name": "seq2seq", "prefix": "w9 ", "generation": {"max_new_tokens": 6, "num_beams": 2}},
        data={"files": write_rows(tmp_path / "rows.jsonl", rows), "test_fraction": 0.1},
        training={"max_steps": 60, "batch_size": 8, "learning_rate": 3e-2},
    )
    metrics = run(recipe).metrics
    assert metrics["nll"] < math.log(24) - 1
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["nll"]))
    assert metrics["rouge1"] > 0.3
    assert {"rouge2", "rougeL", "rougeLsum"} <= metrics.keys()
