"""What an adapter spends its rank on."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adalora.export.adapter import Adapter
from adalora.export.cleanup import clean, keep_by_energy, select
from adalora.export.exporting import load_source

SHARES = (0.90, 0.95, 0.99)


def effective_rank(values: Tensor) -> float:
    """The exponential of the entropy of σ/Σσ: 1 where one triplet carries all, r where all are equal.

    Args:
        values: Singular values, [r].
    """
    p = values.double().abs()
    if p.numel() == 0 or float(p.sum()) == 0:
        return 0.0
    p = p / p.sum()
    return float(torch.exp(torch.special.entr(p).sum()))


@dataclass(frozen=True)
class ModuleReport:
    """One module of an adapter.

    Attributes:
        name: Full module name.
        kind: `linear`, `embedding` or `conv`.
        d_out: Rows of ΔW.
        d_in: Columns of ΔW.
        rank: r in the file.
        numerical_rank: Triplets above rounding noise.
        effective_rank: See `effective_rank`.
        energy: Share of each triplet in this module's Σσ², largest first.
        norm: ‖ΔW‖.
        parameters: LoRA parameters in the file.
    """

    name: str
    kind: str
    d_out: int
    d_in: int
    rank: int
    numerical_rank: int
    effective_rank: float
    energy: tuple[float, ...]
    norm: float
    parameters: int


@dataclass(frozen=True)
class Inspection:
    """An adapter at a glance.

    Attributes:
        modules: In the order of the file.
        origin: `lora`, `adalora` or `loralib`.
        base_model: As the config names it.
        parameters: LoRA parameters in the file.
        extra_parameters: Parameters that are no LoRA matrices, such as a trained head.
        bytes: Size of the tensors in the file.
        dtype: dtype of the matrices.
        budgets: Share of energy -> LoRA parameters that keep it, with the rank spent best across all modules.
    """

    modules: tuple[ModuleReport, ...]
    origin: str
    base_model: str | None
    parameters: int
    extra_parameters: int
    bytes: int
    dtype: str
    budgets: Mapping[float, int]


def inspect_adapter(source: str | os.PathLike[str] | Adapter, *, alpha: float | None = None) -> Inspection:
    """Ranks, effective ranks, energies and sizes of any LoRA or AdaLoRA adapter.

    Args:
        source: Folder, loralib state dict (with `alpha`), or an adapter in memory.
        alpha: lora_alpha of a loralib state dict.

    Raises:
        AdapterFileError: No adapter there.
    """
    adapter = load_source(source, alpha=alpha)
    cleaned = clean(adapter)
    modules = []
    for name, f in adapter.factors.items():
        squares = cleaned.factors[name].values.double() ** 2
        total = float(squares.sum())
        modules.append(
            ModuleReport(
                name=name,
                kind=f.kind,
                d_out=f.d_out,
                d_in=f.d_in // f.groups,
                rank=f.lora_rank,
                numerical_rank=cleaned.factors[name].lora_rank,
                effective_rank=effective_rank(cleaned.factors[name].values),
                energy=tuple((squares / total).tolist()) if total else (),
                norm=math.sqrt(total),
                parameters=f.parameters,
            )
        )
    item = torch.finfo(adapter.dtype).bits // 8
    return Inspection(
        modules=tuple(modules),
        origin=adapter.origin,
        base_model=adapter.base_model,
        parameters=adapter.parameters,
        extra_parameters=sum(t.numel() for t in adapter.extras.values()),
        bytes=adapter.parameters * item + sum(t.numel() * t.element_size() for t in adapter.extras.values()),
        dtype=str(adapter.dtype).removeprefix("torch."),
        budgets={s: select(cleaned, keep_by_energy(cleaned, s)).parameters_after for s in SHARES},
    )
