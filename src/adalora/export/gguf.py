"""A LoRA GGUF for llama.cpp and Ollama, written with the `gguf` package.

Follows llama.cpp's convert_lora_to_gguf.py: A is [r, d_in], B is [d_out, r], and the server multiplies by
alpha / r of each tensor. Llama-like models have the rows of q and k permuted, as their base GGUF has.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adalora.errors import AdapterFileError
from adalora.export.adapter import Adapter, Factor
from adalora.export.base import split_layer

# Architectures whose linear weights llama.cpp stores as they are, and (True) with q and k permuted.
ARCHITECTURES: Mapping[str, tuple[str, bool]] = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
    "Gemma2ForCausalLM": ("gemma2", False),
    "Gemma3ForCausalLM": ("gemma3", False),
    "Phi3ForCausalLM": ("phi3", False),
}


def require_gguf() -> Any:
    """The `gguf` module.

    Raises:
        AdapterFileError: It is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise AdapterFileError("writing GGUF needs the gguf package: pip install 'adalora[serving]'") from None
    return gguf


def permute_rows(B: Tensor, heads: int) -> Tensor:
    """Rows of q or k in the order of llama.cpp's rotary embedding (pairs of halves become neighbours).

    Args:
        B: [d_out, r].
        heads: Heads of this projection.
    """
    return B.reshape(heads, 2, B.shape[0] // heads // 2, B.shape[1]).swapaxes(1, 2).reshape(B.shape)


def _architecture(config: Mapping[str, Any]) -> tuple[str, bool]:
    names = config.get("architectures") or ()
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    raise AdapterFileError(
        f"architecture {list(names)} is not written directly; allowed are {', '.join(ARCHITECTURES)}. "
        "Use llama.cpp's convert_lora_to_gguf.py on the gguf-ragged folder"
    )


def gguf_tensors(adapter: Adapter, config: Mapping[str, Any]) -> tuple[str, float, dict[str, Tensor]]:
    """Architecture, alpha and tensors of a LoRA GGUF.

    Args:
        adapter: A cleaned adapter of linear modules.
        config: The base model's config.

    Returns:
        llama.cpp's architecture name, `adapter.lora.alpha`, and its tensor names -> float32 tensors.

    Raises:
        AdapterFileError: The architecture or a module has no place in llama.cpp.
    """
    gguf = require_gguf()
    arch, permuted = _architecture(config)
    if adapter.extras:
        raise AdapterFileError(f"{next(iter(adapter.extras))} is no LoRA matrix; llama.cpp takes none beside them")
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, int(config["num_hidden_layers"]))
    alpha = float(max(adapter.max_rank, 1))
    tensors: dict[str, Tensor] = {}
    for f in adapter.factors.values():
        if not f.rank:
            continue
        target = names.get_name(f"{f.name}.weight", try_suffixes=(".weight",))
        if f.kind != "linear" or target is None or (split_layer(f.name) is None and f.leaf != "lm_head"):
            raise AdapterFileError(f"{f.name} ({f.kind}) has no place in a LoRA GGUF of {arch}")
        B, A = f.product()
        B = _permuted(B, f, config) if permuted else B
        tensors[f"{target}.lora_a"] = A.float().contiguous()
        tensors[f"{target}.lora_b"] = (B * (f.rank / alpha)).float().contiguous()
    return arch, alpha, tensors


def _permuted(B: Tensor, f: Factor, config: Mapping[str, Any]) -> Tensor:
    heads = int(config["num_attention_heads"])
    if f.leaf == "q_proj":
        return permute_rows(B, heads)
    if f.leaf == "k_proj":
        return permute_rows(B, int(config.get("num_key_value_heads") or heads))
    return B


def write_gguf(path: Path, adapter: Adapter, config: Mapping[str, Any], *, dtype: torch.dtype = torch.float32) -> Path:
    """Write one LoRA GGUF file.

    Args:
        path: File to write.
        adapter: A cleaned adapter of linear modules.
        config: The base model's config.
        dtype: float32 or float16.

    Raises:
        AdapterFileError: See `gguf_tensors`.
    """
    gguf = require_gguf()
    arch, alpha, tensors = gguf_tensors(adapter, config)
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    half = dtype is torch.float16
    for name, tensor in tensors.items():
        writer.add_tensor(name, (tensor.half() if half else tensor).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_gguf(path: Path) -> tuple[str, float, dict[str, tuple[Tensor, Tensor]]]:
    """Read a LoRA GGUF back: architecture, alpha, and (lora_a, lora_b) float32 by llama.cpp's module name."""
    gguf = require_gguf()
    reader = gguf.GGUFReader(str(path))
    fields = reader.fields
    arch = fields["general.architecture"].contents()
    alpha = float(fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    halves: dict[str, dict[str, Tensor]] = {}
    for t in reader.tensors:
        name, which = t.name.rsplit(".", 1)
        halves.setdefault(name, {})[which] = torch.from_numpy(t.data.copy()).float()
    return arch, alpha, {name: (pair["lora_a"], pair["lora_b"]) for name, pair in halves.items()}
