import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from adalora.errors import ConfigError, DataError, RecipeError
from adalora.tasks.recipe.fields import Recipe
from adalora.tasks.runs.prediction import predict
from adalora.tasks.runs.runner import run_recipe


def recipe(tiny_model, data_file, folder, **changes):
    fields = {
        "model": str(tiny_model),
        "task": "classification",
        "data": {"files": str(data_file), "test_fraction": 0.2, "validation_fraction": 0.1},
        "lora": {"r": 3, "lora_alpha": 8, "target_modules": "all-linear"},
        "adalora": {"target_rank": 2},
        "training": {"max_steps": 60, "batch_size": 8, "learning_rate": 1e-2},
        "output": str(folder),
    }
    return Recipe.parse({**fields, **changes})


@pytest.fixture
def console():
    return Console(file=io.StringIO())


def test_a_run_writes_everything(tiny_model, data_file, tmp_path, console):
    folder = tmp_path / "run"
    result = run_recipe(recipe(tiny_model, data_file, folder), console=console)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["final_rank_total"] == metrics["target_rank_total"] == 26
    assert metrics["initial_rank_total"] == 39
    assert metrics["accuracy"] > metrics["majority_accuracy"]
    for key in ("macro_f1", "adapter_parameters", "seconds", "versions"):
        assert key in metrics
    assert {p.name for p in folder.iterdir()} == {
        "adapter", "history.jsonl", "metrics.json", "pruned.safetensors", "recipe.yaml", "report.html"
    }  # fmt: skip
    assert "final  triplets 26 of budget 26" in console.file.getvalue()
    assert predict(folder, "good flight")["positive"] > 0.5
    assert predict(folder, "awful flight")["negative"] > 0.5

    stored = sum(p.numel() for n, p in result.trainer.model.named_parameters() if ".lora_" in n)
    assert stored == metrics["adapter_parameters"]


def test_saved_adapter_answers_without_adalora(tiny_model, data_file, tmp_path, console):
    folder = tmp_path / "run"
    run_recipe(recipe(tiny_model, data_file, folder), console=console)
    expected = predict(folder, "bad bag")
    code = (
        "import sys, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForSequenceClassification as M, AutoTokenizer\n"
        f"t = AutoTokenizer.from_pretrained({str(folder / 'adapter')!r})\n"
        f"m = PeftModel.from_pretrained(M.from_pretrained({str(tiny_model)!r}, num_labels=2), "
        f"{str(folder / 'adapter')!r}).eval()\n"
        "assert 'adalora' not in sys.modules\n"
        "print(m(**t('bad bag', return_tensors='pt')).logits.softmax(-1)[0].tolist())\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == pytest.approx([expected["negative"], expected["positive"]], abs=1e-5)


def test_a_launcher_that_cuts_the_model_is_refused_before_anything_is_written(
    tiny_model, data_file, tmp_path, console, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="--use_fsdp"):
        run_recipe(recipe(tiny_model, data_file, tmp_path / "run"), console=console)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten_by_accident(tiny_model, data_file, tmp_path, console):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="--overwrite"):
        run_recipe(recipe(tiny_model, data_file, folder), console=console)
    assert (folder / "metrics.json").read_text() == "{}"
    run_recipe(recipe(tiny_model, data_file, folder), overwrite=True, console=console)
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("task", "columns", "metric"),
    [
        ("sentence-pair", {}, "accuracy"),
        ("multi-label", {}, "micro_f1"),
        ("regression", {"label": "number"}, "pearson"),
    ],
)
def test_other_tasks(tiny_model, data_file, tmp_path, console, task, columns, metric):
    changes = {
        "task": task,
        "data": {"files": str(data_file), "test_fraction": 0.3, "columns": columns},
        "training": {"max_steps": 60, "batch_size": 8, "learning_rate": 1e-2},
    }
    metrics = run_recipe(recipe(tiny_model, data_file, tmp_path / "run", **changes), console=console).metrics
    assert metrics[metric] > 0.6


def test_plain_lora_and_keep_best(tiny_model, data_file, tmp_path, console):
    changes = {
        "adalora": None,
        "training": {"max_steps": 20, "batch_size": 8, "evaluate_every": 10, "keep_best": True},
    }
    metrics = run_recipe(recipe(tiny_model, data_file, tmp_path / "run", **changes), console=console).metrics
    assert "final_rank_total" not in metrics


def test_missing_column_is_named(tiny_model, data_file, tmp_path, console):
    changes = {"data": {"files": str(data_file), "columns": {"text": "txt"}}}
    with pytest.raises(DataError, match="txt"):
        run_recipe(recipe(tiny_model, data_file, tmp_path / "run", **changes), console=console)
