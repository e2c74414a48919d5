"""Which of PEFT's LoRA layers triplets do not fit, and what to do instead."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import layer as peft_layers
from torch import nn
from torch.distributed.tensor import DTensor

from adalora.errors import AttachError
from adalora.lora.layers.forward import TripletVariant

CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")  # values of init_lora_weights


def no_layer_message(model: nn.Module, layers: list[tuple[str, Any]], adapter: str) -> str:
    """What is wrong with a model none of whose LoRA layers carries the adapter."""
    if not layers:
        return (
            f"{type(model).__name__} has no LoRA layer. Make one first: "
            'model = peft.get_peft_model(model, peft.LoraConfig(r=12, target_modules="all-linear"))'
        )
    names = sorted({key for _, m in layers for key in (*m.lora_A, *m.lora_embedding_A)})
    return f"no LoRA layer carries an adapter named {adapter!r}; the model has {', '.join(map(repr, names))}"


def refuse_changed_base(model: nn.Module, adapter: str) -> None:
    """Starts that take the adapter's first product out of the base weight need its ranks again at loading."""
    start = getattr(getattr(model, "peft_config", {}).get(adapter), "init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise AttachError(
            f"init_lora_weights={start!r} changes the base weights, and a saved adapter whose ranks have changed no "
            'longer fits them. Use init_lora_weights="eva", or adalora.GradientSketch(model, batches).initialize(), '
            "which leave the base as it is"
        )


def refuse_unsupported(name: str, layer: Any, adapter: str) -> None:
    """Raise `AttachError` for a layer whose adapter is no plain LoRA, or cannot be read."""
    if layer.merged:
        raise AttachError(f"{name}: adapter is merged into the base weight; call model.unmerge_adapter() first")
    variant = layer.lora_variant.get(adapter)
    if variant is not None and not isinstance(variant, TripletVariant):
        kind = type(variant).__name__
        raise AttachError(
            f"{name}: {kind} is not plain LoRA and its extra terms do not split into triplets; "
            "leave its option (use_dora, alora, …) out of LoraConfig"
        )
    if layer.lora_bias.get(adapter):
        raise AttachError(f"{name}: lora_bias=True is not supported (servers drop it); use LoraConfig(lora_bias=False)")
    if isinstance(layer, peft_layers.ParamWrapper):
        raise AttachError(
            f"{name}: LoRA on parameters (target_parameters) shares one factor among experts and has no triplets; "
            "target modules instead"
        )
    factors = [*layer.lora_A.parameters(), *layer.lora_embedding_A.parameters()]
    if any(isinstance(p, DTensor) for p in factors):
        raise AttachError(f"{name}: the adapter is sharded already; call adalora.attach(model) before fully_shard")
    if any(p.is_meta for p in factors):
        raise AttachError(
            f"{name}: the adapter has no values yet (low_cpu_mem_usage=True); load it, or use "
            "get_peft_model(model, config) without low_cpu_mem_usage"
        )


def refuse_shared_factors(layers: list[tuple[str, Any]], adapter: str) -> None:
    """What is a column of P in one layer and a row of Q in another cannot have a length, or leave, for one of them."""
    owner: dict[int, str] = {}
    for name, layer in layers:
        for holder in (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B):
            factor = getattr(holder[adapter], "weight", holder[adapter]) if adapter in holder else None
            place = 0 if factor is None else factor.data_ptr()
            if place and owner.setdefault(place, name) != name:
                raise AttachError(
                    f"{name}: shares its LoRA factors with {owner[place]} (ensure_weight_tying=True): what is P in the "
                    "one is Q in the other, and a triplet cannot leave one of them; leave ensure_weight_tying out of "
                    "LoraConfig"
                )
