"""Keeps pruned triplets at zero, a shape at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from adalora.lora.optimizer_state import weight_copies
from adalora.lora.triplets import TripletHandle


@torch.no_grad()
def zero_pruned(handles: Sequence[TripletHandle], optimizer: Optimizer | None = None) -> None:
    """Zero P of the pruned triplets, whatever it held; Q keeps its direction, from which a triplet may grow again.

    Layers without pruned triplets are not touched. Where the optimizer has weights of its own that it goes back to,
    those are zeroed too.
    """
    groups: dict[tuple[torch.Size, torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for h in handles:
        if h.live_rank < h.rank:
            for weights in (h.P_parameter.detach(), *weight_copies(optimizer, h.P_parameter)):
                P_or = h.as_P(weights)
                groups[P_or.shape, P_or.device, P_or.dtype].append((P_or, h.mask))
    for group in groups.values():
        factors, masks = zip(*group)
        dead = ~torch.stack(masks).unsqueeze(1)
        kept = torch.stack(factors).masked_fill_(dead.to(factors[0].device, non_blocking=True), 0)
        torch._foreach_copy_(list(factors), list(kept.unbind()))
