"""The sentences say what the numbers say."""

import numpy as np

from adalora.report.frames import modules_frame
from adalora.report.summary import strongest_block, summarize
from helpers.synthetic import BERT, importance_of, run


def blocks(*, strong, weak, layers=12):
    """Importance 1 everywhere, more in one rectangle of layers × types and less in another."""
    weight = np.ones((layers, len(BERT)))
    weight[np.ix_(*strong)] = 20
    weight[np.ix_(*weak)] = 0.02
    return weight.ravel()


def test_movement_names_the_rectangles_that_moved():
    history = run(layers=12, importance=blocks(strong=([8, 9, 10, 11], [4, 5]), weak=([0, 1, 2, 3], [0, 1])))
    sentence = next(s for s in summarize(history) if s.startswith("Rank moved"))
    assert "from query and key of layers 0–3 to the feed-forward of layers 8–11:" in sentence


def test_blocks_count_their_triplets():
    history = run(layers=12, importance=blocks(strong=([8, 9], [4]), weak=([0, 1, 2, 3], [0, 1])))
    modules = modules_frame(history)
    lost = strongest_block(modules, gain=False)
    inside = modules[modules["layer"].isin([0, 1, 2, 3]) & modules["type"].isin(["query", "key"])]
    assert lost.triplets == (inside["initial_rank"] * 8 / 12 - inside["rank"]).sum()


def test_even_ranks_are_called_even():
    text = summarize(run(importance=np.ones(36)))
    assert "The rank stayed nearly even: every module kept about the same share." in text


def test_size_parameters_loss_and_metrics_are_those_of_the_history():
    history = run(layers=12)
    text = " ".join(summarize(history))
    done = history.last("compaction")
    assert "72 modules of minilm-l6 went from 864 to 576 triplets" in text
    assert f"{done['parameters_before']:,} to {done['parameters_after']:,} parameters" in text
    losses = [r["loss"] for r in history.of("step")]
    assert f"Training loss fell from {np.mean(losses[:20]):.3g} to {np.mean(losses[-20:]):.3g}" in text
    last = history.of("metric")[-1]
    assert f"accuracy on dev {last['values']['accuracy']:.4g} at step {last['step']}" in text


def test_modules_without_rank_are_counted():
    importance = importance_of(6, BERT)
    importance[[0, 1, 7]] = 1e-6
    text = " ".join(summarize(run(importance=importance)))
    assert "3 modules need no rank at all: query of layer 0, key of layer 0 and key of layer 1." in text


def test_unfinished_and_rising():
    history = run(steps=300, stop_at=100)
    for record in history.of("step"):
        record["loss"] = 1 + record["step"] / 100
    text = " ".join(summarize(history))
    assert "not finished: its newest record is of step 99 of 300" in text
    assert "Training loss rose" in text
    assert "masked, not yet removed" in text


def test_best_metric_knows_its_direction():
    history = run(steps=80, metrics=False)
    for step, value in ((10, 0.5), (20, 0.9), (30, 0.7)):
        history.add("metric", step=step, split="dev", values={"accuracy": value, "perplexity": value})
    text = " ".join(summarize(history))
    assert "accuracy on dev 0.7 at step 30 (highest 0.9 at step 20)" in text
    assert "perplexity on dev 0.7 at step 30 (lowest 0.5 at step 10)" in text


def test_a_run_that_only_started():
    assert summarize(run(stop_at=0))[0] == "36 modules of minilm-l6 hold 432 triplets, as at the start."


def test_a_local_model_is_named_by_its_last_two_parts():
    assert "12 modules of minilm/model hold" in summarize(run(layers=2, stop_at=0, model="/srv/models/minilm/model"))[0]
    assert "12 modules of org/name hold" in summarize(run(layers=2, stop_at=0, model="org/name"))[0]
