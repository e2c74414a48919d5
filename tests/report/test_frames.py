"""Frames hold exactly what the records hold."""

import numpy as np
import pandas as pd
import pytest

from adalora.errors import HistoryError
from adalora.report.frames import (
    allocations_frame,
    metrics_frame,
    module_scores_frame,
    modules_frame,
    newest_ranks,
    ranks_frame,
    steps_frame,
    to_frames,
)
from adalora.report.history import History
from helpers.synthetic import BERT, run


@pytest.fixture(scope="module")
def history():
    return run(layers=4)


def test_steps(history):
    frame = steps_frame(history)
    records = history.of("step")
    assert frame.index.tolist() == [r["step"] for r in records]
    assert frame["loss"].tolist() == [r["loss"] for r in records]
    assert frame["live"].tolist() == [r["live"] for r in records]


def test_two_records_of_a_step_are_one_row():
    history = run(layers=1, steps=50, stop_at=1)
    history.records[-1]["loss"] = None
    history.add("step", step=0, phase="warmup", budget=72, live=72, loss=2.5, learning_rate=None)
    frame = steps_frame(history)
    assert frame.index.tolist() == [0]
    assert frame.loc[0, "loss"] == 2.5
    assert frame.loc[0, "learning_rate"] == 1e-3


def test_allocations(history):
    frame = allocations_frame(history)
    assert frame["threshold"].tolist() == [r["threshold"] for r in history.of("allocation")]
    assert frame["score_q50"].tolist() == [r["scores"]["q50"] for r in history.of("allocation")]
    assert frame["update_ratio"].tolist() == [r["update_ratio"] for r in history.of("allocation")]


def test_ranks_start_at_the_initial_rank_and_end_at_the_last_record(history):
    frame = ranks_frame(history)
    assert frame.iloc[0].tolist() == [12] * 24
    assert frame.iloc[-1].tolist() == newest_ranks(history) == history.last("finish")["ranks"]
    for record in history.of("allocation"):
        assert frame.loc[record["step"]].tolist() == record["ranks"]


def test_modules(history):
    frame = modules_frame(history)
    assert len(frame) == 4 * len(BERT)
    assert frame["rank"].sum() == sum(history.last("finish")["ranks"]) == 24 * 8
    assert frame["parameters"].sum() == history.last("compaction")["parameters_after"]
    assert frame["score"].tolist() == history.of("allocation")[-1]["module_scores"]


def test_metrics_and_scores(history):
    metrics = metrics_frame(history)
    last = history.of("metric")[-1]
    assert metrics.iloc[-2:]["value"].tolist() == list(last["values"].values())
    scores = module_scores_frame(history)
    assert np.allclose(scores.to_numpy(), [r["module_scores"] for r in history.of("allocation")])


def test_null_is_nan():
    history = run(layers=1, steps=60)
    history.of("allocation")[0]["module_scores"][0] = None
    history.of("step")[3]["loss"] = None
    assert np.isnan(module_scores_frame(history).iloc[0, 0])
    assert np.isnan(steps_frame(history)["loss"].iloc[3])


def test_a_run_that_only_started_has_empty_frames():
    history = run(stop_at=0)
    frames = to_frames(history)
    assert {k for k, v in frames.items() if len(v)} == {"ranks", "modules"}
    assert isinstance(frames["modules"], pd.DataFrame)


def test_no_start_record():
    with pytest.raises(HistoryError, match="no `start` record"):
        modules_frame(History())
