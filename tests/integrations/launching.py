"""Runs the workers of the tests with several processes: starting them takes longer than most cases, so they do many."""

import contextlib
import datetime
import json
import os
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
HANGS = 1800  # seconds; only a guard, for the machine may be busy with other things


def start(command, **environment):
    """Run a command to its end; returns what it printed."""
    fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=HANGS, check=False,
        env={**os.environ, **fixed, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-20000:]
    return done.stdout


def launch(worker, cases, folder):
    """Run cases of a worker in two processes, started once; returns a function that gives a case's result.

    The result is what rank 0 returned. For a case that failed it raises an AssertionError with the traceback.
    """
    start([*TORCHRUN, str(HERE / worker), str(folder), *cases])

    def result(case):
        found = json.loads((folder / f"{case}.json").read_text())
        assert "failed" not in found, found["failed"]
        return found["result"]

    return result


def serve(run):
    """Inside a worker: `run(case, folder)` for every case on the command line, each in a folder of its own.

    A case that fails in both processes is over and the next one begins; if it fails in one the other may wait for it,
    so the rest is left out.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=HANGS / 5))
    for number, case in enumerate(cases):
        (folder / case).mkdir(exist_ok=True)
        result, failed = None, None
        try:
            result = run(case, folder / case)
        except Exception:
            failed = traceback.format_exc()
        alone = False
        try:
            failures = gathered(failed)
            alone = any(failures) and not all(failures)
            failed = next(filter(None, failures), None)
        except Exception:
            alone, failed = True, failed or traceback.format_exc()
        content = {"failed": failed} if failed else {"result": result}
        if dist.get_rank() == 0:
            (folder / f"{case}.json").write_text(json.dumps(content))
            for other in cases[number + 1 :] if alone else []:
                (folder / f"{other}.json").write_text(json.dumps({"failed": f"not run: {case} failed before"}))
        if alone:
            os._exit(0)  # the results say what happened; the group is of no use any more
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    dist.destroy_process_group()


def gathered(value):
    """Inside a worker: the value of every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
