"""docs/serving.md says what the code does."""

import re
import shutil
from pathlib import Path

import peft
import pytest
import torch

from adalora.export import FORMATS, export_adapter
from adalora.export.stacks import STACKS
from helpers.docs_blocks import blocks, run

from .conftest import llama, load_peft, logits, randomise, save_ragged
from .test_importing import loralib_state
from .test_real_stacks import picture, unet
from .test_stacks import MATRIX

DOCS = Path(__file__).parents[2] / "docs/serving.md"


@pytest.fixture(scope="module")
def text():
    return DOCS.read_text(encoding="utf-8")


def test_the_table_is_the_tested_matrix(text):
    rows = {}
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")]
        if len(cells) == 6 and cells[0] in {s.name for s in STACKS}:
            rows[cells[0]] = cells[1:]
    for i, stack in enumerate(STACKS):
        wanted = [MATRIX[f][i] for f in ("portable", "ragged", "gguf-ragged", "peft-adalora")]
        assert rows[stack.name] == [stack.version, *wanted]


def test_every_stack_and_every_format_has_its_place(text):
    headings = re.findall(r"^### (.+)$", text, re.MULTILINE)
    for stack in STACKS:
        assert stack.name.split(" ≥")[0].split(" ≤")[0] in headings
    for format in FORMATS:
        assert f"`{format}`" in text


def test_every_section_of_commands_has_a_command(text):
    for section in text.split("\n### ")[1:]:
        assert "```" in section.split("\n## ")[0]


# Blocks that cannot run here.
NOT_RUN = {"TensorRT-LLM": "a server that is not installed; test_stacks.py computes what it computes"}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers.*")
def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("BASE")
    save_ragged(tmp_path / "run")
    export_adapter("run", "served")
    names = {}
    found = [(title, block) for title, language, block in blocks("docs/serving.md") if language == "python"]
    for title, block in found:
        if title == "diffusers":
            live = randomise(peft.get_peft_model(unet(), peft.LoraConfig(target_modules=["to_q", "to_v"])))
            live.save_pretrained("picture")
            shutil.rmtree("served")
            export_adapter("picture", "served")
            names["unet"] = unet()
        if title == "Adapters from elsewhere":
            names["model"] = Released(loralib_state())
        if title not in NOT_RUN:
            run(block, names, where=f"docs/serving.md: {title}")
        if title in ("PEFT", "transformers"):
            assert torch.allclose(logits(names["model"].eval()), logits(load_peft(tmp_path / "served")), atol=1e-6)
        if title == "diffusers":
            assert torch.allclose(picture(names["unet"]), picture(live.base_model.model), atol=1e-5)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert set(NOT_RUN) < {title for title, _ in found}


class Released:
    """A model of the released code: its state is all that is read."""

    def __init__(self, state):
        self.state_dict = lambda: state
