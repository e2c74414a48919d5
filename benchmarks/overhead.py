"""What the method costs: PEFT LoRA of the target rank, PEFT AdaLoRA and ours, side by side.

    python -m benchmarks.overhead            # everything, about 15 minutes on one quiet core
    python -m benchmarks.overhead counts     # one part; parts add to the same file
    python -m benchmarks.overhead --device cuda --out FOLDER   # on a GPU, see `benchmarks.cuda`

Writes `results/overhead.json` and `results/overhead.png`, on a GPU `cuda.json`.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import cuda
from benchmarks.figure import draw
from benchmarks.host import host
from benchmarks.measuring import allocation_seconds, interleaved, operations, peak_bytes, ratios
from benchmarks.models import BERT_BASE, LLAMA_1B_NARROW, METHODS, MINILM, Shape, training
from benchmarks.on_meta import counts_on_meta

RESULTS = Path(__file__).parent / "results"
PHASES = ("warmup", "decrease", "final")
SMALL = {"batch": 2, "length": 8}  # a count does not depend on it


def counts() -> dict[str, Any]:
    """Operations of a step, by method and kind of step; then for other models and more modules."""
    tiny = replace(MINILM, **SMALL)
    found: dict[str, Any] = {"MiniLM": {method: operations(method, tiny) for method in METHODS}}
    found["MiniLM, dropout 0.1"] = {method: operations(method, tiny, dropout=0.1) for method in ("lora", "ours")}
    half = {"autocast": torch.bfloat16}
    found["MiniLM, bf16 autocast"] = {method: operations(method, tiny, **half) for method in ("lora", "ours")}
    found["MiniLM, svd"] = {"ours": operations("ours", tiny, parametrization="svd")}
    for shape in (replace(BERT_BASE, hidden=96, intermediate=192, **SMALL), LLAMA_1B_NARROW):
        found[shape.name] = {method: operations(method, shape) for method in METHODS}
    found["Llama-1B, real widths on meta"] = counts_on_meta()
    narrow = replace(tiny, hidden=24, intermediate=48)
    found["growth"] = {str(6 * layers): operations("ours", replace(narrow, layers=layers)) for layers in (4, 8, 16, 32)}
    return found


def memory() -> dict[str, Any]:
    """Peak bytes by method and phase."""
    return {
        f"dropout {dropout}": {
            "lora": peak_bytes("lora", MINILM, phase="warmup", dropout=dropout),
            "peft_adalora": peak_bytes("peft_adalora", MINILM, phase="warmup", dropout=dropout),
            "ours": {phase: peak_bytes("ours", MINILM, phase=phase, dropout=dropout) for phase in PHASES},
            "sensitivity": peak_bytes("ours", MINILM, phase="decrease", dropout=dropout, importance="sensitivity"),
        }
        for dropout in (0.0, 0.1)
    }


def memory_by_tokens() -> dict[str, Any]:
    """Peak bytes while the budget shrinks against the tokens of a step, and relative to LoRA's."""
    found = {}
    for size in (8, 32, 128):
        shape = replace(MINILM, batch=size)
        lora = peak_bytes("lora", shape, phase="warmup")
        ours = peak_bytes("ours", shape, phase="decrease")
        found[str(shape.tokens)] = {"lora": lora, "ours": ours, "ratio": ours / lora}
    return found


def phases(shape: Shape = MINILM) -> dict[str, Any]:
    """Step time relative to LoRA's, phase by phase, allocations every 10th step."""
    found = {}
    for phase in PHASES:
        ours = training("ours", shape, steps=25 if phase == "final" else 1000)
        if phase == "decrease":
            ours = training("ours", shape, steps=1000, warmup=1)
        ours.skip_to(phase)
        found[phase] = ratios(interleaved({"lora": training("lora", shape), "ours": ours}, steps=30, limit_s=55))
    return found


def bert_base() -> dict[str, Any]:
    """The same phases for a model of BERT-base's shape."""
    return phases(BERT_BASE)


def whole_run() -> dict[str, Any]:
    """A run of 60 steps from the first to the last, hand-over and compaction included; one step of each in turn."""
    options = {"steps": 60, "allocation_interval": 5}
    runs = {method: training(method, MINILM, **(options if method != "lora" else {})) for method in METHODS}
    return ratios(interleaved(runs, steps=60, limit_s=200))


def bert_base_run() -> dict[str, Any]:
    """A whole run of 25 steps of 256 tokens for a model of BERT-base's shape, and the phases inside it."""
    options = {"steps": 25, "allocation_interval": 2}
    shape = replace(BERT_BASE, batch=4)
    runs = {method: training(method, shape, **(options if method != "lora" else {})) for method in METHODS}
    schedule = runs["ours"].controller.schedule
    seconds = interleaved(runs, steps=25, limit_s=240)
    ends = {"warmup": (1, schedule.warmup_steps), "decrease": (schedule.warmup_steps, schedule.decrease_end)}
    ends["final"] = (schedule.decrease_end + 1, len(seconds["lora"]))
    inside = {
        phase: ratios({name: own[start:end] for name, own in seconds.items()}, skip=0)["ours"]
        for phase, (start, end) in ends.items()
        if end - start > 1
    }
    return {"run": ratios(seconds, skip=1), "phases": inside, "median_step_s": statistics.median(seconds["lora"])}


