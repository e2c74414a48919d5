import json
import subprocess
import sys

import pytest
import torch

from adalora.errors import AdapterFileError
from adalora.tasks.recipe.files import catalogue
from adalora.tasks.runs.prediction import load_saved


def adalora(*arguments):
    command = [sys.executable, "-c", "from adalora.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_recipes_lists_every_name_whole_however_narrow_the_window(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    listed = adalora("recipes").stdout
    words = set(listed.split())
    missing = [entry.name for entry in catalogue() if not set(entry.name.split(":")) <= words]
    assert missing == []
    assert "adalora train NAME" in listed


def test_predict_without_a_run_says_how_to_train(tmp_path):
    result = adalora("demo", "--out", str(tmp_path), "--predict", "hello")
    assert result.returncode == 2
    assert "adalora demo" in result.stderr


def test_predict_reads_no_pickle(tmp_path, monkeypatch):
    """PEFT would, where the safetensors file is missing."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/labels.json").write_text("{}")
    torch.save({}, tmp_path / "adapter/adapter_model.bin")
    with pytest.raises(AdapterFileError, match="holds no trained adapter"):
        load_saved(tmp_path)


def test_a_finished_demo_is_shown_not_trained(tmp_path):
    metrics = {
        "name": "airline-sentiment", "evaluated_on": "1 row", "scores": {"accuracy": 0.9}, "seconds": 1.0,
        "trainable_parameters_before": 2, "trainable_parameters_after": 1, "adapter_parameters": 1,
    }  # fmt: skip
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    result = adalora("demo", "--out", str(tmp_path))
    assert result.returncode == 0
    assert "0.9000" in result.stdout
    assert "--overwrite" in result.stdout


@pytest.mark.parametrize("recipe", ["no-such-recipe", "missing.yaml"])
def test_unknown_recipe(recipe):
    result = adalora("train", recipe)
    assert result.returncode == 2
    assert recipe in result.stderr
