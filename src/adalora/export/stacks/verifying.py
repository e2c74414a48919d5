"""`verify`: every stack's ΔW against that of the adapter."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from adalora.export.adapter import Adapter, difference, norm
from adalora.export.base import Base, find_base
from adalora.export.merged import load_model, merge, quiet
from adalora.export.reading import read_adapter
from adalora.export.stacks.registry import STACKS, Stack
from adalora.export.stacks.served import Effective, Refused, Served, not_a_decoder, read_served

# Two float32 computations of the same product differ by about 1e-7.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class StackResult:
    """What one stack does with an adapter.

    Attributes:
        stack: Its name.
        version: Version that was read, or the installed one.
        source: Where its rules stand.
        status: `exact`, `wrong`, `refused` or `not served`.
        error: ‖ΔW of the stack − ΔW‖ / ‖ΔW‖ over all modules; NaN where it refuses, infinite where it reads
            memory that nothing wrote.
        reason: Why, and which module is worst; empty where exact.
    """

    stack: str
    version: str
    source: str
    status: str
    error: float
    reason: str


def _error(adapter: Adapter, got: Effective) -> tuple[float, str]:
    """Relative error over all modules, and the worst module."""
    squares = total = 0.0
    worst, worst_miss = "", 0.0
    for name in {**adapter.factors, **dict.fromkeys(got)}:
        factor = adapter.factors.get(name)
        wanted = factor.product() if factor is not None else None
        size = norm(*wanted) if wanted is not None else 0.0
        pair = got.get(name)
        if pair is not None and not all(torch.isfinite(t).all() for t in pair):
            return math.inf, f"{name}: no matrix in the file, memory is not initialised"
        if pair is None or wanted is None:
            miss = size if pair is None else norm(*pair)
        else:
            miss = difference(wanted, pair)
        squares, total = squares + miss**2, total + size**2
        if miss > worst_miss * (1 + 1e-9):
            worst, worst_miss = name, miss
    error = math.sqrt(squares / total) if total else (0.0 if squares == 0 else math.inf)
    missing = worst in adapter.factors and worst not in got
    return error, f"{worst}: left out" if missing else f"{worst}: scale or rank misread"


def _installed(stack: Stack) -> str:
    if stack.version != "installed":
        return stack.version
    from importlib.metadata import version

    return version(stack.name.lower())


def run_stack(stack: Stack, served: Served, adapter: Adapter) -> StackResult:
    """One stack's result for one adapter folder."""

    def result(status: str, error: float, reason: str) -> StackResult:
        return StackResult(stack.name, _installed(stack), stack.source, status, error, reason)

    foreign = not_a_decoder(served) if stack.decoders_only else None
    if foreign:
        return result("not served", math.nan, foreign)
    try:
        effective = stack.compute(served)
    except Refused as refusal:
        return result("refused", math.nan, str(refusal))
    if served.extras and stack.extras == "drops":
        return result("wrong", math.inf, f"{served.extras[0]} (trained in full) is left out")
    error, reason = _error(adapter, effective)
    if error <= TOLERANCE:
        return result("exact", error, stack.note)
    return result("wrong", error, reason)


def verify_adapter(path: str | os.PathLike[str], *, base: str | None = None) -> list[StackResult]:
    """What every stack computes with an adapter folder, against PEFT's meaning of it.

    Args:
        path: Folder of a LoRA or AdaLoRA adapter.
        base: Base model folder or hub name: its modules decide what is missing; without it they are guessed.

    Returns:
        One result for each of `STACKS`, in that order.

    Raises:
        AdapterFileError: No adapter, or it does not fit the base.
    """
    adapter = read_adapter(path)
    return verify_against(adapter, Path(path), find_base(adapter, base))


def verify_against(adapter: Adapter, folder: Path, base: Base) -> list[StackResult]:
    """Every stack's result for a folder, against the ΔW of another adapter (the source of an export)."""
    served = read_served(folder, base)
    return [run_stack(stack, served, adapter) for stack in STACKS]


def check_forward(path: str | os.PathLike[str], base: str) -> Mapping[str, float]:
    """Run the base model with the adapter in PEFT, and with ΔW merged into its weights, on the same tokens.

    Args:
        path: Adapter folder.
        base: Base model folder or hub name; its weights are loaded twice, in float32.

    Returns:
        `difference`: largest absolute difference of the outputs; `change`: largest absolute change that the
        adapter makes to the base's outputs.

    Raises:
        AdapterFileError: No adapter, no such base, or they do not fit.
    """
    from peft import PeftConfig, PeftModel

    adapter = read_adapter(path)
    model = load_model(base, adapter, dtype=torch.float32).eval()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(0, vocabulary, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), quiet():
        plain = model(tokens)[0]
        merged = merge(load_model(base, adapter, dtype=torch.float32).eval(), adapter)(tokens)[0]
        config = PeftConfig.from_pretrained(str(path))
        config.task_type = None
        live = PeftModel.from_pretrained(model, str(path), config=config).eval()(tokens)[0]
    return {"difference": float((live - merged).abs().max()), "change": float((live - plain).abs().max())}
