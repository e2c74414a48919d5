"""How the weights of a grouped convolution's LoRA lie in memory: dimension 0 of every factor is group after group.

PEFT's `lora_A` is a full convolution with r outputs, `lora_B` a grouped one of shape [d_out, r/G, 1, …]: rows
g·r/G … (g+1)·r/G - 1 of A feed the outputs of group g, through the same rows of its part of B. Triplets are therefore
counted along dimension 1 of B, once for all groups, and along dimension 0 of A in each group anew. A layer of any
other kind has one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def groups_of(layer: Any, adapter: str) -> int:
    """Groups of the convolution that one of PEFT's LoRA layers adapts."""
    return 1 if adapter in layer.lora_embedding_A else getattr(layer.lora_B[adapter], "groups", 1)


def by_group(tensor: Tensor, groups: int) -> Tensor:
    """View [n, …] as [groups, n / groups, …]."""
    return tensor.view(groups, tensor.shape[0] // groups, *tensor.shape[1:])


def vectors_by_group(tensor: Tensor, dim: int, groups: int) -> Tensor:
    """View a factor's tensor as [groups, r, …]; `dim` counts its triplets."""
    return by_group(tensor, groups).movedim(dim + 1, 1)


def length_along(dim: int, *, rank: int, groups: int) -> int:
    """Size of the dimension that counts triplets, of `rank` triplets."""
    return rank * groups if dim == 0 else rank


def places_along(dim: int, triplets: Sequence[int], *, rank: int, groups: int) -> list[int]:
    """Where some of `rank` triplets lie along the dimension that counts them, in order of group, then of triplet."""
    return [group * rank + i for group in range(groups if dim == 0 else 1) for i in triplets]
