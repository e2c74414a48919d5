"""FSDP2's `fully_shard` on two processes over gloo: the run of one process, to rounding."""

import pytest
import torch
from launching import launch
from one_process import assert_as_in_one_process

from helpers.oldest import shards_on_cpu

COMPARED = ["plain", "svd", "reorthonormal", "magnitude", "hybrid_2x1", "hybrid_1x2"]
RESUMED = ["plain", "svd"]
CASES = {"compare": COMPARED, "resumed": RESUMED}

pytestmark = shards_on_cpu


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    cases = [
        *(f"compare-{name}" for name in COMPARED),
        *(f"resumed-{name}" for name in RESUMED),
        "compacted",
        "refusals",
    ]
    return launch("sharded_worker.py", cases, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("settings", COMPARED)
def test_two_processes_do_what_one_does(result, settings):
    """Losses, masks at every step, ranks and ΔW; what is saved on the way is a plain adapter of the live triplets."""
    found = result(f"compare-{settings}")
    assert found["steps"] == [30, 30]
    assert_as_in_one_process(found)
    assert torch.tensor(found["ΔW"][0]).norm() > 0.1


@pytest.mark.parametrize("settings", RESUMED)
def test_resumed_from_a_distributed_checkpoint(result, settings):
    """Bit for bit, at every kind of moment; one process may take over as well."""
    found = result(f"resumed-{settings}")
    assert found["ranks"][0] == found["ranks"][1]
    assert len(found["moments"]) == {"plain": 5, "svd": 2}[settings]
    assert found["in_memory"] == 15  # masked
    assert found["in_memory_alone"] == 6


def test_a_compacted_adapter_goes_on_sharded(result):
    found = result("compacted")
    assert found["step"] == 30
    assert 0 in found["ranks"].values()
    assert found["saved"] == {name: rank for name, rank in found["ranks"].items() if rank}
    assert found["difference"] < 1e-5


def test_what_cannot_be_done_is_refused(result):
    late, compacted, other = result("refusals")["said"]
    assert "adalora.attach(model) before fully_shard" in late
    assert "sharded parameters cannot change their size" in compacted
    assert "only FSDP2's fully_shard with shards along the first dimension" in other
