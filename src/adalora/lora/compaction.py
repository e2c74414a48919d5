"""Remove pruned triplets for good: parameters, gradients and optimizer state get smaller."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adalora.errors import CompactionError
from adalora.lora.triplets import TripletHandle


def compact(handles: list[TripletHandle], optimizer: Optimizer | None) -> None:
    """Drop masked triplets from every layer, in place, and the optimizer's moments with them.

    A layer left without triplets loses the adapter altogether: it costs nothing afterwards.

    Args:
        handles: All layers of one adapter; their masks say what stays and are all true afterwards.
        optimizer: The optimizer that owns the parameters, or None when training is over.

    Raises:
        CompactionError: The optimizer holds state that cannot be cut; nothing has been changed then.
    """
    pruned = [h for h in handles if not h.removed and not bool(h.mask.all())]
    cuts = [(p, dim, h.mask) for h in pruned for p, dim in h.factors.values()]
    for parameter, dim, _ in cuts:
        _check_state(parameter, dim, optimizer)
    for parameter, dim, mask in cuts:
        index = mask.nonzero().squeeze(1).to(parameter.device)
        _cut_state(parameter, dim, index, optimizer=optimizer)
        _shrink_(parameter, dim, index)
    for h in pruned:
        _settle(h, optimizer)


def _settle(handle: TripletHandle, optimizer: Optimizer | None) -> None:
    """Tell the layer its new rank; take the adapter off it where nothing is left."""
    layer, name, rank = handle.layer, handle.adapter, handle.live_rank
    handle.mask = torch.ones(rank, dtype=torch.bool)
    if rank > 0:
        layer.r[name] = rank
        layer.lora_alpha[name] = handle.scale * (rank**0.5 if layer.use_rslora.get(name) else rank)
        if name in layer.lora_A and isinstance(layer.lora_A[name], nn.Linear):
            layer.lora_A[name].out_features = layer.lora_B[name].in_features = rank
        elif name in layer.lora_A:
            layer.lora_A[name].out_channels = layer.lora_B[name].in_channels = rank
        return
    gone = {id(parameter) for parameter, _ in handle.factors.values()}
    if optimizer is not None:
        for group in optimizer.param_groups:
            for parameter in [p for p in group["params"] if id(p) in gone]:
                optimizer.state.pop(parameter, None)
            group["params"] = [p for p in group["params"] if id(p) not in gone]
    for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
        holder = getattr(layer, attribute, None)
        if holder is not None and name in holder:
            del holder[name]
    layer.lora_variant.pop(name, None)


def _state_tensors(parameter: nn.Parameter, optimizer: Optimizer | None) -> dict[str, Any]:
    """Tensors that the optimizer keeps for a parameter, without scalars such as Adam's step."""
    state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.numel() > 1}


def _check_state(parameter: nn.Parameter, dim: int, optimizer: Optimizer | None) -> None:
    for key, value in _state_tensors(parameter, optimizer).items():
        if value.shape != parameter.shape or not value.is_floating_point():
            raise CompactionError(
                f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} and type {value.dtype} for a "
                f"parameter of shape {tuple(parameter.shape)}: it cannot be cut with it. Set compact=False to keep "
                "pruned triplets masked, or use AdamW or SGD"
            )


def _cut_state(parameter: nn.Parameter, dim: int, index: Tensor, *, optimizer: Optimizer | None) -> None:
    for key, value in _state_tensors(parameter, optimizer).items():
        assert optimizer is not None
        optimizer.state[parameter][key] = value.index_select(dim, index.to(value.device)).contiguous()


def _shrink_(parameter: nn.Parameter, dim: int, index: Tensor) -> None:
    """Give a parameter a smaller tensor and keep its identity, on which optimizers and hooks rely.

    The empty tensor of another type in between makes autograd drop the accumulator that remembers the old shape.
    """
    small = parameter.detach().index_select(dim, index).contiguous()
    gradient = parameter.grad
    other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
    parameter.grad = None
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = small
    if gradient is not None:
        parameter.grad = gradient.index_select(dim, index).contiguous()
