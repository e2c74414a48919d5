"""Converting AdaLoRA of PEFT and of the released loralib to plain LoRA, exactly.

Both compute ΔW = B · diag(E) · A · scaling / (ranknum + 1e-5). PEFT's scaling is lora_alpha (r where it is
not positive) and ranknum is the initial rank for ever, whatever was pruned; loralib saves ranknum.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adalora.errors import AdapterFileError
from adalora.export.adapter import Adapter, Factor, make_factor
from adalora.export.files import read_tensors
from adalora.export.reading import _number, plain_config, refuse_pickle, split_keys

_EPSILON = 1e-5


def adapter_from_adalora(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Adapter:
    """Convert a PEFT AdaLoRA adapter of any version: pruned or not, `total_step` null or not.

    Args:
        tensors: `adapter_model.safetensors`: lora_A [r, d_in], lora_B [d_out, r], lora_E [r, 1] each.
        config: `adapter_config.json`. `rank_pattern` is a list of booleans for each `<module>.lora_E`.

    Returns:
        A plain adapter with the same ΔW; triplets that the mask cut or whose singular value is 0 are gone.

    Raises:
        AdapterFileError: A matrix is missing, shapes disagree, or the mask fits none of them.
    """
    modules, extras = split_keys(tensors)
    if not modules:
        raise AdapterFileError("the adapter holds no lora_A, lora_B and lora_E")
    initial_rank = config.get("init_r", config.get("r"))
    if type(initial_rank) is not int or initial_rank < 1:
        raise AdapterFileError(f"init_r is {initial_rank!r}; a whole number above 0 is wanted")
    alpha = config.get("lora_alpha", 8)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise AdapterFileError(f"lora_alpha is {alpha!r}; a number is wanted")
    scale = (float(alpha) if alpha > 0 else float(initial_rank)) / (initial_rank + _EPSILON)
    masks = _masks(config.get("rank_pattern"))
    factors: dict[str, Factor] = {}
    for name, parts in modules.items():
        A, B, E = _triplets(name, parts)
        A, B, E = _masked(name, A, B, E, masks.get(name))
        factors[name] = _live(name, A, B, E, scale)
    return Adapter(factors, plain_config(config), extras, "adalora")


def _masks(pattern: Any) -> dict[str, Tensor]:
    """Module name -> boolean mask [r]; keys come as `<module>.lora_E`, with or without an adapter name."""
    if pattern is None:
        return {}
    if not isinstance(pattern, dict):
        raise AdapterFileError(f"rank_pattern must be an object or null, got {type(pattern).__name__}")
    masks = {}
    for key, value in pattern.items():
        flat = torch.tensor(value).flatten() if isinstance(value, list) else torch.empty(0)
        if flat.numel() == 0 or not all(v in (0, 1) for v in flat.tolist()):
            raise AdapterFileError(f"rank_pattern[{key!r}] is {str(value)[:60]}; a list of booleans is wanted")
        masks[key.split(".lora_E")[0].removeprefix("base_model.model.")] = flat.bool()
    return masks


def _triplets(name: str, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    if not {"lora_A", "lora_B", "lora_E"} <= set(parts):
        raise AdapterFileError(f"{name}: {', '.join(sorted(parts))} are there; lora_A, lora_B and lora_E are wanted")
    A, B, E = parts["lora_A"], parts["lora_B"], parts["lora_E"].flatten()
    if A.dim() != 2 or B.dim() != 2 or not A.shape[0] == B.shape[1] == E.shape[0]:
        raise AdapterFileError(
            f"{name}: lora_A {tuple(A.shape)}, lora_B {tuple(B.shape)} and lora_E {tuple(E.shape)} do not share a rank"
        )
    return A, B, E


def _masked(name: str, A: Tensor, B: Tensor, E: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Apply the mask where the file was saved at full size; PEFT saves it cut."""
    if mask is None or int(mask.sum()) == E.shape[0]:
        return A, B, E
    if mask.shape[0] != E.shape[0]:
        raise AdapterFileError(
            f"{name}: rank_pattern keeps {int(mask.sum())} of {mask.shape[0]} triplets, the file has {E.shape[0]}"
        )
    return A[mask], B[:, mask], E[mask]


def _live(name: str, A: Tensor, B: Tensor, E: Tensor, scale: float) -> Factor:
    """A factor without the triplets whose singular value is exactly 0."""
    live = E != 0
    return make_factor(name, A[live], B[:, live], E[live].double() * scale)


def adapter_from_loralib(
    tensors: Mapping[str, Tensor],
    *,
    alpha: float,
    base_model: str | None = None,
    task_type: str | None = None,
    head: tuple[str, ...] = ("classifier", "pooler", "score", "qa_outputs"),
) -> Adapter:
    """Convert a state dict of the released loralib (AdaLoRA's SVDLinear, or its plain LoRA Linear).

    Args:
        tensors: State dict, whole or only its trained part. Frozen base weights in it are left out.
        alpha: `lora_alpha` that the layers were built with; the state dict does not have it.
        base_model: Name or folder of the base model, for the adapter's config.
        task_type: PEFT's, such as `SEQ_CLS`.
        head: First names of modules that were trained in full; they become `modules_to_save`.

    Raises:
        AdapterFileError: No LoRA layer in it, or shapes disagree.
    """
    _number(alpha, "alpha")
    modules, others = split_keys(tensors)
    if not modules:
        raise AdapterFileError("the state dict holds no lora_A and lora_B")
    factors: dict[str, Factor] = {}
    for name, parts in modules.items():
        if "lora_E" in parts:
            A, B, E = _triplets(name, parts)
            ranknum = float(parts["ranknum"].flatten()[0]) if "ranknum" in parts else float(A.shape[0])
            # An old allocator could leave ranknum at 0; loralib divides by it plus epsilon all the same.
            factors[name] = _live(name, A, B, E, alpha / (ranknum + _EPSILON))
        elif {"lora_A", "lora_B"} <= set(parts):
            rank = parts["lora_A"].shape[0]
            factors[name] = make_factor(name, parts["lora_A"], parts["lora_B"], alpha / max(rank, 1))
        else:
            raise AdapterFileError(f"{name}: {', '.join(sorted(parts))} are there; lora_A and lora_B are wanted")
    trained = {key: t for key, t in others.items() if key.split(".")[0] in head}
    config = {
        "base_model_name_or_path": base_model,
        "task_type": task_type,
        "modules_to_save": sorted({key.split(".")[0] for key in trained}) or None,
    }
    extras = {f"base_model.model.{key}": t for key, t in trained.items()}
    return Adapter(factors, plain_config(config), extras, "loralib")


def read_loralib(
    path: str | os.PathLike[str], *, alpha: float, base_model: str | None = None, task_type: str | None = None
) -> Adapter:
    """Read a loralib state dict saved as safetensors; see `adapter_from_loralib`.

    Raises:
        AdapterFileError: No such file, or a pickle, with the line that converts it.
    """
    file = Path(path)
    if not file.is_file():
        raise AdapterFileError(f"no state dict at {file}")
    if file.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise refuse_pickle(file)
    return adapter_from_loralib(read_tensors(file), alpha=alpha, base_model=base_model, task_type=task_type)
