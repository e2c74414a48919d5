"""Full disks and exhausted memory, as the libraries below us report them."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch

import adalora
from adalora.cli import commands, main
from adalora.errors import AdaLoraWarning
from adalora.faults import is_out_of_memory, storage_fault
from adalora.report.history import History

FULL = "/dev/full"  # takes nothing, with the error of a full disk
needs_full = pytest.mark.skipif(not os.path.exists(FULL), reason="this system has no /dev/full")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full: free some space"),
        (errno.EDQUOT, "the quota is used up"),
        (errno.EROFS, "read-only: choose another output folder"),
        (errno.EACCES, "no permission to write there: choose another"),
        (errno.EFBIG, "ulimit -f"),
    ],
)
def test_errors_of_the_system(number, words):
    assert words in storage_fault(OSError(number, os.strerror(number)))


def test_other_errors_are_none_of_it():
    for error in (OSError(errno.ENOENT, "no such file"), ValueError("disk"), RuntimeError("no"), MemoryError()):
        assert storage_fault(error) is None
    for error in (RuntimeError("shapes differ"), ValueError("out of memory"), OSError(errno.ENOSPC, "full")):
        assert not is_out_of_memory(error)


LIMITED = """
import resource, sys
import safetensors.torch, torch
from tokenizers import Tokenizer, models
from adalora.faults import storage_fault
tensor = torch.zeros(100_000)
words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(10_000)}, unk_token="w0"))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for save in (
    lambda file: safetensors.torch.save_file({"a": tensor}, file),
    lambda file: torch.save(tensor, file),
    lambda file: words.save(file),
    lambda file: open(file, "wb").write(bytes(100_000)),
):
    try:
        save(sys.argv[1])
    except Exception as error:
        print(storage_fault(error), "<-", repr(error)[:200])
    else:
        print("None <- written")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits there")
def test_files_that_every_library_cannot_write_are_known(tmp_path):
    """A real write that fails half-way: a limit on the size of files stands for the end of the disk."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "file")],
        capture_output=True,
        text=True,
        timeout=1800,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert not [line for line in lines if line.startswith("None")], lines


def test_memory_that_is_not_there():
    """On the processor it is a plain RuntimeError."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(MemoryError())


@needs_full
def test_a_full_disk_stops_no_run_for_its_history(tmp_path):
    """What could not be written is told once, kept, and written when there is room again."""
    (tmp_path / "history.jsonl").symlink_to(FULL)
    history = History()
    history.path = tmp_path / "history.jsonl"
    with pytest.warns(AdaLoraWarning, match=r"history\.jsonl: the disk is full: .*The run goes on"):
        history.add("step", step=0)
    history.add("step", step=1)  # a second warning would be an error here
    (tmp_path / "history.jsonl").unlink()
    history.add("step", step=2)
    assert [json.loads(line)["step"] for line in (tmp_path / "history.jsonl").read_text().splitlines()] == [0, 1, 2]
    assert len(history) == 3


def test_half_a_line_is_taken_back(tmp_path, monkeypatch):
    """A reader, and the next line, find whole lines only."""
    from pathlib import Path

    history = History(tmp_path / "history.jsonl")
    history.add("step", step=0)
    original = Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(data[:7])
            self.file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, mode="r", **k: Full(original(self, mode, **k)))
        with pytest.warns(AdaLoraWarning, match="the disk is full"):
            history.add("step", step=1)
    assert [record["step"] for record in History.read(tmp_path)] == [0]
    history.add("step", step=2)
    assert [record["step"] for record in History.read(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/adapter"), "error: out/adapter: the disk is full"),
        (OSError(errno.EROFS, "Read-only file system", "out"), "error: out: the file system is read-only"),
        (Exception("No space left on device (os error 28)"), "error: the disk is full"),
    ],
)
def test_the_command_line_says_it_in_one_line(monkeypatch, capsys, error, said):
    def fail(app):
        app.command("fail")(lambda: (_ for _ in ()).throw(error))

    monkeypatch.setattr(commands, "register", fail)
    monkeypatch.setattr(sys, "argv", ["adalora", "fail"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(said)
    assert told.count("\n") == 1


def test_pruned_triplets_that_cannot_be_written_cost_no_adapter(tmp_path):
    """The run ends at its target, with a warning."""
    from peft import LoraConfig, get_peft_model
    from torch import nn

    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(r=4, target_modules=["0"]))
    (tmp_path / "in the way").write_text("")
    controller = adalora.attach(model, target_rank=2, total_steps=20, pruned=tmp_path / "in the way" / "pruned")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(20):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        (model(x) - x[:, 1:] * x[:, :1]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.warns(AdaLoraWarning, match="What was pruned is not kept"):
        controller.finalize()
    assert controller.finished
    assert controller.live == 2
