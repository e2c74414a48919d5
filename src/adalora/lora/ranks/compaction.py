"""Remove pruned triplets for good, or bring layers to the ranks of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adalora.lora.layers.triplets import TripletHandle
from adalora.lora.optimizers.batches import cut_states, select_together
from adalora.lora.optimizers.state import drop_parameters


def compact(handles: Sequence[TripletHandle], optimizer: Optimizer | None) -> None:
    """Drop masked triplets from every layer, in place, and the optimizer's moments with them.

    A layer left without triplets loses the adapter altogether: it costs nothing afterwards.

    Args:
        handles: All layers of one adapter; their masks say what stays and are all true afterwards.
        optimizer: The optimizer that owns the parameters, or None when training is over.

    Raises:
        CompactionError: The optimizer holds state that cannot be cut; nothing has been changed then.
    """
    pruned = [h for h in handles if not h.removed and h.live_rank < h.rank]
    parameters, dims, kept = _cuts(pruned)
    states = cut_states(optimizer, parameters, dims, kept) if optimizer is not None else [None] * len(parameters)
    data = select_together([p.detach() for p in parameters], dims, kept)
    with_gradient = [n for n, p in enumerate(parameters) if p.grad is not None]
    gradients = select_together(
        [cast(Tensor, parameters[n].grad) for n in with_gradient],
        [dims[n] for n in with_gradient],
        [kept[n] for n in with_gradient],
    )
    for parameter, value, state in zip(parameters, data, states):
        if optimizer is not None and state is not None:
            optimizer.state[parameter] = state
        replace_data_(parameter, value)
    for n, gradient in zip(with_gradient, gradients):
        parameters[n].grad = gradient
    for h in pruned:
        _settle(h, h.live_rank, optimizer)


def _cuts(handles: Sequence[TripletHandle]) -> tuple[list[nn.Parameter], list[int], list[list[int]]]:
    """Every parameter of some layers, its dimension that counts triplets, and which of them are live."""
    live = {id(h): [i for i, alive in enumerate(h.mask.tolist()) if alive] for h in handles}
    cuts = [(parameter, dim, h.places(live[id(h)], dim)) for h in handles for parameter, dim in h.factors.values()]
    return [p for p, _, _ in cuts], [dim for _, dim, _ in cuts], [kept for _, _, kept in cuts]


def resize(
    handles: Sequence[TripletHandle], ranks: Sequence[int], optimizer: Optimizer | None, *, model: nn.Module
) -> bool:
    """Bring layers to the ranks of a checkpoint whose weights come next; what they held is lost.

    Args:
        handles: All layers of one adapter.
        ranks: Rank of each, 0 for a layer that the adapter has left.
        optimizer: Forgets what it knew of parameters whose size changes.
        model: Gives the order of parameters that return to the optimizer.

    Returns:
        Whether anything changed.
    """
    changed = [(h, rank) for h, rank in zip(handles, ranks) if h.rank != rank]
    for h, rank in changed:
        if h.removed:
            _bring_back(h)
            if optimizer is not None:
                _return_parameters(h, handles, optimizer, model=model)
        for parameter, dim in h.factors.values():
            shape = list(parameter.shape)
            shape[dim] = h.length(rank, dim)
            replace_data_(parameter, parameter.detach().new_zeros(shape))
            if optimizer is not None:
                optimizer.state.pop(parameter, None)
        _settle(h, rank, optimizer)
    return bool(changed)


def _settle(handle: TripletHandle, rank: int, optimizer: Optimizer | None) -> None:
    """Tell the layer its new rank; take the adapter off it where nothing is left."""
    layer, name = handle.layer, handle.adapter
    handle.mask = torch.tensor([True] * rank, dtype=torch.bool)
    if rank > 0:
        r = layer.r[name] = handle.lora_rank(rank)
        layer.lora_alpha[name] = handle.lora_scale * (r**0.5 if layer.use_rslora.get(name) else r)
        if name in layer.lora_A and isinstance(layer.lora_A[name], nn.Linear):
            layer.lora_A[name].out_features = layer.lora_B[name].in_features = r
        elif name in layer.lora_A:
            layer.lora_A[name].out_channels = layer.lora_B[name].in_channels = r
        return
    if optimizer is not None:
        drop_parameters(optimizer, [parameter for parameter, _ in handle.factors.values()])
    for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
        holder = getattr(layer, attribute, None)
        if holder is not None and name in holder:
            handle.parked[attribute] = holder[name]
            del holder[name]
    if name in layer.lora_variant:
        handle.parked["lora_variant"] = layer.lora_variant.pop(name)


def _bring_back(handle: TripletHandle) -> None:
    """Give a layer the adapter back that was taken off it, at rank 0."""
    for attribute, value in handle.parked.items():
        if isinstance(value, nn.Module):
            value.train(handle.layer.training)  # it was not there when the model was told
        getattr(handle.layer, attribute)[handle.adapter] = value
    handle.parked = {}


def _return_parameters(
    handle: TripletHandle, handles: Sequence[TripletHandle], optimizer: Optimizer, *, model: nn.Module
) -> None:
    """Put a returning layer's parameters into the group of its like, in the model's order as optimizers are made."""
    mine = [parameter for parameter, _ in handle.factors.values()]
    like = {id(p) for h in handles for p, _ in h.factors.values()} - {id(p) for p in mine}
    place = {id(p): number for number, p in enumerate(model.parameters())}
    for group in optimizer.param_groups:
        params = group["params"]
        if any(id(p) in like for p in params):
            places = [place.get(id(p), -1) for p in params]
            params.extend(mine)
            if places == sorted(places):
                params.sort(key=lambda p: place.get(id(p), -1))
            return


def replace_data_(parameter: nn.Parameter, data: Tensor) -> None:
    """Give a parameter a tensor of another size and keep its identity, on which optimizers and hooks rely.

    The empty tensor of another type in between makes autograd drop the accumulator that remembers the old shape.
    The gradient is gone afterwards.
    """
    other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
    parameter.grad = None
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = data


def adapter_size(handles: Sequence[TripletHandle], optimizer: Optimizer | None = None) -> tuple[int, int, int]:
    """Parameters and bytes of the adapter's factors in memory, and bytes of what the optimizer keeps for them."""
    tensors = [p for h in handles if not h.removed for p, _ in h.factors.values()]
    states = [optimizer.state.get(p, {}) for p in tensors] if optimizer is not None else []
    kept = [v for state in states for v in state.values() if isinstance(v, Tensor)]
    return (
        sum(p.numel() for p in tensors),
        sum(p.numel() * p.element_size() for p in tensors),
        sum(v.numel() * v.element_size() for v in kept),
    )
