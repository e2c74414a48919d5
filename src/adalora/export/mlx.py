"""MLX-LM's adapter folder: one rank, one scale, transposed matrices, names without PEFT's prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from adalora.errors import AdapterFileError
from adalora.export.adapter import Adapter, make_factor
from adalora.export.base import Base, split_layer
from adalora.export.files import CONFIG_NAME, read_json, read_tensors, write_json

WEIGHTS_NAME = "adapters.safetensors"


def mlx_refusal(adapter: Adapter) -> str | None:
    """Why MLX-LM cannot have this adapter, or None."""
    other = next((f for f in adapter.factors.values() if f.kind != "linear" and f.rank), None)
    if other is not None:
        return f"{other.name} is {other.noun}; MLX-LM's format takes linear modules"
    if adapter.extras:
        return f"{next(iter(adapter.extras))} is no LoRA matrix; MLX-LM loads lora_a and lora_b only"
    prefixes = {place[0] for f in adapter.factors.values() if (place := split_layer(f.name)) and f.rank}
    if len(prefixes) > 1:
        return f"layers under {' and '.join(sorted(prefixes))}; MLX-LM serves decoders with one stack of layers"
    return None


def mlx_layout(adapter: Adapter, base: Base, *, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of an MLX-LM adapter.

    Args:
        adapter: A cleaned adapter of linear modules.
        base: For the number of layers.
        dtype: dtype to store.

    Returns:
        `adapter_config.json` and the tensors of `adapters.safetensors`: lora_a [d_in, r], lora_b [r, d_out].

    Raises:
        AdapterFileError: See `mlx_refusal`.
    """
    reason = mlx_refusal(adapter)
    if reason:
        raise AdapterFileError(reason)
    live = [f for f in adapter.factors.values() if f.rank]
    if not live:
        raise AdapterFileError("every module has rank 0; there is nothing to write")
    rank, tensors, keys = adapter.max_rank, {}, set()
    for f in live:
        B, A = f.product()
        more = rank - f.rank
        tensors[f"{f.name}.lora_a"] = torch.nn.functional.pad(A, (0, 0, 0, more)).T.to(dtype).contiguous()
        tensors[f"{f.name}.lora_b"] = torch.nn.functional.pad(B, (0, more)).T.to(dtype).contiguous()
        place = split_layer(f.name)
        keys.add(place[2] if place else f.name)
    config = {
        "fine_tune_type": "lora",
        "num_layers": base.layers,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
        "model": adapter.base_model,
    }
    return config, tensors


def write_mlx(folder: Path, adapter: Adapter, base: Base, *, dtype: torch.dtype) -> None:
    """Write MLX-LM's two files into a folder that exists."""
    config, tensors = mlx_layout(adapter, base, dtype=dtype)
    write_json(folder / CONFIG_NAME, config)
    save_file(tensors, str(folder / WEIGHTS_NAME), metadata={"format": "mlx"})


def read_mlx(folder: Path) -> Adapter:
    """Read an MLX-LM adapter folder as MLX-LM computes it: ΔW = scale · (lora_a @ lora_b)ᵀ.

    Raises:
        AdapterFileError: Files are missing, or shapes do not fit the one rank of the config.
    """
    config, tensors = read_json(folder / CONFIG_NAME), read_tensors(folder / WEIGHTS_NAME)
    settings = config.get("lora_parameters")
    if not isinstance(settings, dict) or not {"rank", "scale"} <= set(settings):
        raise AdapterFileError(f"{folder / CONFIG_NAME} has no lora_parameters with rank and scale")
    factors = {}
    for name in sorted({key.rsplit(".", 1)[0] for key in tensors}):
        try:
            A, B = tensors[f"{name}.lora_a"].T, tensors[f"{name}.lora_b"].T
        except KeyError:
            raise AdapterFileError(f"{name}: lora_a and lora_b are wanted") from None
        if A.shape[0] != settings["rank"]:
            raise AdapterFileError(f"{name}: rank {A.shape[0]}, lora_parameters says {settings['rank']}")
        factors[name] = make_factor(name, A, B, float(settings["scale"]))
    return Adapter(factors, {"base_model_name_or_path": config.get("model")}, {}, "mlx")
