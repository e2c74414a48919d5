"""Files of a training state that are not what was written: refused by name, with the way on."""

import hashlib
import json

import pytest
import torch

from adalora.errors import CheckpointError
from adalora.lora.state import checkpoint
from adalora.lora.state.checkpoint import DESCRIPTION, TENSORS, latest_checkpoint, read_state, write_state


@pytest.fixture
def folder(tmp_path):
    """A whole checkpoint."""
    write_state(tmp_path / "checkpoint-3", {"tensors": {"a": torch.arange(3)}, "step": 3})
    return tmp_path / "checkpoint-3"


def rewrite(folder, change, *, sealed=True):
    """Change the description; `sealed` gives it a checksum that holds."""
    file = folder / DESCRIPTION
    value = json.loads(file.read_text())
    change(value)
    if sealed:
        value["sha256"] = hashlib.sha256(checkpoint._canonical(value["state"])).hexdigest()
    file.write_text(json.dumps(value))


def test_what_was_written_is_read(folder):
    state = read_state(folder)
    assert state["step"] == 3
    assert torch.equal(state["tensors"]["a"], torch.arange(3))
    assert latest_checkpoint(folder.parent) == str(folder)


def test_no_folder_has_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("change", "sealed", "message"),
    [
        (lambda value: value.update(format=99), True, "format 99, this version reads 1"),
        (lambda value: value["state"].update(step=4), False, "its checksum does not hold"),
        (lambda value: value["state"]["files"].update({TENSORS: None}), True, "nothing is known of it"),
        (lambda value: value["state"]["files"].update({"../x": {}}), True, "is no name of a file in that folder"),
    ],
)
def test_a_changed_description(folder, change, sealed, message):
    rewrite(folder, change, sealed=sealed)
    with pytest.raises(CheckpointError, match=message):
        read_state(folder)


def test_a_description_that_is_none(folder, monkeypatch):
    (folder / DESCRIPTION).write_text("[1]")
    with pytest.raises(CheckpointError, match="not a checkpoint's description"):
        read_state(folder)
    monkeypatch.setattr(checkpoint, "MAX_JSON_BYTES", 2)
    with pytest.raises(CheckpointError, match="3 bytes, which no checkpoint of ours has"):
        read_state(folder)


def test_tensors_that_are_no_safetensors_file(folder):
    """Sealed all the same: the checksums are right, the content is not."""
    (folder / TENSORS).write_bytes(b"no tensors")
    entry = {"bytes": 10, "sha256": hashlib.sha256(b"no tensors").hexdigest()}
    rewrite(folder, lambda value: value["state"]["files"].update({TENSORS: entry}))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_state(folder)
