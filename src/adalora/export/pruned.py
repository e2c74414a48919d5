"""What a run has pruned, and adapters that get the best of it back."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from adalora.errors import AdapterFileError
from adalora.export.adapter import Adapter, Factor
from adalora.export.cleanup import keep_by_budget
from adalora.export.files import read_header, read_tensors


@dataclass(frozen=True)
class Pruned:
    """Pruned triplets, each as it was when it was last live.

    Attributes:
        adapter: Their factors alone.
        scores: Module name -> [r] float64, at the allocation that pruned each.
    """

    adapter: Adapter
    scores: dict[str, Tensor]


def read_pruned(path: str | os.PathLike[str]) -> Pruned:
    """Read a run's `pruned.safetensors`.

    Raises:
        AdapterFileError: It is missing, damaged, or something else.
    """
    file = Path(path)
    if not file.is_file():
        raise AdapterFileError(f"no file {file}: adalora train writes it unless training.keep_pruned is false")
    read_header(file)
    with safe_open(str(file), framework="pt") as opened:
        found = opened.metadata() or {}
    try:
        if found["format"] != "adalora-pruned":
            raise ValueError(found["format"])
        modules: dict[str, Any] = json.loads(found["modules"])
        tensors = read_tensors(file)
        factors = {name: _factor(name, line, tensors) for name, line in modules.items()}
        scores = {name: tensors[f"{name}.score"].double() for name in factors}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterFileError(f"{file} is no pruned.safetensors of adalora train") from error
    for name, f in factors.items():
        if f.left.shape != (f.d_out, f.rank) or any(t.shape != (f.rank,) for t in (f.values, scores[name])):
            raise AdapterFileError(f"{file}: the parts of {name} do not share a number of triplets")
        if not all(bool(t.isfinite().all()) for t in (f.left, f.right, f.values, scores[name])):
            raise AdapterFileError(f"{file}: NaN or infinity in {name}")
    return Pruned(Adapter(factors, {}), scores)


def _factor(name: str, line: dict[str, Any], tensors: dict[str, Tensor]) -> Factor:
    left, right = tensors[f"{name}.left"], tensors[f"{name}.right"]
    if line["kind"] not in ("linear", "embedding", "conv") or left.dim() != 2 or right.dim() != 2:
        raise ValueError(name)
    work = torch.float64 if left.dtype == torch.float64 else torch.float32
    values, kernel = tensors[f"{name}.scale"].to(work), tuple(int(n) for n in line.get("kernel", ()))
    groups = int(line.get("groups", 1))
    if kernel and groups * math.prod(kernel) != right.shape[1]:
        raise ValueError(name)
    return Factor(name, line["kind"], left.to(work), values, right.to(work), left.dtype, kernel, groups)


def revive(adapter: Adapter, budget: float, pruned: Pruned) -> Adapter:
    """A whole adapter, and the best pruned triplets, by score per parameter, that a budget has room for.

    Args:
        adapter: The run's adapter, all of which stays.
        budget: Share of its LoRA parameters, above 1.
        pruned: What the same run has pruned.

    Raises:
        AdapterFileError: They are of different models.
    """
    room = int(adapter.parameters * budget + 1e-9) - adapter.parameters
    kept = keep_by_budget(pruned.adapter, room, pruned.scores)
    factors = dict(adapter.factors)
    for name, f in pruned.adapter.factors.items():
        index = torch.tensor(kept[name], dtype=torch.long)
        if not len(index):
            continue
        back = replace(f, left=f.left[:, index], values=f.values[index], right=f.right[index])
        factors[name] = _joined(factors[name], back) if name in factors else back
    return adapter.replace(factors)


def _joined(first: Factor, second: Factor) -> Factor:
    shapes = [(f.kind, f.d_out, f.d_in, f.groups) for f in (first, second)]
    if shapes[0] != shapes[1]:
        raise AdapterFileError(f"{first.name} has another shape in the adapter than among the pruned triplets")
    return replace(
        first,
        left=torch.cat([first.left, second.left.to(first.left)], dim=1),
        values=torch.cat([first.values, second.values.to(first.values)]),
        right=torch.cat([first.right, second.right.to(first.right)]),
    )
