"""Faults: full and read-only disks, Ctrl-C, NaN. The last good checkpoint stays, the message has the cure."""

import ast
import builtins
import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from bert_runs import make
from test_resume_trainer import outcome
from transformers import TrainerCallback

import adalora
from adalora.errors import CheckpointError, TrainingError
from adalora.lora.state.checkpoint import DESCRIPTION, TENSORS, is_whole


@pytest.fixture(autouse=True)
def _own_handler():
    """Whatever another test left behind."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Full:
    """A file on a full disk: takes some bytes, then no more."""

    def __init__(self, file, error):
        self.file, self.error = file, error

    def write(self, data):
        self.file.write(data[:100])
        raise OSError(self.error, os.strerror(self.error))

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize(
    ("error", "message"),
    [(errno.ENOSPC, "the disk is full: free some space"), (errno.EROFS, "read-only: choose another output folder")],
)
@pytest.mark.parametrize("which", [TENSORS, DESCRIPTION])
def test_no_room_for_a_checkpoint(tmp_path, monkeypatch, error, message, which):
    """The error names the folder and the cure, no half of a file stays, the earlier checkpoint is the newest whole."""
    opened = builtins.open
    from pathlib import Path

    original = Path.open

    def limited(self, mode="r", *args, **kwargs):
        file = original(self, mode, *args, **kwargs)
        return Full(file, error) if "checkpoint-8" in str(self) and which in self.name and "w" in mode else file

    monkeypatch.setattr(Path, "open", limited)
    trainer, _ = make(tmp_path, save_steps=4)
    with pytest.raises(CheckpointError, match=rf"checkpoint-8.*{message}.*Earlier checkpoints are untouched"):
        trainer.train()
    assert builtins.open is opened
    assert not list((tmp_path / "checkpoint-8").glob(".*"))
    assert not is_whole(tmp_path / "checkpoint-8")
    assert adalora.latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


class At(TrainerCallback):
    """Does something once, after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action(kwargs["model"])


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(tmp_path, capsys):
    """The resumed run ends like one that was never interrupted."""
    before = signal.getsignal(signal.SIGINT)
    trainer, _ = make(tmp_path / "out", At(9, lambda model: os.kill(os.getpid(), signal.SIGINT)), save_steps=100)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is before
    last = adalora.latest_checkpoint(tmp_path / "out")
    assert last.endswith("checkpoint-10")
    said = f"stopped after step 10; to go on: trainer.train(resume_from_checkpoint={last!r})"
    assert said in capsys.readouterr().out

    trainer, controller = make(tmp_path / "out", save_strategy="no")
    trainer.train(resume_from_checkpoint=last)
    whole, whole_controller = make(tmp_path / "whole", save_strategy="no")
    whole.train()
    first, second = outcome(trainer, controller), outcome(whole, whole_controller)
    assert first["ranks"] == second["ranks"]
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def twice(model):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)

    trainer, _ = make(tmp_path, At(3, twice), save_strategy="no")
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_after_a_training_that_failed_ctrl_c_is_as_before(tmp_path):
    """The handler that was left behind does not swallow it."""

    def fail(model):
        raise RuntimeError("no more")

    trainer, _ = make(tmp_path, At(3, fail), save_strategy="no")
    with pytest.raises(RuntimeError, match="no more"):
        trainer.train()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_finished_run_gives_the_signal_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    make(tmp_path, save_strategy="no")[0].train()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_loss_that_diverges_stops_the_run_and_names_the_last_good_checkpoint(tmp_path):
    def poison(model):
        with torch.no_grad():
            model.base_model.model.classifier.modules_to_save["default"].weight.fill_(float("nan"))

    trainer, _ = make(tmp_path, At(10, poison), save_steps=4)
    with pytest.raises(TrainingError, match=r"after step 11.*last good checkpoint is .*checkpoint-8.*learning_rate"):
        trainer.train()
    assert sorted(f.name for f in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]


SPY = """
import builtins, pickle, sys
loads = []
def spy(name):
    original = getattr(pickle, name)
    def wrapped(*args, **kwargs):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        loads.append(caller)
        return original(*args, **kwargs)
    return wrapped
pickle.load, pickle.loads = spy("load"), spy("loads")
import torch
sys.path.insert(0, sys.argv[2])
from net_runs import attach, lora
from adalora.lora.state.checkpoint import read_state, write_state
controller = attach(lora())
write_state(sys.argv[1], controller.state_dict())
controller.load_state_dict(read_state(sys.argv[1]))
print([name for name in loads if name.startswith("adalora")])
"""


# What can run code that lies in a file, or reads such a format: modules, and functions by their last names.
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
UNSAFE_CALLS = {"torch.load", "np.load", "numpy.load", "torch.hub.load", "read_pickle", "unsafe_load"}
UNSAFE_WORDS = {"allow_pickle": True, "trust_remote_code": True, "weights_only": False}


def unsafe(source):
    """What in a module's text could read a pickle, or code, whatever it is called there."""
    found, names = [], {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            whole = {f"{module}.{a.name}" if module else a.name: a.asname or a.name for a in node.names}
            names |= {local: full for full, local in whole.items()}
            found += [full for full in whole if full.split(".")[0] in UNSAFE_MODULES]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            called = f"{names.get(first, first)}{dot}{rest}"
            found += [called] if called in UNSAFE_CALLS or called.split(".")[-1] in UNSAFE_CALLS else []
            for word in node.keywords:
                value = getattr(word.value, "value", None)
                if word.arg in UNSAFE_WORDS and value is UNSAFE_WORDS[word.arg]:
                    found.append(word.arg)
            if called.endswith("import_module") and getattr(node.args[0], "value", "") in UNSAFE_MODULES:
                found.append(called)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads as read",
        "import torch as t\nt.load(f)",
        "from torch import load\nload(f)",
        "from torch.serialization import load as l\nimport joblib",
        "import numpy as np\nnp.load(f)",
        "frame = pd.read_pickle(f)",
        "AutoModel.from_pretrained(n, trust_remote_code=True)",
        "torch.save(x, f, weights_only=False)",
        "importlib.import_module('pickle')",
    ],
)
def test_the_search_for_pickles_finds_them(source):
    assert unsafe(source)
    assert not unsafe("from safetensors.torch import load\nload(f)\nmodel.from_pretrained(n, trust_remote_code=False)")


def test_no_pickle_is_read(tmp_path):
    """Neither by the state's code, nor anywhere in the source."""
    done = subprocess.run(
        [sys.executable, "-c", SPY, str(tmp_path), os.path.dirname(__file__)],
        capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    from pathlib import Path

    source = Path(adalora.__file__).parent
    for file in source.rglob("*.py"):
        assert not unsafe(file.read_text(encoding="utf-8")), file
