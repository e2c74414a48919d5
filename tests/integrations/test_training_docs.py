"""Every block of docs/training.md runs, section by section."""

import functools

import pytest
import torch
from docs_worker import given
from launching import HERE, TORCHRUN, start
from peft import PeftModel

import adalora
from adalora.lora.state.checkpoint import is_whole
from helpers.docs_blocks import run, sections
from helpers.oldest import compiled_models, needs, shards_on_cpu
from helpers.tiny_bert import bert

SECTIONS = sections("docs/training.md")
SEVERAL = ["DDP", "FSDP2"]  # sections that two processes run
UNCHANGED = ["Hugging Face Trainer", "Accelerate"]  # and that two may run
NEEDS = {"TRL": needs("trl"), "torch.compile": compiled_models, "Quantised bases": needs("bitsandbytes")}
WITH_ADAPTER = ["Your own loop", "torch.compile", "Quantised bases"]
LAYERS = sum(1 for name, _ in bert().named_modules() if name.rpartition(".")[2] in ("query", "value", "dense"))


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """The folder in which two processes have run sections, one after the other, and what they printed."""
    folder = tmp_path_factory.mktemp("by_two")
    return folder, start([*TORCHRUN, str(HERE / "docs_worker.py"), str(folder), *SEVERAL, *UNCHANGED])


@shards_on_cpu
@pytest.mark.parametrize("title", SEVERAL)
def test_two_processes_run_the_blocks_of(title, by_two):
    loaded = PeftModel.from_pretrained(bert(), by_two[0] / title / "adapter")
    ranks = [m.lora_A["default"].out_features for m in loaded.modules() if "default" in getattr(m, "lora_A", {})]
    assert sum(ranks) == 8 * LAYERS


@shards_on_cpu
def test_two_processes_run_the_trainers_and_accelerates_blocks_unchanged(by_two):
    folder, printed = by_two
    assert [printed.count(f"{title}: {8 * LAYERS} of {8 * LAYERS}") for title in UNCHANGED] == [2, 2]
    assert (folder / UNCHANGED[0] / "out" / "checkpoint-20" / "adalora_state.json").is_file()
    assert is_whole(folder / UNCHANGED[1] / "accelerate")


@pytest.mark.parametrize("title", [pytest.param(t, marks=NEEDS.get(t, ())) for t in SECTIONS if t not in SEVERAL])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_blocks_of(title, tmp_path, monkeypatch):
    # The default backend writes C++ and waits for a compiler; the graphs are the same.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    names = given(tmp_path, title)
    for block in SECTIONS[title]:
        run(block, names, where=f"docs/training.md: {title}")
        if "trainer" in names:  # of this block
            (controller,) = adalora.controllers(peft_model(names["trainer"])).values()
            assert controller.finished
            assert controller.step == 20
            assert controller.live == controller.target_budget
    if title in (*WITH_ADAPTER, "Accelerate"):
        assert names["controller"].finished
        assert names["controller"].step == 20
        assert names["controller"].live == names["controller"].target_budget
    if title in WITH_ADAPTER:
        assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    if title == "Hugging Face Trainer":
        assert (tmp_path / "out" / "checkpoint-20" / "adalora_state.json").is_file()
    if title == "TRL":
        assert all((tmp_path / name / "checkpoint-20" / "adalora_state.json").is_file() for name in ("sft", "dpo"))


def peft_model(trainer):
    """Of Hugging Face's trainers or of Lightning's."""
    return trainer.model if hasattr(trainer.model, "peft_config") else trainer.lightning_module.model


def test_there_are_blocks():
    assert set(SEVERAL) < set(SECTIONS)
    assert {*WITH_ADAPTER, "TRL", "Accelerate", "Lightning", "Hugging Face Trainer"} < set(SECTIONS)
    assert len(SECTIONS) >= 10
