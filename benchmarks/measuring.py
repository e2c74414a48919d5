"""What is measured: operations, seconds of interleaved steps, peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.models import Shape, Training, training
from benchmarks.operations import OperationCounter, count


def operations(method: str, shape: Shape, *, steps: int = 25, **options: Any) -> dict[str, dict[str, int]]:
    """Operations of one step without the optimizer's, by phase; the highest count of each kind of step.

    "mask" are steps that allocate, "handover" and "compaction" happen once a run.
    """
    run = training(method, shape, steps=steps, allocation_interval=2, **options)
    found: dict[str, dict[str, int]] = {}
    for step in range(steps if method != "lora" else 2):
        kind, counted = _kind(run, step), count_step(run, step)
        # the first step also makes what later ones keep
        if step > 0 and counted["total"] > found.get(kind, {}).get("total", 0):
            found[kind] = counted
    return found


def count_step(run: Training, step: int) -> dict[str, int]:
    """Operations of one step without the optimizer's, by part."""
    after = OperationCounter()
    inside = count(lambda: run.gradients(step))
    if run.controller is not None:
        _count_controller(run, after)
    run.optimizer.step()
    if run.controller is None:
        with after:
            run.after_step()
    run.optimizer.zero_grad()
    total = inside.total + after.total
    return {"total": total, "forward_backward": inside.total, "allocation": after.total, "syncs": after.syncs.total()}


def _kind(run: Training, step: int) -> str:
    if run.controller is None:
        return "step"
    schedule = run.controller.schedule
    if step == schedule.warmup_steps - 1:
        return "handover"
    if step == schedule.decrease_end:
        return "compaction"
    return "mask" if schedule.allocates(step) else run.controller.phase


def _count_controller(run: Training, counter: OperationCounter) -> None:
    """Count what the controller does inside `optimizer.step`, once."""
    original = type(run.controller).after_step

    def counted(optimizer: torch.optim.Optimizer) -> None:
        with counter:
            original(run.controller, optimizer)

    run.controller.after_step = counted


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"q25": low, "median": middle, "q75": high}


def interleaved(runs: dict[str, Training], *, steps: int, limit_s: float = 240.0) -> dict[str, list[float]]:
    """Seconds of every step, one step of each run in turn: what disturbs one disturbs all."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for step in range(steps):
        names = list(runs)
        for name in names[step % len(names) :] + names[: step % len(names)]:
            seconds[name].append(_seconds(lambda name=name, step=step: runs[name].step(step)))
        if time.perf_counter() - start > limit_s:
            break
    return seconds


def ratios(seconds: dict[str, list[float]], *, skip: int = 2) -> dict[str, dict[str, float]]:
    """Step times of each run relative to "lora"'s step of the same turn; `total` is that of the sums."""
    base = seconds["lora"][skip:]
    return {
        name: {**quartiles([t / b for t, b in zip(own[skip:], base)]), "total": sum(own[skip:]) / sum(base)}
        for name, own in seconds.items()
    }


def allocation_seconds(run: Training, *, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of the controller's part and of the whole step, for each of some steps of ours."""
    own: list[float] = []
    original = type(run.controller).after_step

    def timed(optimizer: torch.optim.Optimizer) -> None:
        own.append(_seconds(lambda: original(run.controller, optimizer)))

    run.controller.after_step = timed
    return own, [_seconds(lambda step=step: run.step(step)) for step in range(steps)]


def _seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def peak_bytes(method: str, shape: Shape, *, phase: str, **options: Any) -> int:
    """Highest sum of all tensors alive during two steps of a phase: model, optimizer, averages, activations.

    Every allocation and release of torch's CPU allocator is recorded from before the model is made.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        run = training(method, shape, steps=25, **options)
        run.skip_to(phase)
        with torch.profiler.record_function("measured"):
            run.step(0)
            run.step(1)
    events = sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    begin = next(e.start_ns() for e in events if e.name() == "measured")
    alive = highest = 0
    for event in events:
        if event.name() == "[memory]":
            alive += event.nbytes()
            if event.start_ns() >= begin:
                highest = max(highest, alive)
    return highest
