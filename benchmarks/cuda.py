"""The same comparison on a GPU: whole runs of all methods in turn, by phase, and peak memory.

python -m benchmarks.overhead --device cuda --out FOLDER     # there: a minute, part by part into FOLDER/cuda.json
python -m benchmarks.cuda FOLDER                             # here: results/cuda.json and docs/performance.md
"""

from __future__ import annotations

import gc
import json
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer

from benchmarks import pages
from benchmarks.measuring import quartiles
from benchmarks.models import BERT_BASE, FINAL, METHODS, MINILM, WARMUP, Shape, Training, let_step, training

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
START, END = pages.marks("cuda")
SHAPES = (replace(MINILM, batch=32, length=128), replace(BERT_BASE, batch=32, length=128))
PRECISIONS = {"fp32": None, "bf16 autocast": torch.bfloat16}
NAMES = {"lora": "PEFT LoRA", "peft_adalora": "PEFT AdaLoRA", "ours": "adalora"}
# Steps of a turn follow each other without waiting, as in training; phases begin and end with turns.
STEPS, TURN, INTERVAL = 60, 2, 6
PART_NAMES = ("times", "memory", "controller", "peft_adalora")


@dataclass(frozen=True)
class Part:
    """One thing that is measured: `action` gives what belongs into the results of a shape."""

    name: str
    shape: Shape
    action: Callable[[], dict[str, Any]]


