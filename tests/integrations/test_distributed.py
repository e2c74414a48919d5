"""DDP in two processes over gloo, started by torchrun: ranks agree, nothing diverges."""

import pytest
from launching import launch

from helpers.oldest import checkpoint_of_ddp_on_cpu


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    cases = ["raw", "careless", "environment", "resumed", "trainer", "lightning"]
    return launch("distributed_worker.py", cases, tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("case", ["raw", "careless"])
def test_ddp(result, case):
    """Masked while the wrapper lives, compacted at the end; the old wrapper refuses to train, a new one trains."""
    found = result(case)
    assert found["in_memory"] == found["initial"]
    assert found["after"] == found["target"]
    assert found["ranks"][0] == found["ranks"][1]
    if case == "raw":  # careless users' weights part, as under plain DDP; ranks do not
        assert found["same_before"][0] == found["same_before"][1]
        assert found["same_after"][0] == found["same_after"][1]
    assert "wrap it again" in found["refused"]


def test_ddp_is_an_environment_like_the_others(result):
    """One hook call per step, ranks alike, the task's loss, and a saved adapter that is the live model."""
    found = result("environment")
    assert found["steps"] == 30
    assert found["ranks"][0] == found["ranks"][1]
    assert sum(found["ranks"][0].values()) == found["target"]


def test_ddp_resumes_bit_for_bit(result):
    found = result("resumed")
    assert found["ranks"][0] == found["ranks"][1]
    assert len(found["moments"]) == 6


@checkpoint_of_ddp_on_cpu
def test_ddp_through_the_trainer(result):
    """One controller step for each of the trainer's, with accumulation; a resumed run ends in the same weights.

    Its losses are those of plain LoRA, its checkpoint is the live model.
    """
    found = result("trainer")
    assert found["world"] == 2
    assert found["steps"] == [[n, n] for n in range(1, 17)]
    assert found["ranks"][0] == found["ranks"][1]
    assert found["same"][0] == found["same"][1]
    assert found["live"] == found["in_memory"] == found["target"]
    assert found["resumed_ranks"] == found["ranks"][0]
    assert found["resumed"] == found["same"][0]
    assert found["difference"] < 1e-5
    assert found["losses"]["ours"] == pytest.approx(found["losses"]["plain"], abs=2e-4)
    assert len(found["losses"]["ours"]) == 8


def test_lightnings_ddp(result):
    found = result("lightning")
    assert found["world"] == 2
    assert found["steps"] == [16, 16]
    assert found["ranks"][0] == found["ranks"][1] == found["resumed_ranks"]
    assert found["same"][0] == found["same"][1] == found["resumed"]
    assert found["live"] == found["target"]
