"""P, λ and Q as three parameters of a LoRA layer (Eq. 3); what leaves the model is plain LoRA.

λ is an `nn.ParameterDict` beside PEFT's own, so that `set_adapter`, `delete_adapter` and moves to a device reach it.
A state dict holds P·diag(λ) as `lora_B` and no λ: stock PEFT loads it. Loading one splits it again.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from adalora.lora.layers.forward import TripletVariant, shorten
from adalora.lora.layers.groups import groups_of, vectors_by_group
from adalora.lora.layers.triplets import TripletHandle


class SvdLinear(TripletVariant):
    """Linear: result + ((dropout(x) Qᵀ) ∘ s·λ) Pᵀ."""

    @staticmethod
    def terms(module: Any, adapter: str) -> tuple[float, Tensor | None]:
        """The scale of λ, and λ."""
        return module.scaling[adapter] * module.lora_gain[adapter], module.lora_lambda[adapter]


class SvdConv(TripletVariant):
    """Conv1d, Conv2d, Conv3d: λ scales the channels between PEFT's two convolutions, which lie group after group."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Base output plus the adapter's part, same shape as `result`."""
        h = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        weights = _weights(module, active_adapter).view(-1, *(1 for _ in range(module._kernel_dim - 2)))
        part: Tensor = module.lora_B[active_adapter](h * weights)
        return result + part


class SvdEmbedding(TripletVariant):
    """Embedding: the row of P that the token picks, times s·λ, times Q."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Base output plus the adapter's part, same shape as `result`."""
        hooks = {"input_fn": module.input_fns.get(active_adapter), "output_fn": module.output_fns.get(active_adapter)}
        h = module._embed(x, module.lora_embedding_A[active_adapter].T, **hooks)
        part: Tensor = (h * _weights(module, active_adapter)) @ module.lora_embedding_B[active_adapter].T
        scale = module._get_embed_scale()
        return result + (part if scale is None else part * scale.to(part.dtype))


def _weights(module: Any, adapter: str) -> Tensor:
    scale: float = module.scaling[adapter] * module.lora_gain[adapter]
    weights: Tensor = module.lora_lambda[adapter] * scale
    return weights


def add_lambda(handle: TripletHandle, weights: Tensor, *, gain: float = 1.0) -> None:
    """Give a layer a λ of its own; its P is taken without it from here on.

    Args:
        handle: The layer; it has no λ yet.
        weights: λ, [groups · r].
        gain: Factor on α/r.
    """
    layer, name = handle.layer, handle.adapter
    if not hasattr(layer, "lora_lambda"):
        layer.lora_lambda, layer.lora_gain = nn.ParameterDict(), {}
        layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_lambda")
        layer.other_param_names = (*layer.other_param_names, "lora_gain")
        layer.register_state_dict_post_hook(_fold_in_state)
        layer.register_load_state_dict_pre_hook(_split_in_state)
        layer.get_delta_weight = _DeltaWeight(layer)
    P = handle.P_parameter
    layer.lora_lambda[name] = nn.Parameter(weights.to(P.device, P.dtype), requires_grad=P.requires_grad)
    layer.lora_gain[name] = gain
    layer.lora_variant[name] = _variant(handle)
    shorten(layer)


def _variant(handle: TripletHandle) -> LoraVariant:
    if handle.is_embedding:
        return SvdEmbedding()
    return SvdLinear() if isinstance(handle.layer.lora_A[handle.adapter], nn.Linear) else SvdConv()


@torch.no_grad()
def fold_lambda(handle: TripletHandle) -> None:
    """Put λ into P for good: the layer is PEFT's plain LoRA again. Nothing to do where there is no λ."""
    layer, name = handle.layer, handle.adapter
    if handle.lambda_parameter is None:
        return
    handle.P_or.copy_(handle.left_or * handle.gain)
    del layer.lora_lambda[name], layer.lora_gain[name]
    layer.lora_variant.pop(name, None)


