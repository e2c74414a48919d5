"""The triplets of one LoRA layer: where P, λ and Q live in PEFT, whatever the kind of layer.

ΔW = s · P · diag(λ) · Q with P [d_out, r] and Q [r, d_in]. In a Linear layer P is `lora_B` and Q `lora_A`; in an
Embedding, whose weight is transposed, P is `lora_embedding_A`ᵀ and Q `lora_embedding_B`ᵀ: P is always the factor that
PEFT starts at zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import layer as peft_layers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from adalora.errors import AttachError
from adalora.lora.forward import TripletVariant

CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")  # values of init_lora_weights


@dataclass(eq=False)
class TripletHandle:
    """One adapted layer. Holds the layer, never its parameters: FSDP and Accelerate swap those.

    Attributes:
        name: Full module name inside the base model, as PEFT's patterns see it.
        layer: PEFT's LoRA layer.
        adapter: Adapter name.
        mask: Which triplets are live, [r], bool, on the CPU.
        row_norm: ρ, root mean square length of Q's rows when training started.
        whole: While a sharded adapter is worked on (`Shards.whole`): its whole parameters, by factor.
        fingerprint: Of the base weight when the layer was attached.
        parked: Once the last triplet is gone: what the layer held for the adapter, by attribute, at rank 0. A
            checkpoint from before may bring it back.
    """

    name: str
    layer: Any
    adapter: str
    mask: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    row_norm: float = 0.0
    whole: dict[str, nn.Parameter] = field(default_factory=dict)
    fingerprint: str = ""
    parked: dict[str, Any] = field(default_factory=dict)
    _counted: tuple[Tensor | None, int, int] = field(default=(None, 0, 0), repr=False)

    def __post_init__(self) -> None:
        self.mask = torch.ones(self.rank, dtype=torch.bool)
        self.d_out, self.d_in = self.P_or.shape[0], self.Q_ri.shape[1]
        self.measure_rows()

    def measure_rows(self) -> None:
        """Set ρ from Q as it is."""
        self.row_norm = float(self.Q_ri.float().square().sum(dim=1).mean().sqrt())

    @property
    def is_embedding(self) -> bool:
        """Embedding layers keep their factors transposed and as bare parameters."""
        return self.adapter in self.layer.lora_embedding_A or "lora_embedding_A" in self.parked

    @property
    def removed(self) -> bool:
        """The adapter was taken off this layer: its last triplet has been pruned and compacted."""
        return self.adapter not in self.layer.lora_A and self.adapter not in self.layer.lora_embedding_A

    @property
    def P_parameter(self) -> nn.Parameter:
        """The parameter behind P."""
        if self.whole:
            return self.whole["P"]
        if self.is_embedding:
            return cast(nn.Parameter, self.layer.lora_embedding_A[self.adapter])
        return cast(nn.Parameter, self.layer.lora_B[self.adapter].weight)

    @property
    def Q_parameter(self) -> nn.Parameter:
        """The parameter behind Q."""
        if self.whole:
            return self.whole["Q"]
        if self.is_embedding:
            return cast(nn.Parameter, self.layer.lora_embedding_B[self.adapter])
        return cast(nn.Parameter, self.layer.lora_A[self.adapter].weight)

    @property
    def lambda_parameter(self) -> nn.Parameter | None:
        """The parameter behind λ, [r]; None where P carries it."""
        if self.whole:
            return self.whole.get("lambda")
        weights = getattr(self.layer, "lora_lambda", None)
        return cast(nn.Parameter, weights[self.adapter]) if weights is not None and self.adapter in weights else None

    @property
    def factors(self) -> dict[str, tuple[nn.Parameter, int]]:
        """Every parameter of the layer's triplets, with its dimension that counts triplets: "P", "Q" and "lambda"."""
        if self.removed:
            return {}
        found = {"P": (self.P_parameter, self.P_dim), "Q": (self.Q_parameter, self.Q_dim)}
        weights = self.lambda_parameter
        return found if weights is None else {**found, "lambda": (weights, 0)}

    @property
    def sharded(self) -> dict[str, nn.Parameter]:
        """The parameters that are spread over processes, by factor."""
        return {name: p for name, (p, _) in self.factors.items() if isinstance(p, DTensor)}

    @property
    def Q_keys(self) -> tuple[str, str]:
        """What Q may be called in the layer's state dict."""
        return f"lora_A.{self.adapter}.weight", f"lora_embedding_B.{self.adapter}"

    @property
    def P_keys(self) -> tuple[str, str]:
        """What P may be called in the layer's state dict."""
        return f"lora_B.{self.adapter}.weight", f"lora_embedding_A.{self.adapter}"

    @property
    def P_dim(self) -> int:
        """Dimension of `P_parameter` that counts triplets."""
        return 0 if self.is_embedding else 1

    @property
    def Q_dim(self) -> int:
        """Dimension of `Q_parameter` that counts triplets."""
        return 1 if self.is_embedding else 0

    def as_P(self, tensor: Tensor) -> Tensor:
        """View a tensor shaped like `P_parameter` (it, its gradient, a moment) as [d_out, r]."""
        return tensor.T if self.is_embedding else tensor.flatten(1)

    def as_Q(self, tensor: Tensor) -> Tensor:
        """View a tensor shaped like `Q_parameter` as [r, d_in]."""
        return tensor.T if self.is_embedding else tensor.flatten(1)

    @property
    def P_or(self) -> Tensor:
        """P, [d_out, r], sharing the parameter's memory, outside the graph."""
        return self.as_P(_dense(self.P_parameter).detach())

    @property
    def Q_ri(self) -> Tensor:
        """Q, [r, d_in], sharing the parameter's memory, outside the graph."""
        return self.as_Q(_dense(self.Q_parameter).detach())

    @property
    def left_or(self) -> Tensor:
        """P·diag(λ), [d_out, r]: what a plain LoRA file holds, up to `gain`. A copy where λ is a parameter."""
        weights = self.lambda_parameter
        return self.P_or if weights is None else self.P_or * weights.detach()

    @property
    def rank(self) -> int:
        """Triplets held in memory, pruned ones included."""
        return 0 if self.removed else self.Q_parameter.shape[self.Q_dim]

    @property
    def live_rank(self) -> int:
        """Triplets not pruned."""
        seen, version, live = self._counted
        if seen is not self.mask or version != self.mask._version:  # counted once a mask, not at every step
            live = sum(self.mask.tolist())
            self._counted = (self.mask, self.mask._version, live)
        return live

    @property
    def scale(self) -> float:
        """S in ΔW = s·P·diag(λ)·Q."""
        return self.lora_scale * self.gain

    @property
    def lora_scale(self) -> float:
        """LoRA's own α/r: what a plain LoRA file is scaled with, whose P holds `gain` already."""
        return float(self.layer.scaling[self.adapter])

    @property
    def gain(self) -> float:
        """Factor on LoRA's α/r that the layer has beside it; 1 where P carries λ."""
        return float(getattr(self.layer, "lora_gain", {}).get(self.adapter, 1.0))

    @property
    def parameters_per_triplet(self) -> int:
        """d_out + d_in: what one triplet costs in the saved adapter."""
        return self.d_out + self.d_in

    def describe(self) -> dict[str, Any]:
        """The module's line in the history."""
        return {
            "name": self.name,
            "kind": type(self.layer.get_base_layer()).__name__,
            "d_out": self.d_out,
            "d_in": self.d_in,
            "rank": self.rank,
            "parameters_per_triplet": self.parameters_per_triplet,
        }


