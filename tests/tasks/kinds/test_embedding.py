import itertools

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from adalora.tasks.kinds.embedding import contrastive_loss, embed, retrieval

from ..conftest import WORDS
from ..tiny import make_recipe, run, write_rows


def pairs():
    """Texts without a common word: what belongs to what has to be learnt."""
    for i, j in itertools.product(range(5), repeat=2):
        yield {"text": f"{WORDS[i]} {WORDS[j]}", "text_pair": f"{WORDS[5 + i]} {WORDS[9 - j]}"}


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_passage_of_a_query_is_found(tiny_model, tmp_path, pooling):
    def trained(name, steps):
        (tmp_path / name).mkdir()
        recipe = make_recipe(
            tmp_path / name,
            tiny_model,
            task={"name": "embedding", "pooling": pooling},
            lora={"r": 3, "lora_alpha": 8, "target_modules": r".*encoder.*\.(query|key|value|dense)"},  # no pooler
            data={"files": write_rows(tmp_path / "rows.jsonl", list(pairs()) * 4), "test_fraction": 0.25},
            training={"max_steps": steps, "batch_size": 10, "learning_rate": 1e-2},
        )
        return run(recipe).metrics

    before, after = trained("before", 4), trained("after", 150)
    assert before["mrr"] < 0.5
    assert after["mrr"] > before["mrr"] + 0.15
    assert after["recall_at_1"] <= after["mrr"] <= after["recall_at_10"] <= 1


def test_batches_of_different_lengths_are_measured_together(tiny_model, tmp_path):
    rows = [{"text": " ".join(WORDS[: n % 7 + 1]), "text_pair": " ".join(WORDS[: n % 10 + 1])} for n in range(40)]
    recipe = make_recipe(
        tmp_path,
        tiny_model,
        task="embedding",
        data={"files": write_rows(tmp_path / "rows.jsonl", rows), "test_fraction": 0.5},
        training={"max_steps": 4, "batch_size": 4, "eval_batch_size": 2},
    )
    assert 0 < run(recipe).metrics["mrr"] <= 1


def labels():
    texts = [[[5, 6, -100], [7, 8, 9]], [[5, 5, -100], [7, 8, 9]], [[4, 4, 4], [7, 7, -100]]]
    return torch.tensor(texts).transpose(1, 2)  # pairs, tokens, sides


def test_padding_is_no_part_of_a_vector():
    states = torch.randn(6, 3, 4)
    vectors = embed(states, labels(), pooling="mean")
    assert vectors.shape == (3, 2, 4)
    wanted = states[0, :2].mean(dim=0)
    torch.testing.assert_close(vectors[0, 0], wanted / wanted.norm())
    torch.testing.assert_close(embed(states, labels(), pooling="cls")[2, 1], states[5, 0] / states[5, 0].norm())


def test_the_same_passage_is_no_wrong_answer():
    states = torch.randn(6, 3, 4)
    states[3] = states[1]
    vectors = embed(states, labels(), pooling="mean")
    scores = vectors[:, 0] @ vectors[:, 1].T / 0.1
    alone = [torch.log_softmax(scores[row, [row, 2]], 0)[0] for row in (0, 1)]
    wanted = -(alone[0] + alone[1] + torch.log_softmax(scores[2], 0)[2]) / 3
    found = contrastive_loss({"last_hidden_state": states}, labels(), pooling="mean", temperature=0.1)
    torch.testing.assert_close(found, wanted)
    part = contrastive_loss({"last_hidden_state": states}, labels(), 30, pooling="mean", temperature=0.1)
    torch.testing.assert_close(part, wanted * 15 / 30)  # half of what a step's micro-batches hold


def test_ranks_of_retrieval():
    near = np.eye(3, dtype=np.float32)
    vectors = np.stack([near, near[[0, 2, 1]]], axis=1)
    vectors[1, 0] = [0.8, 0.0, 0.6]  # its own passage is second
    found = retrieval(EvalPrediction(predictions=vectors, label_ids=None))
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert found["recall_at_1"] == pytest.approx(1 / 3)
    assert found["recall_at_10"] == 1
    same = np.ones((4, 2, 1), dtype=np.float32)
    assert retrieval(EvalPrediction(predictions=same, label_ids=None))["recall_at_1"] == 1
