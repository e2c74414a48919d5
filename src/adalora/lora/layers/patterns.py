"""What an adapter's LoraConfig says of the ranks and scales of its layers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from adalora.lora.layers.triplets import TripletHandle, lora_config


def rescale(model: nn.Module, handles: list[TripletHandle], factor: float) -> None:
    """Multiply the LoRA scale of one adapter by `factor`, in the layers and in its LoraConfig alike.

    The scale that the adapter came with is remembered in the layer: a copy of the model can be attached anew.
    """
    for h in handles:
        if not hasattr(h.layer, "triplet_scale"):
            h.layer.triplet_scale = {}
            h.layer.other_param_names = (*h.layer.other_param_names, "triplet_scale")
        h.layer.triplet_scale.setdefault(h.adapter, h.layer.scaling[h.adapter])
        h.layer.scaling[h.adapter] *= factor
        h.layer.lora_alpha[h.adapter] *= factor
    config = lora_config(model, handles[0].adapter)
    config.lora_alpha = _whole(config.lora_alpha * factor)
    config.alpha_pattern = {key: _whole(value * factor) for key, value in config.alpha_pattern.items()}


def write_patterns(model: nn.Module, handles: list[TripletHandle], *, ranks: Sequence[int] | None = None) -> None:
    """Put the ranks of layers into the adapter's LoraConfig, so that stock PEFT rebuilds them.

    Modules without triplets go to `exclude_modules`. α of each module keeps its scale: α_i = s·r_i, or s·√r_i.

    Args:
        model: The PEFT model.
        handles: All layers of one adapter.
        ranks: Triplets of each; by default those that the layers now have.
    """
    config = lora_config(model, handles[0].adapter)
    ranks = [h.rank for h in handles] if ranks is None else ranks
    found = [(h, h.lora_rank(rank)) for h, rank in zip(handles, ranks)]
    live = {f"^{re.escape(h.name)}": rank for h, rank in found if rank}
    if not live:
        return
    root = 0.5 if config.use_rslora else 1
    alphas = {f"^{re.escape(h.name)}": _whole(h.lora_scale * rank**root) for h, rank in found if rank}
    if isinstance(config.init_lora_weights, str):
        # How it started is over; PEFT would ask its conditions of the new ranks.
        config.init_lora_weights, config.eva_config = True, None
    largest = max(live, key=lambda key: live[key])
    config.r, config.lora_alpha = live[largest], alphas[largest]
    config.rank_pattern = {key: rank for key, rank in live.items() if rank != config.r}
    config.alpha_pattern = {key: alpha for key, alpha in alphas.items() if alpha != config.lora_alpha}
    gone = "|".join(re.escape(h.name) for h, rank in found if not rank)
    if gone:
        before = config.exclude_modules
        if before and not isinstance(before, str):
            before = "|".join(rf"(.*\.)?{re.escape(name)}" for name in sorted(before))
        config.exclude_modules = f"({before})|{gone}" if before else gone


def _whole(value: float) -> int | float:
    """An integer where it is one: some servers read lora_alpha as an integer."""
    return round(value) if abs(value - round(value)) < 1e-9 else value
