"""Means that act once a step on the adapter as a whole, each alone; a part of `benchmarks.means`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adalora.core.importance import SmoothedImportance
from adalora.lora.orthogonality.orthogonal import Groups, decoupled_step, hand_over
from benchmarks.measuring import peak_bytes, quartiles
from benchmarks.models import MINILM, Training, training
from benchmarks.operations import count

BETA1, BETA2 = 0.85, 0.85
NARROW = replace(MINILM, hidden=24, intermediate=48, batch=2, length=8)  # counts do not depend on widths


def timed(variants: dict[str, Callable[[], Any]], *, turns: int = 60) -> dict[str, dict[str, float]]:
    """Microseconds of each variant, one call of each in turn."""
    seen: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(turns):
        for name, action in variants.items():
            start = time.perf_counter()
            action()
            if turn >= 5:
                seen[name].append(1e6 * (time.perf_counter() - start))
    return {name: quartiles(values) for name, values in seen.items()}


def _timed_and_counted(variants: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    found: dict[str, Any] = dict(timed(variants, turns=40))
    for name, action in variants.items():
        found[name]["operations"] = count(action).total
    return found


def handover() -> dict[str, Any]:
    """The 36 modules of MiniLM's shape at the end of warm-up: one after the other, and a shape at a time."""
    run = training("ours", MINILM, steps=1000)
    for h in run.controller.handles:
        h.P_or.normal_(std=0.01)
    alone = lambda: [hand_over([h], run.optimizer) for h in run.controller.handles]  # noqa: E731
    together = lambda: hand_over(run.controller.handles, run.optimizer)  # noqa: E731
    return timed({"one by one": alone, "together": together}, turns=20)


def averages() -> dict[str, Any]:
    """Sensitivity and uncertainty of P and Q of 36 modules: module by module, in lists of tensors, stacked by shape."""
    run = _with_gradients()
    pairs = [(p.detach(), p.grad) for h in run.controller.handles for p in h.parameters]
    weights, gradients = [w for w, _ in pairs], [g for _, g in pairs if g is not None]
    kept = {name: _kept(weights) for name in ("module by module", "lists of tensors")}
    stacks = _Stacks(weights)
    return _timed_and_counted(
        {
            "module by module": lambda: one_by_one(weights, gradients, *kept["module by module"]),
            "lists of tensors": lambda: in_lists(weights, gradients, *kept["lists of tensors"]),
            "stacked by shape": lambda: stacks.update(weights, gradients),
        }
    )


def _with_gradients() -> Training:
    run = training("ours", MINILM, steps=1000)
    run.gradients(0)
    return run


def _kept(weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]


@torch.no_grad()
def one_by_one(
    weights: list[Tensor], gradients: list[Tensor], sensitivity: list[Tensor], uncertainty: list[Tensor]
) -> None:
    """As PEFT goes, but in place."""
    for w, g, s, u in zip(weights, gradients, sensitivity, uncertainty):
        importance = (w * g).abs_()
        s.lerp_(importance, 1 - BETA1)
        u.lerp_(importance.sub_(s).abs_(), 1 - BETA2)


@torch.no_grad()
def in_lists(
    weights: list[Tensor], gradients: list[Tensor], sensitivity: list[Tensor], uncertainty: list[Tensor]
) -> None:
    """By `torch._foreach_*`."""
    importance = torch._foreach_mul(weights, gradients)
    torch._foreach_abs_(importance)
    torch._foreach_lerp_(sensitivity, importance, 1 - BETA1)
    torch._foreach_sub_(importance, sensitivity)
    torch._foreach_abs_(importance)
    torch._foreach_lerp_(uncertainty, importance, 1 - BETA2)


class _Stacks:
    """What the library does: averages of one shape lie in one tensor."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.members: dict[torch.Size, list[int]] = {}
        for number, weight in enumerate(weights):
            self.members.setdefault(weight.shape, []).append(number)
        self.averages = {
            shape: SmoothedImportance.zeros_like(torch.stack([weights[n] for n in numbers]))
            for shape, numbers in self.members.items()
        }

    @torch.no_grad()
    def update(self, weights: list[Tensor], gradients: list[Tensor]) -> None:
        for shape, numbers in self.members.items():
            product = torch.stack([weights[n] for n in numbers]) * torch.stack([gradients[n] for n in numbers])
            self.averages[shape].update(product, beta1=BETA1, beta2=BETA2)


def orthogonality() -> dict[str, Any]:
    """The term's closed form for 36 modules: one after the other, and a length at a time."""
    handles = training("ours", MINILM, steps=1000).controller.handles
    groups, options = Groups(handles), {"weight": 0.1, "learning_rate": 1e-9}
    return _timed_and_counted(
        {
            "one by one": lambda: [decoupled_step(Groups([h]), **options) for h in handles],
            "together": lambda: decoupled_step(groups, **options),
        }
    )


def finding() -> dict[str, Any]:
    """All P and Q of a model: by a walk over its named parameters, and from the layers that are known."""
    run = training("ours", MINILM, steps=1000)
    return timed(
        {
            "a walk over named parameters": lambda: [p for n, p in run.model.named_parameters() if "lora_" in n],
            "from the layers": lambda: [p for h in run.controller.handles for p in h.parameters],
        }
    )


def skipped_layers() -> dict[str, int]:
    """Operations of a step of the final phase by which of six layers have triplets; ranks 8 to 4, a narrow copy."""
    return {
        "every module has one": _final_operations({}),
        "the upper three layers have none": _final_operations({f"*.layer.{n}.*": 0 for n in (3, 4, 5)}),
        "the lower three layers have none": _final_operations({f"*.layer.{n}.*": 0 for n in (0, 1, 2)}),
    }


def _final_operations(max_rank: dict[str, int]) -> int:
    options: dict[str, Any] = {"max_rank": max_rank} if max_rank else {"min_rank": 1}
    run = training("ours", NARROW, rank=4, initial=8, steps=25, **options)
    run.skip_to("final")
    run.step(0)
    after = count(lambda: (run.gradients(1), run.controller._observation.after(run.optimizer, observe=False)))
    return after.total


def memory() -> dict[str, int]:
    """Bytes: the final phase with and without removal of what is pruned; the averages, and the adapter in fp32."""
    run = training("ours", MINILM, steps=1000, warmup=1)
    run.skip_to("decrease")
    run.step(0)
    kept = run.controller._scorer.state_dict()
    kept.pop("random")
    return {
        "final phase": peak_bytes("ours", MINILM, phase="final"),
        "final phase, pruned triplets stay": peak_bytes("ours", MINILM, phase="final", compact=False),
        "averages": sum(4 * t.numel() for t in kept.values()),
        "adapter": sum(4 * p.numel() for h in run.controller.handles for p in h.parameters),
    }
