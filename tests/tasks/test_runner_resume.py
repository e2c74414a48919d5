"""A recipe's run that is interrupted goes on with --resume; a run out of memory says what to lower."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback

from adalora.errors import RecipeError, TrainingError
from adalora.tasks import runner
from adalora.tasks.runner import run_recipe

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
    done = subprocess.run(started, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["scores"] == whole["scores"]
    assert metrics["final_rank_total"] == whole["final_rank_total"]
    ranks = [
        [json.loads(line).get("ranks") for line in (tmp_path / name / "history.jsonl").read_text().splitlines()]
        for name in ("whole", "run")
    ]
    assert ranks[0] == ranks[1]


def test_nothing_to_resume(tiny_model, data_file, tmp_path, console):
    with pytest.raises(RecipeError, match="has no checkpoint to go on from: train without --resume"):
        run_recipe(recipe(tiny_model, data_file, tmp_path / "run"), resume=True, console=console)


def test_out_of_memory_says_what_to_lower(tiny_model, data_file, tmp_path, console, monkeypatch):
    def exhaust():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with_callback(monkeypatch, exhaust)
    with pytest.raises(TrainingError, match=r"training.batch_size=4 --set training.gradient_accumulation=2"):
        run_recipe(recipe(tiny_model, data_file, tmp_path / "run"), console=console)
