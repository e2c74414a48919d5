"""What a sharded run has in common with the same run in one process."""

import torch


def assert_as_in_one_process(found):
    """Losses, masks at every step, ranks of the saved adapter, ΔW.

    Args:
        found: What a worker returned: `losses` and `ΔW` of both runs, `masks` of both processes and of the one.
    """
    losses, alone = map(torch.tensor, found["losses"])
    torch.testing.assert_close(losses, alone, atol=1e-5, rtol=1e-5)
    assert all(first == second == single for first, second, single in found["masks"])
    assert len({str(masks) for masks in found["masks"]}) > 3
    assert found["saved_ranks"] == {name: rank for name, rank in found["ranks"].items() if rank}
    assert sum(found["saved_ranks"].values()) == found["target"] == 6
    here, there = map(torch.tensor, found["ΔW"])
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)
