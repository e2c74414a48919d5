"""The triplets of one LoRA layer: where P, λ and Q live in PEFT, whatever the kind of layer.

ΔW = s · P · diag(λ) · Q with P [d_out, r] and Q [r, d_in]. In a Linear layer P is `lora_B` and Q `lora_A`; in an
Embedding, whose weight is transposed, P is `lora_embedding_A`ᵀ and Q `lora_embedding_B`ᵀ: P is always the factor that
PEFT starts at zero.

In a convolution with G groups PEFT's `lora_B` [d_out, r/G] is grouped as well: the outputs of each group have r/G
triplets of their own, and PEFT wants as many for each. There a triplet, as all else counts them, is the k-th of every
group: a column of `lora_B` with the G rows of `lora_A` that feed it. It is scored, pruned and removed as one. What is
about singular vectors goes group by group: `P_gor`, `Q_gri` and `lambda_gr`, whose first dimension is 1 for all other
layers. How they lie in memory is told in `adalora.lora.layers.groups`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from adalora.errors import AttachError
from adalora.lora.layers.forward import weight_of
from adalora.lora.layers.groups import by_group, groups_of, length_along, places_along
from adalora.lora.layers.refusals import (
    no_layer_message,
    refuse_changed_base,
    refuse_shared_factors,
    refuse_unsupported,
)


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
        noted_shape: Of the base weight when the layer was attached.
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
    noted_shape: list[int] | None = None
    parked: dict[str, Any] = field(default_factory=dict)
    _counted: tuple[Tensor | None, int, int] = field(default=(None, 0, 0), repr=False)

    def __post_init__(self) -> None:
        # Embedding layers keep their factors transposed and as bare parameters.
        self.is_embedding: bool = self.adapter in self.layer.lora_embedding_A
        # By adapter; every step looks into them, so past nn.Module's own look-up, which is slow.
        modules = self.layer._modules
        self._P_of: Any = self.layer.lora_embedding_A if self.is_embedding else modules["lora_B"]._modules
        self._Q_of: Any = self.layer.lora_embedding_B if self.is_embedding else modules["lora_A"]._modules
        self.groups = groups_of(self.layer, self.adapter)
        # Its parameters are P and Q as they are: a Linear's.
        self.is_matrix = not self.is_embedding and self.P_parameter.dim() == self.Q_parameter.dim() == 2
        self.mask = torch.ones(self.rank, dtype=torch.bool)
        self.d_out, self.d_in = self.P_or.shape[0], self.Q_gri.shape[2]
        self.measure_rows()

    def measure_rows(self) -> None:
        """Set ρ from Q as it is."""
        self.row_norm = float(self.Q_gri.float().square().sum(dim=2).mean().sqrt())

    @property
    def removed(self) -> bool:
        """The adapter was taken off this layer: its last triplet has been pruned and compacted."""
        return self.adapter not in self._Q_of

    @property
    def P_parameter(self) -> nn.Parameter:
        """The parameter behind P."""
        if self.whole:
            return self.whole["P"]
        found: Any = self._P_of[self.adapter]
        return cast(nn.Parameter, found) if self.is_embedding else weight_of(found)

    @property
    def Q_parameter(self) -> nn.Parameter:
        """The parameter behind Q."""
        if self.whole:
            return self.whole["Q"]
        found: Any = self._Q_of[self.adapter]
        return cast(nn.Parameter, found) if self.is_embedding else weight_of(found)

    @property
    def lambda_parameter(self) -> nn.Parameter | None:
        """The parameter behind λ, [groups · r]; None where P carries it."""
        if self.whole:
            return self.whole.get("lambda")
        weights = self.layer._modules.get("lora_lambda")
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
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of `factors`, P's first."""
        if self.removed:
            return []
        weights = self.lambda_parameter
        found = [self.P_parameter, self.Q_parameter]
        return found if weights is None else [*found, weights]

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
        if self.is_embedding:
            return tensor.T
        return tensor if tensor.dim() == 2 else tensor.flatten(1)

    def as_Q(self, tensor: Tensor) -> Tensor:
        """A tensor shaped like `Q_parameter` as [r, groups · d_in]: a view, but for several groups a copy."""
        if self.is_embedding:
            return tensor.T
        flat = tensor if tensor.dim() == 2 else tensor.flatten(1)
        return flat if self.groups == 1 else self.by_group(flat).transpose(0, 1).flatten(1)

    def by_group(self, tensor: Tensor) -> Tensor:
        """View something whose rows lie group after group as [groups, …]."""
        return by_group(tensor, self.groups)

    @property
    def P_or(self) -> Tensor:
        """P, [d_out, r], sharing the parameter's memory, outside the graph."""
        return self.as_P(_dense(self.P_parameter).detach())

    @property
    def Q_ri(self) -> Tensor:
        """Q, [r, groups · d_in], outside the graph; shares the parameter's memory where there is one group."""
        return self.as_Q(_dense(self.Q_parameter).detach())

    @property
    def P_gor(self) -> Tensor:
        """P of each group, [groups, d_out / groups, r], sharing the parameter's memory."""
        return self.by_group(self.P_or)

    @property
    def Q_gri(self) -> Tensor:
        """Q of each group, [groups, r, d_in], sharing the parameter's memory."""
        Q = _dense(self.Q_parameter).detach()
        return self.by_group(Q.T if self.is_embedding else Q.flatten(1))

    @property
    def lambda_gr(self) -> Tensor | None:
        """λ of each group, [groups, r], sharing the parameter's memory; None where P carries it."""
        weights = self.lambda_parameter
        return None if weights is None else self.by_group(weights.detach())

    @property
    def left_or(self) -> Tensor:
        """P·diag(λ), [d_out, r]: what a plain LoRA file holds, up to `gain`. A copy where λ is a parameter."""
        weights = self.lambda_gr
        return self.P_or if weights is None else (self.P_gor * weights.unsqueeze(1)).flatten(0, 1)

    def length(self, rank: int, dim: int) -> int:
        """Size of a factor's dimension `dim` that counts triplets, where there are `rank` of them."""
        return length_along(dim, rank=rank, groups=self.groups)

    def places(self, triplets: Sequence[int], dim: int) -> list[int]:
        """Where some triplets lie along a factor's dimension `dim`, ascending."""
        return places_along(dim, triplets, rank=self.rank, groups=self.groups)

    @property
    def rank(self) -> int:
        """Triplets held in memory, pruned ones included."""
        return 0 if self.removed else self.rank_of(self.Q_parameter.shape)

    def rank_of(self, Q_shape: Sequence[int]) -> int:
        """Triplets of a layer whose `Q_parameter` has this shape."""
        return Q_shape[self.Q_dim] // self.groups

    def lora_rank(self, rank: int) -> int:
        """PEFT's r where there are `rank` triplets."""
        return rank * self.groups

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
        """d_out + groups · d_in: what one triplet costs in the saved adapter."""
        return self.d_out + self.groups * self.d_in

    def describe(self) -> dict[str, Any]:
        """The module's line in the history."""
        return {
            "name": self.name,
            "kind": type(self.layer.get_base_layer()).__name__,
            "d_out": self.d_out,
            "d_in": self.d_in,
            "groups": self.groups,
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
        raise AttachError(no_layer_message(model, layers, adapter))
    refuse_changed_base(model, adapter)
    for name, layer in mine:
        refuse_unsupported(name, layer, adapter)
    refuse_shared_factors(mine, adapter)
    return [TripletHandle(name=n, layer=m, adapter=adapter) for n, m in mine]


def fresh(handles: list[TripletHandle]) -> bool:
    """Whether the adapter adds nothing yet: every P·Λ is zero, as LoRA starts."""
    return not any(bool(h.left_or.any()) for h in handles)