def plan(
    device: torch.device, *, shapes: tuple[Shape, ...] = SHAPES, steps: int = STEPS, turn: int = TURN
) -> list[Part]:
    """What is measured, the most important first: a machine that is lent may be gone before the end."""

    def times(shape: Shape, precision: str, *methods: str) -> dict[str, Any]:
        options = {"device": device, "autocast": PRECISIONS[precision]}
        found = step_times(shape, methods=("lora", *methods), steps=steps, turn=turn, **options)
        if "ours" not in methods:  # LoRA's own are those beside ours
            found = {phase: {m: own for m, own in entry.items() if m in methods} for phase, entry in found.items()}
        return {precision: found}

    def memory(shape: Shape, precision: str, *methods: str) -> dict[str, Any]:
        options = {"device": device, "autocast": PRECISIONS[precision]}
        return {precision: {"peak_bytes": {method: peaks(method, shape, **options) for method in methods}}}

    cases = [(shape, precision) for shape in shapes for precision in PRECISIONS]
    theirs = "peft_adalora"
    return [
        *(Part("times", shape, partial(times, shape, precision, "ours")) for shape, precision in cases),
        *(Part("memory", shape, partial(memory, shape, precision, "lora", "ours")) for shape, precision in cases),
        *(Part("controller", shape, partial(_controller, shape, steps=steps // 2, device=device)) for shape in shapes),
        *(Part(theirs, shape, partial(times, shape, precision, theirs)) for shape, precision in cases),
        *(Part(theirs, shape, partial(memory, shape, precision, theirs)) for shape, precision in cases),
    ]


def measure(
    device: torch.device,
    *,
    shapes: tuple[Shape, ...] = SHAPES,
    steps: int = STEPS,
    turn: int = TURN,
    names: Sequence[str] = PART_NAMES,
    known: dict[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Step times by phase, the controller's own, and peak memory, for each shape and precision.

    Args:
        device: Where.
        shapes: The models, the most important first.
        steps: Length of a whole run.
        turn: Steps of a method that follow each other.
        names: Which parts, of `PART_NAMES`.
        known: Results of before that are added to; of runs of another length they are left out.

    Yields:
        All that is known, after every part.
    """
    settings = {"steps": steps, "turn": turn, "allocation_interval": INTERVAL}
    same = known is not None and all(known.get(key) == value for key, value in settings.items())
    found: dict[str, Any] = {**settings, "shapes": known["shapes"] if known is not None and same else {}}
    _one_run_of_each(device, replace(shapes[0], layers=1, batch=1, length=8))
    for part in plan(device, shapes=shapes, steps=steps, turn=turn):
        if part.name in names:
            sizes = {"tokens": part.shape.tokens, "modules": part.shape.modules}
            _merge(found["shapes"].setdefault(part.shape.name, {}), {**sizes, **part.action()})
            yield found


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _controller(shape: Shape, *, steps: int, device: torch.device) -> dict[str, Any]:
    return {"controller_ms": controller_ms(shape, steps=steps, device=device)}


def _one_run_of_each(device: torch.device, shape: Shape) -> None:
    """Loads libraries and makes handles, so that no measured step does."""
    for method in METHODS:
        for dtype in PRECISIONS.values():
            run = training(method, shape, steps=12, device=device, autocast=dtype)
            for step in range(12):
                run.step(step)


def step_times(shape: Shape, *, methods: Sequence[str], steps: int, turn: int, **options: Any) -> dict[str, Any]:
    """Ratios to PEFT LoRA's time, turn by turn, one turn of each method after another; milliseconds of a step."""
    runs = {
        method: training(
            method, shape, **options, **({} if method == "lora" else {"steps": steps, "allocation_interval": INTERVAL})
        )
        for method in methods
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    for start in range(0, steps, turn):
        names = list(runs)
        for name in names[start // turn % len(names) :] + names[: start // turn % len(names)]:
            let_step(runs, name)
            seconds[name].append(_turn(runs[name], range(start, start + turn)))
    return {
        phase: {
            name: {**_ratios(own[start:end], seconds["lora"][start:end]), "ms": 1e3 * sum(own[start:end]) / n / turn}
            for name, own in seconds.items()
        }
        for phase, (start, end) in phase_turns(steps, turn).items()
        if (n := end - start) > 1
    }


def phase_turns(steps: int, turn: int) -> dict[str, tuple[int, int]]:
    """First turn of each phase and the one after its last; a run's first turn, and the final phase's, are left out."""
    warmup, decrease_end = round(WARMUP * steps), steps - round(FINAL * steps)
    return {
        "warmup": (1, warmup // turn),
        "decrease": (warmup // turn, decrease_end // turn),
        "final": (decrease_end // turn + 1, steps // turn),
        "run": (1, steps // turn),
    }


def _ratios(own: list[float], base: list[float]) -> dict[str, float]:
    return {**quartiles([a / b for a, b in zip(own, base)]), "total": sum(own) / sum(base)}


def _turn(run: Training, steps: range) -> float:
    """Seconds of some steps, from an idle device to an idle device."""
    _wait(run.device)
    start = time.perf_counter()
    for step in steps:
        run.step(step)
    _wait(run.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def controller_ms(shape: Shape, *, steps: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of the controller's part by kind of step, from an idle device to an idle device; medians."""
    run = training("ours", shape, steps=steps, allocation_interval=INTERVAL, device=device)
    controller, seen = run.controller, defaultdict(list)
    original, schedule = type(controller).after_step, controller.schedule

    def timed(optimizer: torch.optim.Optimizer) -> None:
        kind = "mask" if schedule.allocates(controller.step) else controller.phase
        kind = "hand-over" if controller.step == schedule.warmup_steps - 1 else kind
        kind = "removal" if controller.step == schedule.decrease_end else kind
        _wait(device)
        start = time.perf_counter()
        original(controller, optimizer)
        _wait(device)
        seen[kind].append(1e3 * (time.perf_counter() - start))

    controller.after_step = timed
    for step in range(steps):
        run.step(step)
    return {kind: sorted(values)[len(values) // 2] for kind, values in seen.items()}


def peaks(method: str, shape: Shape, *, device: torch.device, **options: Any) -> dict[str, int]:
    """Most bytes of tensors during two steps of each phase, beyond what was there before; nothing without CUDA."""
    if device.type != "cuda":
        return {}
    gc.collect()
    before, found = torch.cuda.memory_allocated(device), {}
    run = training(method, shape, steps=25, device=device, **options)
    for phase in ("warmup", "decrease", "final") if method == "ours" else ("run",):
        run.skip_to(phase)
        torch.cuda.reset_peak_memory_stats(device)
        run.step(0)
        run.step(1)
        found[phase] = torch.cuda.max_memory_allocated(device) - before
    return found


def markdown(results: dict[str, Any]) -> str:
    """The page's part on the GPU."""
    machine = results["machine"]
    lines = [
        f"One {machine['gpu']}, torch {machine['torch']}, PEFT {machine['peft']}, transformers "
        f"{machine['transformers']}, commit {machine['commit']}; TF32 off, eager, AdamW. Whole runs of "
        f"{results['steps']} steps with an allocation every {results['allocation_interval']}th while the budget "
        f"shrinks, {results['turn']} steps of each method in turn without waiting in between; step time relative to "
        "PEFT LoRA r = 8, median (quartiles).",
    ]
    for name, own in results["shapes"].items():
        lines += ["", f"**{name}**, {own['modules']} modules, {own['tokens']} tokens a step:", ""]
        lines += ["| | LoRA's step, ms | warm-up | decrease | final | whole run | by the sum | peak memory |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for precision in PRECISIONS:
            found = own.get(precision, {})  # the measuring may have been cut short
            lines += [_row(found, precision, method) for method in METHODS if method in found.get("run", {})]
        if "controller_ms" in own:
            times = ", ".join(f"{kind} {ms:.1f} ms" for kind, ms in own["controller_ms"].items())
            lines += ["", f"The controller's part of a step, waited for: {times}."]
    return "\n".join(lines)


def _row(found: dict[str, Any], precision: str, method: str) -> str:
    cells = [f"{found['run']['lora']['ms']:.1f}" if method == "lora" else ""]
    for phase in ("warmup", "decrease", "final", "run"):
        entry = found.get(phase, {}).get(method)
        cells.append("–" if entry is None else "{median:.2f} ({q25:.2f}–{q75:.2f})".format(**entry))
    cells[1:] = ["1"] * 4 if method == "lora" else cells[1:]
    cells.append(f"{found['run'][method]['total']:.2f}")
    bytes_ = found.get("peak_bytes", {}).get(method, {})
    cells.append(", ".join(f"{value / 1e6:.0f} MB" for value in bytes_.values()) or "–")
    return f"| {NAMES[method]}, {precision} | " + " | ".join(cells) + " |"


def publish(
    folder: Path, results_path: Path = ROOT / "benchmarks" / "results" / "cuda.json", page: Path = PAGE
) -> None:
    """Put `FOLDER/cuda.json` into the repository and its tables into docs/performance.md."""
    results = json.loads((folder / "cuda.json").read_text())
    if not results["machine"]["commit"]:  # a copy without its history was measured
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        results["machine"]["commit"] = commit.stdout.strip()
    results_path.write_text(json.dumps(results, indent=1) + "\n")
    pages.put(page, "cuda", markdown(results))


def main(folder: Path) -> None:
    """Publish what was measured on a GPU."""
    publish(folder)


if __name__ == "__main__":
    typer.run(main)
