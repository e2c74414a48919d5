"""The forward pass of an adaptive Linear layer: PEFT's LoRA, fused."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor
from torch.nn import functional

# Attribute of a layer: adapter name -> which triplets take part in training, [r] bool (nested training).
DROPPED = "adalora_dropped"


class TripletVariant(LoraVariant):
    """Plain LoRA with one fused product: result + (s·dropout(x) Qᵀ) Pᵀ.

    PEFT's own forward makes three tensors of the layer's output size (product, scaled product, sum); this one makes
    one. Merging is plain LoRA's.
    """

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing to add to the layer."""

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """New weight with the adapter added."""
        return orig_weight + cast(Tensor, module.get_delta_weight(active_adapter)).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Add the adapter to the weight in place."""
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Weight without the adapter."""
        return orig_weight - cast(Tensor, module.get_delta_weight(active_adapter)).to(orig_weight.dtype)

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Base output plus the adapter's part, same shape as `result`."""
        Q_ri = module.lora_A[active_adapter].weight
        P_or = module.lora_B[active_adapter].weight
        h = functional.linear(module.lora_dropout[active_adapter](x), Q_ri) * module.scaling[active_adapter]
        if module.training and (live := getattr(module, DROPPED, {}).get(active_adapter)) is not None:
            h = h * live
        if h.dtype != result.dtype or P_or.dtype != h.dtype:
            return result + functional.linear(h, P_or)
        rows = torch.addmm(result.reshape(-1, result.shape[-1]), h.reshape(-1, h.shape[-1]), P_or.T)
        return rows.view(result.shape)