def _dense(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter with its rows in a row: only then are the [d_out, r] views its own memory (channels_last)."""
    if not parameter.is_contiguous():
        parameter.data = parameter.data.contiguous()
    return parameter


def base_model(model: nn.Module) -> nn.Module:
    """The module whose sub-module names PEFT's patterns are matched against."""
    return cast(nn.Module, model.base_model.model) if isinstance(model, PeftModel) else model


def lora_config(model: nn.Module, adapter: str) -> Any:
    """The adapter's live LoraConfig."""
    return cast(Any, model).peft_config[adapter]


def adapter_name(model: nn.Module, given: str | None) -> str:
    """The adapter that is meant: the one given, else the active one."""
    active = getattr(model, "active_adapter", "default") if given is None else given
    return active if isinstance(active, str) else "default"


def find_triplets(model: nn.Module, adapter: str) -> list[TripletHandle]:
    """Handles of all layers that carry `adapter`, in the model's order, a shared layer once.

    Raises:
        AttachError: There is none, or a layer's LoRA is of a kind that triplets do not fit.
    """
    layers = [(name, m) for name, m in base_model(model).named_modules() if isinstance(m, LoraLayer)]
    mine = [(n, m) for n, m in layers if adapter in m.lora_A or adapter in m.lora_embedding_A]
    if not mine:
        raise AttachError(_no_layer_message(model, layers, adapter))
    _refuse_changed_base(model, adapter)
    for name, layer in mine:
        _refuse_unsupported(name, layer, adapter)
    _refuse_shared_factors(mine, adapter)
    return [TripletHandle(name=n, layer=m, adapter=adapter) for n, m in mine]


def _no_layer_message(model: nn.Module, layers: list[tuple[str, Any]], adapter: str) -> str:
    if not layers:
        return (
            f"{type(model).__name__} has no LoRA layer. Make one first: "
            'model = peft.get_peft_model(model, peft.LoraConfig(r=12, target_modules="all-linear"))'
        )
    names = sorted({key for _, m in layers for key in (*m.lora_A, *m.lora_embedding_A)})
    return f"no LoRA layer carries an adapter named {adapter!r}; the model has {', '.join(map(repr, names))}"


def _refuse_changed_base(model: nn.Module, adapter: str) -> None:
    """Starts that take the adapter's first product out of the base weight need its ranks again at loading."""
    start = getattr(getattr(model, "peft_config", {}).get(adapter), "init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise AttachError(
            f"init_lora_weights={start!r} changes the base weights, and a saved adapter whose ranks have changed no "
            'longer fits them. Use init_lora_weights="eva", or adalora.GradientSketch(model, batches).initialize(), '
            "which leave the base as it is"
        )


def _refuse_unsupported(name: str, layer: Any, adapter: str) -> None:
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
    base = layer.get_base_layer()
    if isinstance(layer, peft_layers.ParamWrapper):
        raise AttachError(
            f"{name}: LoRA on parameters (target_parameters) shares one factor among experts and has no triplets; "
            "target modules instead"
        )
    if getattr(base, "groups", 1) != 1:
        raise AttachError(
            f"{name}: convolution with groups={base.groups}: each triplet reaches one group's outputs alone, and PEFT "
            "loads only ranks that are a multiple of the groups, as many triplets for each: a single one cannot be "
            "pruned, nor does PEFT merge such a layer; leave it out of target_modules"
        )
    factors = [*layer.lora_A.parameters(), *layer.lora_embedding_A.parameters()]
    if any(isinstance(p, DTensor) for p in factors):
        raise AttachError(f"{name}: the adapter is sharded already; call adalora.attach(model) before fully_shard")
    if any(p.is_meta for p in factors):
        raise AttachError(
            f"{name}: the adapter has no values yet (low_cpu_mem_usage=True); load it, or use "
            "get_peft_model(model, config) without low_cpu_mem_usage"
        )


def _refuse_shared_factors(layers: list[tuple[str, Any]], adapter: str) -> None:
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


def fresh(handles: list[TripletHandle]) -> bool:
    """Whether the adapter adds nothing yet: every P·Λ is zero, as LoRA starts."""
    return not any(bool(h.left_or.any()) for h in handles)