def _key(module: Any, prefix: str, adapter: str) -> str:
    """Name of P in a state dict."""
    if adapter in module.lora_embedding_A:
        return f"{prefix}lora_embedding_A.{adapter}"
    return f"{prefix}lora_B.{adapter}.weight"


def _column(module: Any, adapter: str, weights: Tensor) -> Tensor:
    """λ in the shape that multiplies the parameter behind P; for several groups with a row for each output."""
    if adapter in module.lora_embedding_A:
        return weights.unsqueeze(1)
    P, groups = module.lora_B[adapter].weight, groups_of(module, adapter)
    rows = weights.view(groups, -1, *(1 for _ in P.shape[2:]))
    return rows if groups == 1 else rows.repeat_interleave(P.shape[0] // groups, dim=0)


def _by_column(module: Any, adapter: str, tensor: Tensor) -> Tensor:
    """What is shaped like the parameter behind P with a row for each entry of λ."""
    if adapter in module.lora_embedding_A:
        return tensor
    return vectors_by_group(tensor, 1, groups_of(module, adapter)).flatten(2).flatten(0, 1)


def _fold_in_state(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """State-dict hook: P·diag(λ)·gain as PEFT's parameter, and no key that PEFT does not know."""
    for adapter, weights in module.lora_lambda.items():
        key = _key(module, prefix, adapter)
        del state[f"{prefix}lora_lambda.{adapter}"]
        factor = _column(module, adapter, weights.detach()) * module.lora_gain[adapter]
        state[key] = state[key].detach() * factor.to(state[key].device)


def _split_in_state(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load hook, the way back: columns as long as the live P's, pointing its way; λ takes the rest.

    A column of zeros keeps the live P, with λ = 0; one that is the live P·λ already changes nothing. A state that has
    a λ of its own is taken as it is.
    """
    for adapter, weights in module.lora_lambda.items():
        key, own = _key(module, prefix, adapter), f"{prefix}lora_lambda.{adapter}"
        live = module.lora_embedding_A[adapter] if adapter in module.lora_embedding_A else module.lora_B[adapter].weight
        if key not in state or own in state:
            continue
        if state[key].shape != live.shape:
            state[own] = weights.detach()
            continue
        here = live.detach() * (_column(module, adapter, weights.detach()) * module.lora_gain[adapter])
        same = _by_column(module, adapter, here != state[key].detach().to(here.device)).sum(dim=1) == 0
        folded, P = state[key].detach().float(), live.detach().float().to(state[key].device)
        length, wanted = (torch.linalg.vector_norm(_by_column(module, adapter, t), dim=1) for t in (folded, P))
        wanted = torch.where(wanted > 0, wanted, torch.ones_like(wanted))
        sign = torch.where(_by_column(module, adapter, folded * P).sum(dim=1) < 0, -1.0, 1.0)
        ratio = sign * length / wanted
        column = _column(module, adapter, torch.where(length > 0, ratio, torch.ones_like(ratio)))
        new = (length > 0) & ~same.to(length.device)
        state[key] = torch.where(_column(module, adapter, new), folded / column, P).to(live.dtype)
        own_now = weights.detach().to(length.device)
        state[own] = torch.where(same.to(length.device), own_now, (ratio / module.lora_gain[adapter]).to(live.dtype))


class _DeltaWeight:
    """PEFT's `get_delta_weight` on P·diag(λ): merging, unmerging and whatever else asks a layer for its ΔW.

    An object and no bound function: those cannot be pickled with their layer.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(self, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        layer = self._layer
        of_class = type(layer).get_delta_weight
        if adapter not in layer.lora_lambda:
            return cast(Tensor, of_class(layer, adapter, *args, **kwargs))
        in_embedding = adapter in layer.lora_embedding_A
        P = layer.lora_embedding_A[adapter] if in_embedding else layer.lora_B[adapter].weight
        original = P.data
        factor = _column(layer, adapter, layer.lora_lambda[adapter].detach()) * layer.lora_gain[adapter]
        try:
            P.data = original * factor
            return cast(Tensor, of_class(layer, adapter, *args, **kwargs))
        finally:
            P.data = original
