"""The layouts of a plain LoRA adapter: what goes into config and tensors of each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adalora.errors import AdapterFileError
from adalora.export.adapter import Adapter, Factor
from adalora.export.base import Base, Site
from adalora.export.fusion import fused_siblings
from adalora.export.reading import PREFIX, plain_config

# Servers keep LoRA matrices in buffers of these ranks; TGI and LoRAX have kernels for no others.
ALLOWED_RANKS = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Layout:
    """The content of an adapter folder.

    Attributes:
        config: `adapter_config.json`.
        tensors: `adapter_model.safetensors`.
        notes: What the user should know about this export.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def next_rank(rank: int, multiple: int | None = None) -> int:
    """The rank to pad to: 16, 32, 64 …, or the next multiple of a number.

    Args:
        rank: Largest rank of any module.
        multiple: Pad to a multiple of this instead.

    Raises:
        AdapterFileError: `multiple` is below 1, or the rank above every allowed size.
    """
    if multiple is not None:
        if multiple < 1:
            raise AdapterFileError(f"rank multiple {multiple}; a whole number above 0 is wanted")
        return max(1, -(-rank // multiple)) * multiple
    for size in ALLOWED_RANKS:
        if rank <= size:
            return size
    raise AdapterFileError(f"rank {rank} is above {ALLOWED_RANKS[-1]}, the most a server takes; use --budget or ragged")


def to_tensors(factor: Factor, *, rank: int, scale: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """The two matrices of one module as PEFT stores them, padded with zeros to `rank`.

    Args:
        factor: Its values are folded into lora_B and divided by `scale`.
        rank: r of the file, at least the factor's; a multiple of its groups.
        scale: What the reader will multiply by.
        dtype: dtype to store.

    Returns:
        Tensor name with PEFT's prefix -> tensor.
    """
    B, A = factor.left * factor.values / scale, factor.by_group()
    more = rank // factor.groups - factor.rank
    A = torch.nn.functional.pad(A, (0, 0, 0, more)).flatten(0, 1).to(dtype).contiguous()
    B = torch.nn.functional.pad(B, (0, more)).to(dtype).contiguous()
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise AdapterFileError(f"{factor.name}: values above the range of {dtype}; use --dtype bfloat16 or float32")
    name = PREFIX + factor.name
    if factor.kind == "embedding":
        return {f"{name}.lora_embedding_A": A, f"{name}.lora_embedding_B": B}
    if factor.kind == "conv":
        A, B = A.reshape(rank, *factor.kernel), B.reshape(*B.shape, *(1 for _ in factor.kernel[1:]))
    return {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}


def zero_factor(name: str, site: Site) -> Factor:
    """A module whose ΔW is 0: rank 0."""
    left, right = torch.zeros(site.d_out, 0), torch.zeros(0, site.d_in)
    return Factor(name, site.kind, left, torch.zeros(0), right)


def _extras(adapter: Adapter, dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: (t.to(dtype) if t.is_floating_point() else t).contiguous() for k, t in adapter.extras.items()}


def portable(adapter: Adapter, base: Base, *, dtype: torch.dtype, rank_multiple: int | None = None) -> Layout:
    """The layout that every server computes exactly: one rank, scale 1, every targeted module in every layer.

    Args:
        adapter: A cleaned adapter.
        base: The modules that exist; those of a targeted suffix that have no change get zeros.
        dtype: dtype to store.
        rank_multiple: Pad ranks to a multiple of this instead of 16, 32, 64 ….
    """
    live = {name: f for name, f in adapter.factors.items() if f.rank}
    rank = _rank_of_all(adapter, rank_multiple)
    leaves = {f.leaf for f in live.values()} or {f.leaf for f in adapter.factors.values()}
    saved = tuple(adapter.config.get("modules_to_save") or ())
    sites = {
        name: site
        for name, site in base.sites.items()
        if name.rsplit(".", 1)[-1] in leaves and site.kind != "conv" and not any(m in name.split(".") for m in saved)
    }
    filled, notes = fused_siblings(sites, base)
    factors = {name: live.get(name) or zero_factor(name, site) for name, site in {**sites, **filled}.items()}
    factors.update({name: f for name, f in live.items() if name not in factors})
    if not base.known:
        notes.append("number of layers taken from the adapter's own names; give --base to check it against the model")
    tensors: dict[str, Tensor] = {}
    for factor in factors.values():
        tensors.update(to_tensors(factor, rank=rank, scale=1.0, dtype=dtype))
    config = {
        **plain_config(adapter.config),
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({f.leaf for f in factors.values()}),
    }
    return Layout(config, {**tensors, **_extras(adapter, dtype)}, tuple(notes))


def _rank_of_all(adapter: Adapter, multiple: int | None) -> int:
    """The one r of a portable file, which PEFT takes for a convolution where it is a multiple of its groups."""
    step = math.lcm(*(f.groups for f in adapter.factors.values() if f.rank))
    if multiple is not None:
        return next_rank(adapter.max_rank, max(multiple, 0) and math.lcm(multiple, step))
    if step == 1:
        return next_rank(adapter.max_rank)
    found = next((size for size in ALLOWED_RANKS if size >= adapter.max_rank and size % step == 0), None)
    if found is None:
        raise AdapterFileError(
            f"portable gives all modules one rank of {', '.join(map(str, ALLOWED_RANKS))}; convolutions with groups "
            f"want a multiple of {step}, here from {adapter.max_rank} up: --rank-multiple {step}, or --format ragged"
        )
    return found


def _targets(adapter: Adapter, base: Base) -> list[str]:
    """Leaf names where every module of that name is changed, full names where some have rank 0."""
    live = {name for name, f in adapter.factors.items() if f.rank}
    leaves = {name.rsplit(".", 1)[-1] for name in live}
    others = {name for name in (*base.sites, *adapter.factors) if name.rsplit(".", 1)[-1] in leaves}
    return sorted(leaves) if others <= live and base.known else sorted(live)


def ragged(adapter: Adapter, base: Base, *, dtype: torch.dtype, rank_multiple: int | None = None) -> Layout:
    """The smallest layout: each module its own rank, alpha = rank, modules of rank 0 left out.

    Args:
        adapter: A cleaned adapter.
        base: Tells whether leaf names are enough as targets.
        dtype: dtype to store.
        rank_multiple: Pad each rank to a multiple of this.
    """
    return _ragged(adapter, base, dtype=dtype, rank_multiple=rank_multiple, with_alpha=True)


def gguf_ragged(adapter: Adapter, base: Base, *, dtype: torch.dtype, rank_multiple: int | None = None) -> Layout:
    """Like `ragged` for servers that divide one global alpha by each tensor's own rank (llama.cpp's rule).

    There is no alpha_pattern; lora_B is pre-scaled by r_i/alpha. PEFT computes the same ΔW.

    Args:
        adapter: A cleaned adapter.
        base: Tells whether leaf names are enough as targets.
        dtype: dtype to store.
        rank_multiple: Pad each rank to a multiple of this.
    """
    return _ragged(adapter, base, dtype=dtype, rank_multiple=rank_multiple, with_alpha=False)


def _ragged(adapter: Adapter, base: Base, *, dtype: torch.dtype, rank_multiple: int | None, with_alpha: bool) -> Layout:
    live = {name: f for name, f in adapter.factors.items() if f.rank}
    if not live:
        raise AdapterFileError("every module has rank 0; there is nothing to write (use --format portable)")
    ranks = {name: next_rank(f.lora_rank, math.lcm(rank_multiple or 1, f.groups)) for name, f in live.items()}
    largest = max(ranks.values())
    tensors: dict[str, Tensor] = {}
    for name, f in live.items():
        scale = 1.0 if with_alpha else largest / ranks[name]
        tensors.update(to_tensors(f, rank=ranks[name], scale=scale, dtype=dtype))
    pattern = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != largest}
    config = {
        **plain_config(adapter.config),
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern if with_alpha else {},
        "target_modules": _targets(adapter, base),
    }
    return Layout(config, {**tensors, **_extras(adapter, dtype)})


def peft_adalora(adapter: Adapter, base: Base, *, dtype: torch.dtype, rank_multiple: int | None = None) -> Layout:
    """PEFT's own AdaLoRA type, pruned: for code that expects it.

    Args:
        adapter: A cleaned adapter of linear modules.
        base: Tells whether leaf names are enough as targets.
        dtype: dtype to store.
        rank_multiple: Not used; PEFT cuts each module to its own rank.
    """
    live = {name: f for name, f in adapter.factors.items() if f.rank}
    other = next((f for f in live.values() if f.kind != "linear"), None)
    if other is not None or not live:
        what = f"{other.name} is {other.noun}" if other else "every module has rank 0"
        raise AdapterFileError(f"{what}; PEFT's AdaLoRA has linear modules of rank 1 and more only")
    largest = max(f.rank for f in live.values())
    tensors: dict[str, Tensor] = {}
    for name, f in live.items():
        # PEFT divides by ranknum + 1e-5 and ranknum stays the initial rank.
        E = f.values * (largest + 1e-5) / largest
        parts = {"lora_A": f.right, "lora_B": f.left, "lora_E": E.unsqueeze(1)}
        tensors.update({f"{PREFIX}{name}.{key}": t.to(dtype).contiguous() for key, t in parts.items()})
    config = {
        **{k: v for k, v in plain_config(adapter.config).items() if k != "alpha_pattern"},
        "peft_type": "ADALORA",
        "init_r": largest,
        "target_r": max(1, round(sum(f.rank for f in live.values()) / len(live))),
        "lora_alpha": largest,
        "total_step": 1,
        "tinit": 0,
        "tfinal": 0,
        "target_modules": _targets(adapter, base),
        "rank_pattern": {f"{n}.lora_E": [i < f.rank for i in range(largest)] for n, f in live.items()},
    }
    return Layout(config, {**tensors, **_extras(adapter, dtype)})


LAYOUTS: Mapping[str, Callable[..., Layout]] = {
    "portable": portable,
    "ragged": ragged,
    "gguf-ragged": gguf_ragged,
    "peft-adalora": peft_adalora,
}
