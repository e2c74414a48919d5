"""Every block of docs/training.md runs, section by section."""

import pytest
import torch
from test_resume_trainer import Tokens, bert

from docs_blocks import run, sections

SECTIONS = sections("docs/training.md")


@pytest.mark.parametrize("title", SECTIONS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_blocks_of(title, tmp_path):
    if title == "Lightning":
        pytest.importorskip("lightning")
    inputs = torch.randint(0, 100, (4, 10))
    names = {
        "base": bert(),
        "fresh_base": bert,
        "dataset": Tokens(64),
        "batches": [{"input_ids": inputs, "labels": (inputs[:, 0] > 50).long()}] * 20,
        "folder": str(tmp_path),
    }
    for block in SECTIONS[title]:
        run(block, names, where=f"docs/training.md: {title}")
    controller = names.get("controller")
    if title in ("Your own loop", "Accelerate"):
        assert controller.finished
        assert controller.live == controller.target_budget
    if title == "Hugging Face Trainer":
        assert (tmp_path / "out" / "checkpoint-20" / "adalora_state.json").is_file()


def test_there_are_blocks():
    assert len(SECTIONS) >= 5
