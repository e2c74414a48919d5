"""Runs the workers of the tests with several processes: importing takes longer than most cases.

So a worker does many cases, and its processes are forks of one that has imported all. That the package works under the
launchers that people use is another matter: `test_training_docs.py` and `tests/tasks/runs/test_launchers.py` start
those.
"""

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
from torch import multiprocessing

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
PROCESSES = 2
HANGS = 1800  # seconds; only a guard, for the machine may be busy with other things


def start(command, **environment):
    """Run a command to its end; returns what it printed."""
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    fixed = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=HANGS, check=False,
        env={**os.environ, **fixed, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-20000:]
    return done.stdout


def launch(worker, cases, folder):
    """Run cases of a worker in two processes, begun once; returns a function that gives a case's result.

    The result is what rank 0 returned. For a case that failed it raises an AssertionError with the traceback.
    """
    start([sys.executable, str(HERE / worker), str(folder), *cases])

    def result(case):
        found = json.loads((folder / f"{case}.json").read_text())
        assert "failed" not in found, found["failed"]
        return found["result"]

    return result


def serve(run):
    """Inside a worker: `run(case, folder)` for every case on the command line, each in a folder of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, *cases = sys.argv[1:]
    multiprocessing.start_processes(
        _one_of_several, (run, Path(folder), cases), nprocs=PROCESSES, start_method="fork"
    )  # ends all if one dies


def _one_of_several(rank, run, folder, cases):
    """What each process does.

    A case that fails in both is over and the next one begins; if it fails in one the other may wait for it, so the
    rest is left out.
    """
    size = str(PROCESSES)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=HANGS / 5),
    )  # fmt: skip
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
