"""The part of the training state that lies in the layers: factors, masks, ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adalora.errors import CheckpointError
from adalora.lora.layers.fingerprint import base_fingerprint, base_shape
from adalora.lora.layers.triplets import TripletHandle
from adalora.lora.ranks.compaction import resize
from adalora.lora.state.checkpoint import explain_differences

SHOWN = 5


def layers_state(handles: Sequence[TripletHandle]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Tensors (factors as they are, masks) by name, and a JSON-ready line for every layer."""
    tensors: dict[str, Tensor] = {}
    for h in handles:
        tensors[f"{h.name}.mask"] = h.mask.clone()
        for factor, (parameter, _) in h.factors.items():
            tensors[f"{h.name}.{factor}"] = parameter.detach().clone()
    return tensors, [_line(h) for h in handles]


def _line(h: TripletHandle) -> dict[str, Any]:
    base = h.layer.get_base_layer()
    return {
        "name": h.name,
        "kind": type(base).__name__,
        "base_shape": base_shape(h),
        "base": base_fingerprint(h),
        "rank": h.rank,
        "row_norm": h.row_norm,
    }


def check_layers(handles: Sequence[TripletHandle], saved: list[dict[str, Any]]) -> None:
    """Refuse the state of another model.

    Raises:
        CheckpointError: Other target modules, or another base model; the difference is shown.
    """
    here = [_line(h) for h in handles]
    mine, theirs = {m["name"]: m for m in here}, {m["name"]: m for m in saved}
    if list(mine) != list(theirs):
        added, gone = [n for n in mine if n not in theirs], [n for n in theirs if n not in mine]
        parts = [
            f"{len(names)} only {where} ({_some(names)})"
            for names, where in ((gone, "in the checkpoint"), (added, "here"))
            if names
        ]
        raise CheckpointError(
            f"the checkpoint has other target modules: {'; '.join(parts) or 'in another order'}. Build the model "
            "with the LoraConfig of the run that wrote it"
        )
    for key, what in (("kind", "another base model"), ("base_shape", "another base model"), ("base", "other weights")):
        wrong = [name for name in mine if mine[name][key] != theirs[name][key]]
        if wrong:
            differences = explain_differences(
                {name: theirs[name][key] for name in wrong[:SHOWN]}, {name: mine[name][key] for name in wrong[:SHOWN]}
            )
            raise CheckpointError(
                f"the checkpoint belongs to {what}: {len(wrong)} of {len(mine)} layers differ in {key}, "
                f"{'; '.join(differences)}. Load the base model that the run started from, in the same dtype"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


@torch.no_grad()
def load_layers(
    handles: Sequence[TripletHandle],
    tensors: dict[str, Tensor],
    saved: list[dict[str, Any]],
    *,
    optimizer: Optimizer | None,
    model: nn.Module,
) -> bool:
    """Bring layers to the saved ranks, factors and masks.

    Returns:
        Whether a rank has changed.

    Raises:
        CheckpointError: A tensor is missing or has another shape; nothing is changed then.
    """
    for h, line in zip(handles, saved):
        _check_tensors(h, tensors, rank=int(line["rank"]))
    changed = resize(handles, [int(line["rank"]) for line in saved], optimizer, model=model)
    for h, line in zip(handles, saved):
        for factor, (parameter, _) in h.factors.items():
            parameter.copy_(tensors[f"{h.name}.{factor}"])
        h.mask = tensors[f"{h.name}.mask"].clone().cpu()
        h.row_norm = float(line["row_norm"])
    return changed


def _check_tensors(h: TripletHandle, tensors: dict[str, Tensor], *, rank: int) -> None:
    wanted = {f"{h.name}.mask": [rank]}
    for factor, (parameter, dim) in h.factors.items():
        if rank:
            shape = list(parameter.shape)
            shape[dim] = h.length(rank, dim)
            wanted[f"{h.name}.{factor}"] = shape
    for name, shape in wanted.items():
        found = list(tensors[name].shape) if name in tensors else None
        if found != shape:
            raise CheckpointError(f"the checkpoint's {name!r} has shape {found}, {shape} fits this model")
