"""FSDP2 by Accelerate's plugin and by the Trainer's `fsdp`, on two processes over gloo."""

import pytest
from launching import launch
from one_process import assert_as_in_one_process

from helpers.oldest import shards_on_cpu

# Sharded files; and whole ones, with weights that only the first process holds until they are sharded.
ACCELERATE = ["accelerate", "accelerate_efficient"]

pytestmark = shards_on_cpu


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return launch("accelerate_worker.py", [*ACCELERATE, "trainer"], tmp_path_factory.mktemp("by_others"))


@pytest.mark.parametrize("case", ACCELERATE)
def test_accelerate(result, case):
    """One hook call per step, ranks alike, the losses of one process; `load_state` goes on bit for bit (the worker)."""
    found = result(case)
    assert found["steps"] == list(range(1, 31))
    assert_as_in_one_process(found)
    assert found["latest"].endswith("at_17")


def test_trainer(result):
    """With accumulation; its losses are those of plain LoRA, its checkpoints plain adapters; resumed bit for bit."""
    found = result("trainer")
    assert found["sharded"]
    assert found["steps"] == [[n, n] for n in range(1, 17)]
    assert found["ranks"][0] == found["ranks"][1] == found["resumed_ranks"]
    assert found["differing"] == []
    assert found["live"] == found["target"] == 16
    assert found["difference"] < 1e-5
    assert found["of_checkpoint"] < 1e-5
    assert found["losses"]["ours"] == pytest.approx(found["losses"]["plain"], abs=2e-4)
    assert len(found["losses"]["ours"]) == 8
    assert "TrainingArguments(…, resume_from_checkpoint=…)" in found["refused"]
