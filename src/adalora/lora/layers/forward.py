"""The forward pass of an adaptive Linear layer: PEFT's LoRA, fused."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.modules import module as module_calls

from adalora.lora.layers.fused import fused_lora, under_autocast

# Attribute of a layer: adapter name -> which triplets take part in training, [r] bool (nested training).
DROPPED = "adalora_dropped"
_NONE: dict[str, Tensor] = {}
_TENSORS = (nn.Parameter, Tensor)


class TripletVariant(LoraVariant):
    """Plain LoRA in one fused function: result + s·dropout(x) Qᵀ Pᵀ.

    PEFT's own forward makes three more tensors of the layer's output size (product, scaled product, sum); this one
    adds into the one that is there. Where it is not certain that this is the same, the modules are called as PEFT
    does. Merging is plain LoRA's.
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
    def terms(module: Any, adapter: str) -> tuple[float, Tensor | None]:
        """The scale s, and λ where it is a parameter of its own."""
        return module.scaling[adapter], None

    @classmethod
    def forward(cls, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Base output plus the adapter's part, same shape as `result`."""
        return linear_forward(module, active_adapter, x, result, *cls.terms(module, active_adapter))


_STOCK_FORWARD = Linear.forward


class AdaptiveLinear(Linear):
    """PEFT's LoRA layer over a Linear, with a short way to the one adapter that is active.

    PEFT's own forward looks up a dozen attributes for cases that are not at hand, at every call: on a GPU that waits
    for the host as much as a small product costs. Whatever else is asked for goes that way.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's."""
        own = self.__dict__
        active = own["_active_adapter"]
        name: Any = active if type(active) is str else active[0] if len(active) == 1 else None
        terms = getattr(own["lora_variant"].get(name), "terms", None)
        if (
            args
            or kwargs
            or terms is None  # no adapter of ours
            or own["_disable_adapters"]
            or own["merged_adapters"]
            or torch.compiler.is_compiling()
        ):
            return _STOCK_FORWARD(self, x, *args, **kwargs)
        modules = own["_modules"]
        A = modules["lora_A"]._modules.get(name)
        cast_to = _autocast_dtype(x)  # what all products are made in
        if A is None or x.dtype not in (weight_of(A).dtype, cast_to):  # PEFT knows whether to cast it
            return _STOCK_FORWARD(self, x)
        base = modules["base_layer"]
        if not _is_plain(base) or _hooked_everywhere():
            result = base(x)
        else:  # its call does nothing but its product
            x = x if cast_to is None else x.to(cast_to)  # once for both parts
            result = None if _is_frozen(base, x, cast_to) else functional.linear(x, base.weight, base.bias)
        out = linear_forward(self, name, x, result, *terms(self, name), cast_to=cast_to)
        dtype = x.dtype if result is None else result.dtype
        return out if out.dtype == dtype else out.to(dtype)

    def _get_name(self) -> str:
        return "Linear"


def shorten(layer: Any) -> None:
    """Give a layer the short way, if it is PEFT's own Linear and nobody has put another forward in its place."""
    if type(layer) is Linear and Linear.forward is _STOCK_FORWARD:
        layer.__class__ = AdaptiveLinear


def linear_forward(
    module: Any,
    adapter: str,
    x: Tensor,
    result: Tensor | None,
    scale: float,
    weights: Tensor | None,
    *,
    cast_to: torch.dtype | None = None,
) -> Tensor:
    """Result + s·(dropout(x) Qᵀ ∘ λ) Pᵀ of a Linear layer, fused where that is certain to be the same.

    Args:
        module: PEFT's LoRA layer.
        adapter: Adapter name.
        x: Input, [..., d_in].
        result: The layer's output so far, [..., d_out]. None: that of the base layer, which is plain and trains
            nothing, and for which x has been cast already.
        scale: s.
        weights: λ, [r], where it is a parameter of its own.
        cast_to: What autocast makes products in; read only without `result`.
    """
    modules = module._modules  # past nn.Module's own look-up, which is several times slower; so below
    A, B = modules["lora_A"]._modules[adapter], modules["lora_B"]._modules[adapter]
    dropout = modules["lora_dropout"]._modules[adapter]
    live = module.__dict__.get(DROPPED, _NONE).get(adapter) if module.training else None
    if _eager() and _is_plain(A) and _is_plain(B):
        cast_to = cast_to if result is None else _autocast_dtype(x)
        rows = x if cast_to is None else x.to(cast_to)
        factors = [A._parameters["weight"], B._parameters["weight"]]
        if weights is not None:
            factors.append(weights)
        if _fusable(dropout, rows, factors, result, autocast=cast_to is not None):
            return _fused(module, adapter, dropout, rows, result, factors, scale=scale, live=live)
    if result is None:
        result = functional.linear(x, modules["base_layer"].weight, modules["base_layer"].bias)
    return _by_modules(A, B, dropout, x, result, scale=scale, weights=weights, live=live)


def _fused(
    module: Any,
    adapter: str,
    dropout: Any,
    x: Tensor,
    result: Tensor | None,
    factors: list[Tensor],
    *,
    scale: float,
    live: Tensor | None,
) -> Tensor:
    """The sum by `fused_lora`; `factors` are Q, P and perhaps λ."""
    Q_ri, P_or = factors[:2]
    lambda_r = factors[2] if len(factors) > 2 else None
    if live is not None and lambda_r is not None:
        lambda_r = lambda_r * live
    elif live is not None:
        P_or = P_or * live
    base, weight, bias = module._modules["base_layer"], None, None
    plain = result is None or (_is_plain(base) and _is_first(module, adapter))
    if result is None or (plain and _is_frozen(base, x)):
        weight, bias = base._parameters["weight"], base._parameters["bias"]
    return fused_lora(
        x,
        result,
        Q_ri,
        P_or,
        scale=scale,
        lambda_r=lambda_r,
        dropout=dropout.p if type(dropout) is not nn.Identity and dropout.training else 0.0,
        weight_oi=weight,
        bias_o=bias,
        in_place=plain,
    )


def _by_modules(
    A: Any, B: Any, dropout: Any, x: Tensor, result: Tensor, *, scale: float, weights: Any, live: Any
) -> Tensor:
    """The same sum by calls of PEFT's modules."""
    h = A(dropout(x))
    h = h * scale if weights is None else h * (weights * scale)
    return cast(Tensor, result + B(h if live is None else h * live))


def _eager() -> bool:
    """Whether operations are just run: nobody compiles (and so fuses by itself), traces or transforms them."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def _fusable(dropout: Any, x: Tensor, factors: list[Tensor], result: Tensor | None, *, autocast: bool) -> bool:
    """Whether `fused_lora` computes what the modules, which are plain, would."""
    dtype, kind = x.dtype, type(dropout)
    for t in factors:
        if (t.dtype != dtype and not autocast) or type(t) not in _TENSORS:
            return False
    return (
        (kind is nn.Identity or (kind is nn.Dropout and dropout.p < 1))
        and type(x) is Tensor
        and (result is None or _takes(result, dtype))
    )


def _takes(result: Tensor, dtype: torch.dtype) -> bool:
    """Whether adding something of that type makes that type."""
    return type(result) is Tensor and (result.dtype == dtype or torch.promote_types(result.dtype, dtype) == dtype)


def weight_of(layer: Any) -> nn.Parameter:
    """A layer's weight, past nn.Module's slow look-up where it is a parameter: every step asks for all of them."""
    found: nn.Parameter | None = layer._parameters.get("weight")
    return layer.weight if found is None else found


def _hooked_everywhere() -> bool:
    """Whether somebody has put a hook on all modules there are; torch 2.6 has no function that says so."""
    calls = cast(Any, module_calls)
    return bool(
        calls._global_backward_pre_hooks
        or calls._global_backward_hooks
        or calls._global_forward_pre_hooks
        or calls._global_forward_hooks
    )


def _is_plain(layer: Any) -> bool:
    """A Linear that is nothing but a product: no hook sees or changes what goes in or comes out."""
    if type(layer) is not nn.Linear:
        return False
    own = layer.__dict__
    return (
        type(own["_parameters"].get("weight")) in _TENSORS  # no DTensor, no quantised tensor
        and "forward" not in own  # accelerate puts its own there
        and not (
            own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
        )
    )


def _is_first(module: Any, adapter: str) -> bool:
    """Whether `result` is the base layer's own output and not yet another adapter's sum."""
    if len(module._modules["lora_A"]._modules) == 1:
        return True
    return next((name for name in module.active_adapters if name in module.lora_A), None) == adapter


def _is_frozen(base: Any, x: Tensor, cast_to: torch.dtype | None = None) -> bool:
    """Whether a plain layer trains nothing and works on x as it is."""
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    return (
        not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and (cast_to is not None or weight.dtype == x.dtype)
    )


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What products of x are made in under autocast; None without it, and for float64, which it leaves alone."""
    if not under_autocast(x) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(x.device.type)
