"""The host's part of a step: what a training waits for that is bound by the host, as small models on a GPU are.

Kernels of a narrow model on a few tokens take next to nothing, so the processor time of a step is that of Python, of
autograd and of the calls themselves. AdamW works through lists of tensors, as it does on a GPU.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.measuring import ratios
from benchmarks.models import MINILM, Training, batch, let_step, training

NARROW = replace(MINILM, hidden=48, intermediate=96, batch=1, length=4)
LONG = 100_000  # steps of a run that stays in its phase; as few records as in a real one
PHASES: dict[str, dict[str, Any]] = {
    "warmup": {"steps": LONG},
    "decrease": {"steps": LONG, "warmup": 1, "allocation_interval": 10_000},
    "final": {"steps": 25},
}
CASES: dict[str, dict[str, Any]] = {
    "dropout 0.0": {"dropout": 0.0},
    "dropout 0.1": {"dropout": 0.1},
    "bf16 autocast": {"autocast": torch.bfloat16},
}
PARTS = ("forward", "backward", "optimizer and controller")


def host(*, turns: int = 150) -> dict[str, Any]:
    """Processor time of a step relative to LoRA's, phase by phase, and of its parts in milliseconds; medians."""
    return {
        name: {phase: _against_lora(phase, turns=turns, **options) for phase in PHASES}
        for name, options in CASES.items()
    }


def _against_lora(phase: str, *, turns: int, **options: Any) -> dict[str, Any]:
    runs = {"lora": _training("lora", **options), "ours": _training("ours", **options, **PHASES[phase])}
    runs["ours"].skip_to(phase)
    seconds: dict[str, list[list[float]]] = {name: [] for name in runs}
    for turn in range(turns):
        for name in sorted(runs, reverse=turn % 2 == 0):
            let_step(runs, name)
            seconds[name].append(_step(runs[name]))
    del runs
    gc.collect()  # attached models of earlier phases would look at the optimizers of later ones
    warm = {name: own[10:] for name, own in seconds.items()}
    found: dict[str, Any] = ratios({name: [sum(parts) for parts in own] for name, own in warm.items()})["ours"]
    found["ms"] = {
        name: {part: 1e3 * statistics.median(times) for part, times in zip(PARTS, zip(*own))}
        for name, own in warm.items()
    }
    return found


def _training(method: str, **options: Any) -> Training:
    run = training(method, NARROW, **options)
    trained = [p for p in run.model.parameters() if p.requires_grad]
    run.optimizer = torch.optim.AdamW(trained, lr=1e-3, foreach=True)
    return run


def _step(run: Training) -> list[float]:
    """Seconds of processor time of the parts of one step."""
    losses: list[Any] = []
    inputs = batch(run.shape, 0, run.device)
    forward = _seconds(lambda: losses.append(run.loss(inputs)))
    backward = _seconds(lambda: losses.pop().backward())
    update = _seconds(run.optimizer.step)
    run.optimizer.zero_grad()
    return [forward, backward, update]


def _seconds(action: Callable[[], Any]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start
