"""A recipe's run that is interrupted goes on with --resume; memory or disk at its end cost as little as can be."""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase, TrainerCallback

from adalora.errors import OutOfMemory, RecipeError, StorageError, TrainingError
from adalora.export import read_adapter
from adalora.report.history import History
from adalora.tasks.runs import runner
from adalora.tasks.runs.runner import run_recipe

from .test_runner import recipe


class At(TrainerCallback):
    """Does something once, at the beginning of a step."""

    def __init__(self, action):
        self.action = action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 30:
            self.action()


@pytest.fixture
def console():
    return Console(file=io.StringIO())


def with_callback(monkeypatch, action):
    make = runner.make_trainer

    def made(*args, **kwargs):
        trainer = make(*args, **kwargs)
        trainer.add_callback(At(action))
        return trainer

    monkeypatch.setattr(runner, "make_trainer", made)


def test_ctrl_c_and_resume(tiny_model, data_file, tmp_path, console, monkeypatch, capsys):
    """The command that is printed goes on to the metrics of a run that was left alone."""
    whole = run_recipe(recipe(tiny_model, data_file, tmp_path / "whole"), console=console).metrics
    with monkeypatch.context() as patch:
        with_callback(patch, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe(tiny_model, data_file, tmp_path / "run"), console=console)
    hint = next(line for line in capsys.readouterr().out.splitlines() if "stopped after step 31" in line)
    command = hint.split("to go on: adalora ")[1].split()
    assert command == ["train", str(tmp_path / "run" / "recipe.yaml"), "--resume"]
    started = [sys.executable, "-c", "from adalora.cli import main; main()", *command]
    done = subprocess.run(started, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["scores"] == whole["scores"]
    assert metrics["final_rank_total"] == whole["final_rank_total"]
    ranks = [
        [json.loads(line).get("ranks") for line in (tmp_path / name / "history.jsonl").read_text().splitlines()]
        for name in ("whole", "run")
    ]
    assert ranks[0] == ranks[1]


class Killed(Exception):
    pass


def killed():
    raise Killed


@pytest.mark.parametrize("kind", ["adaptive", "plain", "stream"])
def test_a_killed_run_goes_on_from_what_it_saved(kind, tiny_model, data_file, tmp_path, console, monkeypatch):
    """To the scores of a run that was left alone; a stream in the middle of its second pass."""
    changes = {
        "task": {"name": "classification", "labels": ["negative", "positive"]},
        "training": {"max_steps": 40, "batch_size": 8, "learning_rate": 1e-2, "save_every": 8, "log_every": 4},
    }
    if kind == "plain":
        changes["adalora"] = None
    if kind == "stream":
        changes["data"] = {"files": {"train": str(data_file), "test": str(data_file)}, "streaming": True}
    whole, stopped = (recipe(tiny_model, data_file, tmp_path / name, **changes) for name in ("whole", "stopped"))
    result = run_recipe(whole, console=console)
    with monkeypatch.context() as patch:
        with_callback(patch, killed)  # at step 30
        with pytest.raises(Killed):
            run_recipe(stopped, console=console)
    saved = {path.name for path in (stopped.folder / "work").iterdir()}
    assert saved == {"checkpoint-16", "checkpoint-24"}
    resumed = run_recipe(stopped, resume=True, console=console)
    assert resumed.metrics["steps"] == 40
    assert resumed.metrics["scores"] == result.metrics["scores"]
    assert not (stopped.folder / "work").exists()
    weights = [
        {name: value for name, value in made.trainer.model.state_dict().items() if "lora_" in name}
        for made in (result, resumed)
    ]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    if kind != "plain":
        told = [History.read(made.folder / "history.jsonl") for made in (result, resumed)]
        ranks, losses = ([[record.get(key) for record in history] for history in told] for key in ("ranks", "loss"))
        assert ranks[0] == ranks[1]
        assert losses[0] == losses[1]


def test_the_best_checkpoints_are_written_by_evaluations_alone(tiny_model, data_file, tmp_path):
    training = {"keep_best": True, "evaluate_every": 10, "save_every": 5}
    with pytest.raises(RecipeError, match=r"save_every=5: keep_best writes .*: --set training.save_every=null"):
        recipe(tiny_model, data_file, tmp_path, training=training)
    assert "save_every" not in recipe(tiny_model, data_file, tmp_path).to_dict()["training"]


def test_nothing_to_resume(tiny_model, data_file, tmp_path, console):
    with pytest.raises(RecipeError, match="has no checkpoint to go on from: train without --resume"):
        run_recipe(recipe(tiny_model, data_file, tmp_path / "run"), resume=True, console=console)


def exhaust(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("action", [exhaust, lambda: torch.empty(2**46)])
def test_out_of_memory_says_what_to_lower(tiny_model, data_file, tmp_path, console, monkeypatch, action):
    """On a device, and on the processor."""
    with_callback(monkeypatch, action)
    with pytest.raises(OutOfMemory, match=r"training.batch_size=4 --set training.gradient_accumulation=2"):
        run_recipe(recipe(tiny_model, data_file, tmp_path / "run"), console=console)


@pytest.mark.parametrize("action", [exhaust, lambda *_: torch.empty(2**46)])
def test_out_of_memory_in_the_evaluation(tiny_model, data_file, tmp_path, console, monkeypatch, action):
    """The adapter is there already."""
    monkeypatch.setattr("adalora.tasks.kinds.base.Task.evaluate", action)
    with pytest.raises(OutOfMemory, match=r"out of memory in the evaluation: --set training.eval_batch_size=16"):
        run_recipe(recipe(tiny_model, data_file, tmp_path / "run"), console=console)
    assert sum(read_adapter(tmp_path / "run" / "adapter").ranks.values()) == 26


def test_a_loss_that_diverges_names_the_recipes_own_fields(tiny_model, data_file, tmp_path, console, monkeypatch):
    seen = []

    def poison():
        with torch.no_grad():
            seen[0].get_parameter(seen[1]).fill_(torch.nan)

    build = runner.build_model

    def built(*args):
        model = build(*args)
        seen[:] = [model, next(name for name, p in model.named_parameters() if "lora_B" in name)]
        return model

    monkeypatch.setattr(runner, "build_model", built)
    with_callback(monkeypatch, poison)
    with pytest.raises(TrainingError, match=r"no checkpoint was written before \(training.save_every\)"):
        run_recipe(recipe(tiny_model, data_file, tmp_path / "run"), console=console)


def full_disk(folder, monkeypatch):
    """Nothing more fits into a folder, after the adapter's weights."""
    save = PreTrainedTokenizerBase.save_pretrained

    def limited(self, path, *args, **kwargs):
        if str(path).startswith(str(folder)):
            raise Exception("No space left on device (os error 28)")  # as tokenizers does
        return save(self, path, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", limited)


def test_a_full_disk_at_the_end_does_not_cost_the_adapter(tiny_model, data_file, tmp_path, console, monkeypatch):
    """It goes to another file system, and the message says where; no half of it stays."""
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "other"))
    full_disk(tmp_path / "run", monkeypatch)
    with pytest.raises(StorageError, match=r"adapter: the disk is full: .*What was trained is in .*other") as caught:
        run_recipe(recipe(tiny_model, data_file, tmp_path / "run"), console=console)
    assert not list((tmp_path / "run").glob("adapter*"))
    saved = Path(str(caught.value).split("What was trained is in ")[1])
    assert sum(read_adapter(saved).ranks.values()) == 26
    assert (saved / "labels.json").is_file()

    full_disk(tmp_path, monkeypatch)
    with pytest.raises(StorageError, match=r"Nor could the adapter be written to .*other: the disk is full"):
        run_recipe(recipe(tiny_model, data_file, tmp_path / "second"), console=console)


def test_an_evaluation_that_fails_does_not_cost_the_adapter(tiny_model, data_file, tmp_path, console, monkeypatch):
    def fail(*_):
        raise RuntimeError("no metric")

    monkeypatch.setattr("adalora.tasks.kinds.base.Task.evaluate", fail)
    with pytest.raises(RuntimeError, match="no metric"):
        run_recipe(recipe(tiny_model, data_file, tmp_path / "run"), console=console)
    assert sum(read_adapter(tmp_path / "run" / "adapter").ranks.values()) == 26
