"""The budget curve of tasks that are no classification."""

import json

import pytest

from adalora.tasks.runs.curve import budget_curve, write_curve

from ..conftest import rows
from ..kinds.test_causal_lm import model  # noqa: F401
from ..tiny import make_recipe, run, write_rows

TRAINING = {"max_steps": 60, "batch_size": 8, "learning_rate": 1e-2}


def curve_of(made):
    result = run(made)
    curve = budget_curve(result.folder, budgets=[0.2, 0.6, 1.0])
    assert curve.points[-1].scores[curve.metric] == pytest.approx(result.metrics[curve.metric], rel=1e-4)
    assert json.loads(write_curve(curve, result.folder)[0].read_text())["metric"] == curve.metric
    return [point.scores[curve.metric] for point in curve.points], curve


def test_regression(tiny_model, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", rows(120))
    data = {"files": file, "test_fraction": 0.3, "columns": {"label": "number"}}
    values, curve = curve_of(make_recipe(tmp_path, tiny_model, task="regression", data=data, training=TRAINING))
    assert curve.metric == "pearson"
    assert curve.order.name == "score"
    assert values[-1] > 0.6
    assert values[0] < values[-1]


def test_causal_lm(model, tmp_path):  # noqa: F811
    """Every row counts up: the base model does not know, the adapter does."""
    lines = [{"t": " ".join(f"w{(n + i) % 20}" for i in range(6))} for n in range(120)]
    data = {"files": write_rows(tmp_path / "rows.jsonl", lines), "test_fraction": 0.3, "columns": {"text": "t"}}
    values, curve = curve_of(make_recipe(tmp_path, model, task="causal-lm", data=data, training=TRAINING))
    assert curve.metric == "loss"
    assert values[0] > values[1] > values[-1]
