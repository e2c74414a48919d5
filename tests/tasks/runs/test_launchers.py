"""`adalora train` under the ecosystem's launchers, unchanged: two processes train one run, one of them writes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from adalora.tasks.recipe.files import dump_recipe

from ..conftest import rows
from ..tiny import make_recipe, run, write_rows

pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="the launchers would take the GPUs")
PAGE = Path(__file__).parents[3] / "docs" / "training.md"
COMMANDS = re.findall(r"^(?:torchrun|accelerate) .*recipe\.yaml$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
STREAM = {"train": 84, "validation": 12, "test": 24}  # so that the run reads it twice
LAUNCHERS = {command.split()[0]: command for command in COMMANDS}


def start(launcher, recipe):
    """Run the page's command on a recipe."""
    program, *arguments = LAUNCHERS[launcher].replace("recipe.yaml", str(recipe)).split()
    return subprocess.run(
        [sys.executable, str(Path(sys.executable).with_name(program)), *arguments],
        capture_output=True, text=True, timeout=1800, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def table(path, count):
    """A file whose texts get longer from row to row, and short again."""
    return write_rows(path, [{**row, "text": row["text"] + " my bag" * (n % 7)} for n, row in enumerate(rows(count))])


def test_the_page_has_both_launchers():
    assert sorted(LAUNCHERS) == ["accelerate", "torchrun"]


def written(folder, tiny_model, *, batch_size, streaming=False):
    """A recipe on local files; what is read as a stream has held-out ones."""
    folder.mkdir()
    data = {"files": table(folder.parent / "rows.jsonl", 120), "test_fraction": 0.2, "validation_fraction": 0.1}
    if streaming:
        files = {split: table(folder.parent / f"{split}.jsonl", count) for split, count in STREAM.items()}
        data = {"files": files, "streaming": True}
    return make_recipe(
        folder, tiny_model, task={"name": "classification", "labels": ["negative", "positive"]}, data=data,
        training={"max_steps": 20, "batch_size": batch_size, "learning_rate": 1e-2, "log_every": 5,
                  "length_grouping": False, "evaluate_every": 10, "keep_best": True, "eval_batch_size": 12},
    )  # fmt: skip


def records(folder):
    return [json.loads(line) for line in (folder / "run" / "history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("launcher", "streaming"), [("torchrun", False), ("accelerate", True)])
def test_two_processes_train_one_run(launcher, streaming, tiny_model, tmp_path):
    """As one process does whose batches are twice as large."""
    alone, folder = tmp_path / "alone", tmp_path / launcher
    run(written(alone, tiny_model, batch_size=8, streaming=streaming))
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(written(folder, tiny_model, batch_size=4, streaming=streaming)))
    done = start(launcher, file)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    assert done.stdout.count("rows of the test split") == 1
    assert done.stdout.count("step 20/20") == 1
    names = {path.name for path in (folder / "run").iterdir()}
    assert names == {path.name for path in (alone / "run").iterdir()}
    metrics, its = (json.loads((f / "run" / "metrics.json").read_text()) for f in (folder, alone))
    assert metrics["steps"] == its["steps"] == 20
    assert metrics["ranks"] == its["ranks"]
    assert metrics["scores"] == pytest.approx(its["scores"], abs=1e-4)
    events = [record["event"] for record in records(folder)]
    assert events.count("start") == events.count("finish") == 1  # written by one process
    losses, its_losses = ([r["loss"] for r in records(f) if "loss" in r] for f in (folder, alone))
    assert losses == pytest.approx(its_losses, abs=1e-3)
    assert len(losses) == 4

    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    loaded = PeftModel.from_pretrained(model, folder / "run" / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "adapter")
    with torch.no_grad():
        assert bool(loaded(**tokenizer("good flight", return_tensors="pt")).logits.isfinite().all())


# `accelerate launch` leaves processes to torchrun's agent, so one of them tells of both.
@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_a_refusal_ends_all_processes(launcher, tiny_model, tmp_path):
    """The first process alone looks at the folder; the other one must not wait for it for ever."""
    recipe = written(tmp_path / launcher, tiny_model, batch_size=4)
    recipe.folder.mkdir()
    (recipe.folder / "metrics.json").write_text("{}")
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    done = start(launcher, file)
    assert done.returncode != 0
    assert "already holds a run (metrics.json); add --overwrite" in done.stderr
