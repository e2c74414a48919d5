"""Runs the workers of the tests with several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def start(command, **environment):
    """Run a command to its end; returns what it printed."""
    fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, **fixed, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-20000:]
    return done.stdout


def launch(worker, case, folder):
    """Run one case of a worker in two processes; returns what rank 0 wrote."""
    start([*TORCHRUN, str(HERE / worker), case, str(folder)])
    return json.loads((folder / f"{case}.json").read_text())


def gathered(value):
    """Inside a worker: the value of every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
