"""Two processes over gloo, started by torchrun: ranks agree, nothing diverges."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("distributed_worker.py")


def launch(case, folder):
    """Run one case in two processes; returns what rank 0 wrote."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(WORKER), case, str(folder)],
        capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / f"{case}.json").read_text())


@pytest.mark.parametrize("case", ["raw", "careless"])
def test_ddp(tmp_path, case):
    """Masked while the wrapper lives, compacted at the end; the old wrapper refuses to train, a new one trains."""
    result = launch(case, tmp_path)
    assert result["in_memory"] == result["initial"]
    assert result["after"] == result["target"]
    assert result["ranks"][0] == result["ranks"][1]
    if case == "raw":  # careless users' weights part, as under plain DDP; ranks do not
        assert result["same_before"][0] == result["same_before"][1]
        assert result["same_after"][0] == result["same_after"][1]
    assert "wrap it again" in result["refused"]


def test_ddp_through_the_trainer(tmp_path):
    """One controller step for each of the trainer's, with accumulation; a resumed run ends in the same weights."""
    result = launch("trainer", tmp_path)
    assert result["world"] == 2
    assert result["steps"] == [[n, n] for n in range(1, 17)]
    assert result["ranks"][0] == result["ranks"][1]
    assert result["same"][0] == result["same"][1]
    assert result["live"] == result["in_memory"] == result["target"]
    assert result["resumed_ranks"] == result["ranks"][0]
    assert result["resumed"] == result["same"][0]
    assert len(result["losses"]) == 4
