"""Counts of models that are too large to run here: their real shape on `meta`, where tensors have no values.

The base model never has values. The adapter gets some for as long as `adalora.attach` and the ranks of a phase need
them, which a narrow copy that has trained to that phase gives; then it joins the base on `meta`. Steps that ask for
values (PEFT AdaLoRA's and our allocations, hand-over, removal) cannot run there: they are counted on the narrow copy.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.measuring import count_step
from benchmarks.models import LLAMA_1B, NARROW_LLAMA, Shape, Training, training

META = torch.device("meta")
RUN: dict[str, Any] = {"steps": 50, "allocation_interval": 8}  # the two steps after a phase's begin allocate nothing
PHASES = ("warmup", "decrease", "final")


def counts_on_meta(shape: Shape = LLAMA_1B) -> dict[str, Any]:
    """Operations of ordinary steps, forward, backward and the allocator's part, and the model's parameters."""
    lora, theirs = training("lora", shape, device=META), training("peft_adalora", shape, device=META)
    return {
        "parameters": sum(p.numel() for p in lora.model.parameters()),
        "lora": {"step": _count(lora)},
        "peft_adalora": {"step": _count(theirs)},
        "ours": {phase: _count(ours_on_meta(shape, phase)) for phase in PHASES},
    }


def ours_on_meta(shape: Shape, phase: str) -> Training:
    """Ours of this shape on `meta`, in a phase, with the ranks that a narrow copy has there."""
    narrow = training("ours", replace(shape, **NARROW_LLAMA), **RUN)
    narrow.skip_to(phase)
    run = training("ours", shape, device=META, **RUN)
    run.controller.fit_to([h.rank for h in narrow.controller.handles])
    run.controller.step = narrow.controller.step
    run.model.to(META)
    trained = [p for p in run.model.parameters() if p.requires_grad]
    run.optimizer = torch.optim.AdamW(trained, lr=1e-3)
    return run


def _count(run: Training) -> dict[str, int]:
    """One ordinary step; the one before it has made what the optimizer and the averages keep."""
    run.step(0)
    return count_step(run, 1)
