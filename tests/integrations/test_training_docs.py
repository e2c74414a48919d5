"""Every block of docs/training.md runs, section by section."""

import pytest
from docs_worker import given
from launching import HERE, TORCHRUN, start
from peft import PeftModel
from test_resume_trainer import bert

from docs_blocks import run, sections

SECTIONS = sections("docs/training.md")


SEVERAL = ["DDP", "FSDP2"]  # sections that two processes run


@pytest.mark.parametrize("title", SEVERAL)
def test_two_processes_run_the_blocks_of(title, tmp_path):
    start([*TORCHRUN, str(HERE / "docs_worker.py"), title, str(tmp_path)])
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "adapter")
    ranks = [m.lora_A["default"].out_features for m in loaded.modules() if "default" in getattr(m, "lora_A", {})]
    layers = sum(1 for name, _ in bert().named_modules() if name.rpartition(".")[2] in ("query", "value", "dense"))
    assert sum(ranks) == 8 * layers


@pytest.mark.parametrize("title", [title for title in SECTIONS if title not in SEVERAL])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_blocks_of(title, tmp_path):
    if title == "Lightning":
        pytest.importorskip("lightning")
    names = given(tmp_path)
    for block in SECTIONS[title]:
        run(block, names, where=f"docs/training.md: {title}")
    controller = names.get("controller")
    if title in ("Your own loop", "Accelerate"):
        assert controller.finished
        assert controller.live == controller.target_budget
    if title == "Hugging Face Trainer":
        assert (tmp_path / "out" / "checkpoint-20" / "adalora_state.json").is_file()


def test_there_are_blocks():
    assert set(SEVERAL) < set(SECTIONS)
    assert len(SECTIONS) >= 7
