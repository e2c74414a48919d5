"""What a server finds in an adapter folder, and what it makes of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adalora.export.adapter import block_diagonal
from adalora.export.base import Base, split_layer
from adalora.export.files import CONFIG_NAME, WEIGHTS_NAME, read_header, read_json, read_tensors
from adalora.export.reading import PREFIX, split_keys

# Module name -> (B times its scale, A): ΔW = B @ A. Modules that are not in it stay as the base has them.
Effective = dict[str, tuple[Tensor, Tensor]]

QKV = ("q_proj", "k_proj", "v_proj")
DECODER_LEAVES = frozenset(
    (
        *QKV,
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "qkv_proj",
        "gate_up_proj",
        "lm_head",
        "embed_tokens",
    )
)


class Refused(Exception):
    """The stack stops with an error instead of computing something; the text says why."""


@dataclass(frozen=True)
class Served:
    """An adapter folder as files.

    Attributes:
        folder: Where it lies.
        config: `adapter_config.json`.
        pairs: Module name -> (B, A) as stored, convolutions flattened, float64; B of several groups block-diagonal.
        embeddings: Names of embedding modules.
        convolutions: Names of convolutions, with their groups.
        extras: Tensor names that are no LoRA matrices, without PEFT's prefix.
        adalora: The file holds lora_E beside lora_A and lora_B.
        metadata: Strings in the header of the safetensors file.
        base: Modules of the base model.
    """

    folder: Path
    config: Mapping[str, Any]
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    embeddings: frozenset[str]
    convolutions: Mapping[str, int]
    extras: tuple[str, ...]
    adalora: bool
    metadata: Mapping[str, str]
    base: Base

    @property
    def rank(self) -> int:
        """`r` of the config."""
        return int(self.config.get("r", 8))

    @property
    def alpha(self) -> float:
        """`lora_alpha` of the config."""
        return float(self.config.get("lora_alpha", 8))

    @property
    def rslora(self) -> bool:
        """Whether alpha is divided by √r."""
        return bool(self.config.get("use_rslora"))

    def sites(self, leaf: str) -> list[str]:
        """Modules of the base model whose last name part is `leaf`, in its order."""
        return [name for name in self.base.sites if name.rsplit(".", 1)[-1] == leaf]

    def scaled(self, scale: Callable[[str, int], float]) -> Effective:
        """Every pair with lora_B times scale(module name, rank of its tensors)."""
        return {name: (B * scale(name, A.shape[0]), A) for name, (B, A) in self.pairs.items()}


def read_served(folder: Path, base: Base) -> Served:
    """Read an adapter folder without interpreting ranks or scales."""
    header = read_header(folder / WEIGHTS_NAME)
    modules, extras = split_keys(read_tensors(folder / WEIGHTS_NAME))
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    embeddings, convolutions, adalora = set(), dict[str, int](), False
    for name, parts in modules.items():
        adalora |= "lora_E" in parts
        if "lora_embedding_A" in parts:
            embeddings.add(name)
            A, B = parts["lora_embedding_A"], parts["lora_embedding_B"]
        else:
            A, B = parts["lora_A"], parts["lora_B"]
            if A.dim() > 2:
                convolutions[name] = A.shape[0] // B.shape[1]
                B = block_diagonal(B.flatten(1), convolutions[name])
        pairs[name] = (B.flatten(1).double(), A.flatten(1).double())
    return Served(
        folder=folder,
        config=read_json(folder / CONFIG_NAME),
        pairs=pairs,
        embeddings=frozenset(embeddings),
        convolutions=convolutions,
        extras=tuple(key.removeprefix(PREFIX) for key in extras),
        adalora=adalora,
        metadata=header.get("__metadata__", {}),
        base=base,
    )


def layer_number(name: str) -> int | None:
    """The number after `layers.` in a module name, as SGLang and others look for it."""
    match = re.search(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def not_a_decoder(served: Served) -> str | None:
    """Why servers of decoder language models have no place for this adapter, or None."""
    other = sorted({name.rsplit(".", 1)[-1] for name in served.pairs} - DECODER_LEAVES)
    if other:
        return f"serves decoder language models; it has no module {other[0]!r}"
    outside = next((n for n in served.pairs if split_layer(n) is None and n.split(".")[-1] in QKV), None)
    return f"serves decoder language models; {outside!r} is in no layer" if outside else None


def refuse(condition: object, reason: str) -> None:
    """Raise `Refused` where the condition holds."""
    if condition:
        raise Refused(reason)


def plain_scale(served: Served, rank: int, *, knows_rslora: bool) -> float:
    """The global alpha over a rank, or over its root where stack and adapter know rsLoRA."""
    return served.alpha / (math.sqrt(rank) if served.rslora and knows_rslora else rank)
