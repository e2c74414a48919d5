"""Which triplets go first when an adapter is cut: an order that was measured, kept in a file, and used again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from adalora.errors import AdapterFileError
from adalora.export.adapter import Adapter, Factor, difference, norm
from adalora.export.cleanup import Truncation, budget_parameters, clean, energies, keep_by_budget, truncate


@dataclass(frozen=True)
class TripletOrder:
    """A score per triplet; what scores least for its parameters is cut first.

    Attributes:
        name: How it was found: `score` (the run's last allocation), `sensitivity` or `energy`.
        of: Which triplets it is of: `saved`, columns of lora_B as they lie in the file, or `clean`, the exact
            singular vectors.
        scores: Module name -> [r] float64, larger is better.
    """

    name: str
    of: Literal["saved", "clean"]
    scores: Mapping[str, Tensor]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        scores = {name: values.tolist() for name, values in self.scores.items()}
        return {"order": self.name, "of": self.of, "triplet_scores": scores}


def energy_order(adapter: Adapter) -> TripletOrder:
    """By σ², as `export --budget` cuts without an order."""
    return TripletOrder("energy", "clean", energies(clean(adapter)))


def read_order(path: str | os.PathLike[str]) -> TripletOrder:
    """The order in a `curve.json`.

    Raises:
        AdapterFileError: There is no such file, or it is something else.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        scores = {str(name): torch.tensor(v, dtype=torch.float64) for name, v in found["triplet_scores"].items()}
        name, of = str(found["order"]), found["of"]
    except FileNotFoundError as error:
        raise AdapterFileError(f"no curve at {os.fspath(path)}: adalora curve RUN writes RUN/curve.json") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterFileError(f"{os.fspath(path)} is no curve.json of adalora curve") from error
    if of not in ("saved", "clean") or not all(v.dim() == 1 and bool(v.isfinite().all()) for v in scores.values()):
        raise AdapterFileError(f"{os.fspath(path)} is no curve.json of adalora curve")
    return TripletOrder(name, of, scores)


def cut_by(adapter: Adapter, budget: float, order: TripletOrder) -> Truncation:
    """Cut an adapter to a budget, the triplets that the order puts last first.

    Args:
        adapter: Any adapter.
        budget: Share of its LoRA parameters (up to 1), or a number of parameters.
        order: Of this adapter's triplets.

    Raises:
        AdapterFileError: The budget keeps nothing, or the order is of another adapter.
    """
    triplets = clean(adapter) if order.of == "clean" else adapter
    for name, f in triplets.factors.items():
        count = len(order.scores.get(name, ()))
        if count != f.rank:
            raise AdapterFileError(f"{name} has {f.rank} triplets, the curve {count}: it is of another adapter")
    if order.of == "clean":
        return truncate(adapter, budget=budget, scores=order.scores)
    kept = keep_by_budget(adapter, budget_parameters(adapter, budget), order.scores)
    smaller = adapter.replace({name: _some(f, kept[name]) for name, f in adapter.factors.items()})
    return _measured(adapter, smaller)


def _some(factor: Factor, kept: list[int]) -> Factor:
    index = torch.tensor(sorted(kept), dtype=torch.long)
    return replace(factor, left=factor.left[:, index], values=factor.values[index], right=factor.right[index])


def _measured(before: Adapter, after: Adapter) -> Truncation:
    """Errors of a cut whose triplets need not be orthogonal: by the norm of what is missing."""
    errors, squares, total = {}, 0.0, 0.0
    for name, f in before.factors.items():
        size, miss = norm(*f.product()), difference(f.product(), after.factors[name].product())
        errors[name] = miss / size if size else 0.0
        squares, total = squares + miss**2, total + size**2
    kept = 1.0 - squares / total if total else 1.0
    return Truncation(clean(after), kept, errors, before.parameters, after.parameters)
