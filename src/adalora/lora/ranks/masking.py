"""Keeps pruned triplets at zero, a shape at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from adalora.lora.layers.triplets import TripletHandle
from adalora.lora.optimizers.state import weight_copies


@torch.no_grad()
def zero_pruned(handles: Sequence[TripletHandle], optimizer: Optimizer | None = None) -> None:
    """Set λ of the pruned triplets to 0, or P's columns where P carries λ, whatever they held.

    Both keep their other directions, from which a triplet may grow again. Layers without pruned triplets are not
    touched. Where the optimizer has weights of its own that it goes back to, those are zeroed too.
    """
    groups: dict[tuple[torch.Size, torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for h in handles:
        if h.live_rank < h.rank:
            parameter, dim = h.factors.get("lambda", h.factors["P"])
            times = h.length(1, dim)
            mask = h.mask if times == 1 else h.mask.repeat(times)
            for weights in (parameter.detach(), *weight_copies(optimizer, parameter)):
                by_triplet = weights.movedim(dim, -1)
                groups[by_triplet.shape, by_triplet.device, by_triplet.dtype].append((by_triplet, mask))
    for group in groups.values():
        tensors, masks = zip(*group)
        stack = torch.stack(tensors)
        dead = ~torch.stack(masks).view(len(masks), *(1 for _ in stack.shape[2:]), -1)
        stack.masked_fill_(dead.to(stack.device, non_blocking=True), 0)
        torch._foreach_copy_(list(tensors), list(stack.unbind()))
