"""FSDP2's `fully_shard` on two processes over gloo: the run of one process, to rounding."""

import pytest
import torch
from launching import launch

WORKER = "sharded_worker.py"


@pytest.mark.parametrize("settings", ["plain", "svd", "reorthonormal", "magnitude"])
def test_two_processes_do_what_one_does(tmp_path, settings):
    """Losses, masks at every step, ranks and ΔW; what is saved on the way is a plain adapter of the live triplets."""
    result = launch(WORKER, f"compare-{settings}", tmp_path)
    assert result["steps"] == [30, 30]
    losses, alone = map(torch.tensor, result["losses"])
    torch.testing.assert_close(losses, alone, atol=1e-5, rtol=1e-5)
    assert all(first == second == single for first, second, single in result["masks"])
    assert len({str(masks) for masks in result["masks"]}) > 3
    assert result["saved_ranks"] == {name: rank for name, rank in result["ranks"].items() if rank}
    assert sum(result["saved_ranks"].values()) == result["target"] == 6
    here, there = map(torch.tensor, result["ΔW"])
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)
    assert here.norm() > 0.1


@pytest.mark.parametrize("settings", ["plain", "svd"])
def test_resumed_from_a_distributed_checkpoint(tmp_path, settings):
    """Bit for bit, at every kind of moment; one process may take over as well."""
    result = launch(WORKER, f"resumed-{settings}", tmp_path)
    assert result["ranks"][0] == result["ranks"][1]
    assert len(result["moments"]) == 5
    assert result["in_memory"] == 15  # masked
    assert result["in_memory_alone"] == 6


def test_what_cannot_be_done_is_refused(tmp_path):
    late, compacted, other = launch(WORKER, "refusals", tmp_path)["said"]
    assert "adalora.attach(model) before fully_shard" in late
    assert "sharded parameters cannot change their size" in compacted
    assert "only FSDP2's fully_shard with shards along the first dimension" in other
