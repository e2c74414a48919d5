"""Bottleneck adapters: Houlsby et al. (ICML 2019) and the leaner placement of Pfeiffer et al. (EACL 2021)."""

from __future__ import annotations

import re
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F

from adalora.errors import RecipeError

Placement: TypeAlias = Literal["houlsby", "pfeiffer"]

# The linear layer that ends a sublayer, right before its residual sum, by the names that transformers gives it.
ATTENTION_END = re.compile(
    r".*(attention\.output\.dense|attention\.attn\.o|attention\.out_lin|self_attn\.(o_proj|out_proj)"
    r"|attn\.c_proj|SelfAttention\.o|EncDecAttention\.o|encoder_attn\.out_proj)"
)
FEED_FORWARD_END = re.compile(
    r".*((?<!attention\.)output\.dense|down_proj|mlp\.c_proj|\.fc2|ffn\.lin2|DenseReluDense\.wo)"
)
INIT_STD = 1e-2  # Houlsby et al., 3.6: truncated at two standard deviations


class Bottleneck(nn.Module):
    """A linear layer followed by y + up(act(down(y))): near the identity at the start.

    Args:
        base: The layer that ends a sublayer; its output has `width` entries.
        width: Model width d.
        size: Bottleneck m; the adapter has 2·d·m + m + d parameters.
        activation: Between the two projections.
    """

    def __init__(self, base: nn.Module, *, width: int, size: int, activation: Literal["gelu", "relu"]) -> None:
        super().__init__()
        self.base = base
        weight = next(base.parameters())
        self.adapter_down = nn.Linear(width, size, device=weight.device)
        self.adapter_up = nn.Linear(size, width, device=weight.device)
        self.activation = F.gelu if activation == "gelu" else F.relu
        for layer in (self.adapter_down, self.adapter_up):
            nn.init.trunc_normal_(layer.weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` (…, d_in) to (…, d)."""
        out: torch.Tensor = self.base(hidden)
        change: torch.Tensor = self.adapter_up(
            self.activation(self.adapter_down(out.to(self.adapter_down.weight.dtype)))
        )
        return out + change.to(out.dtype)


def places(model: nn.Module, placement: Placement) -> dict[str, int]:
    """Names of the layers that get an adapter, and their output widths.

    Raises:
        RecipeError: The model's layers have names that are not known here.
    """
    patterns = [FEED_FORWARD_END] if placement == "pfeiffer" else [ATTENTION_END, FEED_FORWARD_END]
    found: dict[str, int] = {}
    for pattern in patterns:
        hits = {name: _width(module) for name, module in model.named_modules() if pattern.fullmatch(name)}
        hits = {name: width for name, width in hits.items() if width is not None}
        if not hits:
            raise RecipeError(
                f"{placement} adapters: no layer of {type(model).__name__} is known to end a sublayer; known names "
                "are those of BERT, MPNet, RoBERTa, DeBERTa, DistilBERT, Llama, GPT-2, T5, BART and Whisper"
            )
        found |= hits
    return found


def inject(model: nn.Module, placement: Placement, *, budget: int) -> int:
    """Put trainable adapters into a frozen model; their size is the largest that the budget can buy.

    With `houlsby` the layer norms are trained too, as in the paper, and count.

    Args:
        model: All of its parameters are frozen first.
        placement: Where.
        budget: Parameters that may be trained.

    Returns:
        The number of parameters that are trained now.

    Raises:
        RecipeError: Not even a bottleneck of 1 fits.
    """
    model.requires_grad_(False)
    chosen = places(model, placement)
    norms = layer_norms(model) if placement == "houlsby" else []
    fixed = sum(p.numel() for p in norms) + sum(chosen.values())  # biases of the up-projections
    each = sum(2 * width + 1 for width in chosen.values())
    size = (budget - fixed) // each
    if size < 1:
        raise RecipeError(f"{placement} adapters take {fixed + each:,} parameters at least; the budget is {budget:,}")
    for name, width in chosen.items():
        parent, _, leaf = name.rpartition(".")
        owner: Any = model.get_submodule(parent)
        activation: Literal["gelu", "relu"] = "gelu" if placement == "houlsby" else "relu"
        wrapped = Bottleneck(getattr(owner, leaf), width=width, size=size, activation=activation)
        setattr(owner, leaf, wrapped)
    for parameter in norms:
        parameter.requires_grad_(True)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def layer_norms(model: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of all normalisation layers."""
    return [
        parameter
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    ]


def _width(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    width = getattr(module, "nf", None)  # transformers' Conv1D
    return width if isinstance(width, int) else None