def parametrizations() -> dict[str, Any]:
    """Step time relative to LoRA's while the budget shrinks, with P carrying λ and with a λ of its own."""
    return {kind: _decrease_ratio(MINILM, parametrization=kind) for kind in ("lora", "svd")}


def starts() -> dict[str, Any]:
    """The same whole run of ours from the suggested initial rank for 8, and from wider ones for small targets."""
    found = {}
    for start, rank in ((8, 2), (16, 4), (16, 8)):
        lora = training("lora", MINILM, rank=rank)
        ours = training("ours", MINILM, rank=rank, initial=start, steps=60, allocation_interval=5)
        found[f"{start} to {rank}"] = ratios(interleaved({"lora": lora, "ours": ours}, steps=60, limit_s=120))["ours"]
    return found


def modules() -> dict[str, Any]:
    """The controller's share of a step of 2048 tokens against the number of modules, while the budget shrinks."""
    found = {}
    for layers in (4, 12, 40, 117):
        shape = replace(MINILM, layers=layers, batch=32)
        run = training("ours", shape, steps=1000, warmup=1, allocation_interval=2)
        run.skip_to("decrease")
        run.step(0)  # makes the averages
        masks = [run.controller.schedule.allocates(run.controller.step + ahead) for ahead in range(4)]
        own, whole = allocation_seconds(run, steps=4 if layers < 100 else 2)
        ms = {
            kind: 1e3 * statistics.mean(s for s, mask in zip(own, masks) if mask == (kind == "mask"))
            for kind in ("ordinary", "mask")
        }
        found[str(shape.modules)] = {"ms": ms, "step_ms": 1e3 * statistics.median(whole)}
    return found


def ranks() -> dict[str, Any]:
    """Step time relative to LoRA's against the target rank, while the budget shrinks."""
    return {str(rank): _decrease_ratio(MINILM, rank=rank) for rank in (2, 8, 16, 64)}


def tokens() -> dict[str, Any]:
    """Step time relative to LoRA's against the tokens of a step, while the budget shrinks."""
    return {str(64 * batch): _decrease_ratio(replace(MINILM, batch=batch)) for batch in (1, 4, 16)}


def _decrease_ratio(shape: Any, *, rank: int = 8, **options: Any) -> dict[str, float]:
    ours = training("ours", shape, rank=rank, steps=1000, warmup=1, **options)
    ours.skip_to("decrease")
    runs = {"lora": training("lora", shape, rank=rank), "ours": ours}
    return ratios(interleaved(runs, steps=20, limit_s=30))["ours"]


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "counts": counts,
    "memory": memory,
    "memory_by_tokens": memory_by_tokens,
    "host": host,
    "phases": phases,
    "bert_base": bert_base,
    "whole_run": whole_run,
    "bert_base_run": bert_base_run,
    "starts": starts,
    "parametrizations": parametrizations,
    "modules": modules,
    "ranks": ranks,
    "tokens": tokens,
}


def _machine() -> dict[str, Any]:
    import peft
    import transformers

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load": [round(value, 1) for value in os.getloadavg()],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "seed": 0,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _print(name: str, result: dict[str, Any]) -> None:
    table = Table("what", "value", title=name)
    for keys, value in _leaves(result):
        table.add_row(" / ".join(keys), f"{value:.3f}" if isinstance(value, float) else f"{value:,}")
    Console().print(table)


def _leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    return [
        leaf
        for key, value in tree.items()
        for leaf in (_leaves(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)])
    ]


def on_gpu(out: Path, device: torch.device, *, steps: int, names: Sequence[str]) -> None:
    """Measure on a GPU and print; `cuda.json` is written after every part, beside what it holds already."""
    path = out / "cuda.json"
    known = json.loads(path.read_text()) if path.exists() else None
    machine = {**_machine(), "gpu": torch.cuda.get_device_name(device)}
    results: dict[str, Any] = {"shapes": {}}
    for found in cuda.measure(device, steps=steps, names=names, known=known):
        results = {**found, "machine": machine}
        _write(path, results)
    for name, shape in results["shapes"].items():
        _print(name, shape)


def _write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)


def main(
    parts: Annotated[list[str] | None, typer.Argument()] = None,
    out: Path = RESULTS,
    device: str = "cpu",
    steps: Annotated[int, typer.Option(help="Length of a whole run on a GPU.")] = cuda.STEPS,
) -> None:
    """Measure all parts or those named, print them, and write them beside what `out` has already."""
    there = cuda.PART_NAMES if device != "cpu" else tuple(PARTS)
    unknown = set(parts or []) - set(there)
    if unknown:
        raise typer.BadParameter(f"no part {', '.join(sorted(unknown))}; there are {', '.join(there)}")
    if device != "cpu":
        if not torch.cuda.is_available():
            raise typer.BadParameter(f"--device {device}: no CUDA device here; leave it out to measure the CPU")
        warnings.filterwarnings("ignore")
        on_gpu(out, torch.device(device), steps=steps, names=parts or there)
        return
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    path = out / "overhead.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in parts or PARTS:
        gc.collect()  # attached models of earlier parts would look at the optimizers of later ones
        results[name] = PARTS[name]()
        results[name + "_measured"] = _machine()
        _print(name, results[name])
        _write(path, results)
    draw(results, out / "overhead.png")


if __name__ == "__main__":
    typer.run(main)
