"""Two processes over gloo, started by torchrun: ranks agree, nothing diverges."""

import pytest
from launching import launch

WORKER = "distributed_worker.py"


@pytest.mark.parametrize("case", ["raw", "careless"])
def test_ddp(tmp_path, case):
    """Masked while the wrapper lives, compacted at the end; the old wrapper refuses to train, a new one trains."""
    result = launch(WORKER, case, tmp_path)
    assert result["in_memory"] == result["initial"]
    assert result["after"] == result["target"]
    assert result["ranks"][0] == result["ranks"][1]
    if case == "raw":  # careless users' weights part, as under plain DDP; ranks do not
        assert result["same_before"][0] == result["same_before"][1]
        assert result["same_after"][0] == result["same_after"][1]
    assert "wrap it again" in result["refused"]


def test_ddp_is_an_environment_like_the_others(tmp_path):
    """One hook call per step, ranks alike, the task's loss, and a saved adapter that is the live model."""
    result = launch(WORKER, "environment", tmp_path)
    assert result["steps"] == 30
    assert result["ranks"][0] == result["ranks"][1]
    assert sum(result["ranks"][0].values()) == result["target"]


def test_ddp_resumes_bit_for_bit(tmp_path):
    result = launch(WORKER, "resumed", tmp_path)
    assert result["ranks"][0] == result["ranks"][1]
    assert len(result["moments"]) == 6


def test_ddp_through_the_trainer(tmp_path):
    """One controller step for each of the trainer's, with accumulation; a resumed run ends in the same weights."""
    result = launch(WORKER, "trainer", tmp_path)
    assert result["world"] == 2
    assert result["steps"] == [[n, n] for n in range(1, 17)]
    assert result["ranks"][0] == result["ranks"][1]
    assert result["same"][0] == result["same"][1]
    assert result["live"] == result["in_memory"] == result["target"]
    assert result["resumed_ranks"] == result["ranks"][0]
    assert result["resumed"] == result["same"][0]
    assert len(result["losses"]) == 4
