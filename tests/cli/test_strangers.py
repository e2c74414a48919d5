"""Adapter files from strangers: each verb that reads one answers with one line, and writes nothing anywhere."""

import json
import struct
import warnings

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from adalora.cli import commands
from adalora.errors import AdapterFileError

NAME = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": None}
GOOD = {f"{NAME}.lora_A.weight": torch.ones(2, 8), f"{NAME}.lora_B.weight": torch.ones(6, 2)}


def adapter(tensors=GOOD, **config):
    def make(folder):
        save_file(tensors, str(folder / "adapter_model.safetensors"))
        (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))

    return make


def raw(header, data=b"", *, length=None):
    """A file whose header says what nobody's tensors do."""

    def make(folder):
        adapter()(folder)
        text = json.dumps(header).encode()
        said = len(text) if length is None else length
        (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", said) + text + data)

    return make


def pickled(folder):
    adapter()(folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(GOOD, folder / "adapter_model.bin")


def declared(shape, name=f"{NAME}.lora_A.weight"):
    return {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}


STRANGERS = {
    "wrong_shape": adapter({**GOOD, f"{NAME}.lora_B.weight": torch.ones(6, 3)}),
    "one_dimension": adapter({**GOOD, f"{NAME}.lora_B.weight": torch.ones(12)}),
    "missing_key": adapter({f"{NAME}.lora_A.weight": torch.ones(2, 8)}),
    "no_tensors": adapter({}),
    "rank_of_the_config": adapter(r=10**9),
    "rank_pattern": adapter(rank_pattern={"q_proj": 10**12}),
    "config_without_type": adapter(peft_type=None),
    "not_a_number": adapter({**GOOD, f"{NAME}.lora_B.weight": torch.full((6, 2), torch.nan)}),
    "huge_header": raw({}, length=2**62),
    "huge_tensor": raw(declared([2**31, 2**31]), bytes(8)),
    "negative_size": raw(declared([-2, -1]), bytes(8)),
    "cut_off": raw(declared([2]), bytes(3)),
    "path_in_a_name": raw(declared([2], "../../../tmp/x.lora_A.weight"), bytes(8)),
    "absolute_name": raw(declared([2], "/etc/x.lora_A.weight"), bytes(8)),
    "name_in_windows": raw(declared([2], "..\\x.lora_A.weight"), bytes(8)),
    "pickle": pickled,
}
VERBS = {
    "inspect": ["ADAPTER"],
    "verify": ["ADAPTER"],
    "export": ["ADAPTER", "OUT"],
    "compress": ["ADAPTER", "OUT", "--budget", "0.5"],
}


@pytest.mark.parametrize("verb", list(VERBS))
@pytest.mark.parametrize("stranger", list(STRANGERS))
def test_a_stranger_is_refused_in_one_line_and_nothing_is_written(stranger, verb, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    folder = tmp_path / "deep" / "in" / "adapter"
    folder.mkdir(parents=True)
    STRANGERS[stranger](folder)
    before = sorted(tmp_path.rglob("*"))
    app = typer.Typer()
    commands.register(app)
    places = {"ADAPTER": str(folder), "OUT": str(tmp_path / "deep" / "out")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(app, [verb, *[places.get(part, part) for part in VERBS[verb]]])
    assert isinstance(result.exception, AdapterFileError), result.output
    assert "\n" not in str(result.exception)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_same_adapter_without_a_fault_is_taken(tmp_path):
    adapter()(tmp_path)
    app = typer.Typer()
    commands.register(app)
    assert CliRunner().invoke(app, ["inspect", str(tmp_path)]).exit_code == 0
