"""How an adapter starts: its scale, its factors, and the forward pass of its layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from adalora.config import AdaLoraConfig
from adalora.core.factored_svd import factored_svd
from adalora.core.initialization import LORA_ROW_NORM
from adalora.errors import AttachError
from adalora.lora.layers.forward import TripletVariant, shorten
from adalora.lora.layers.patterns import rescale, write_patterns
from adalora.lora.layers.svd import add_lambda, fold_lambda
from adalora.lora.layers.triplets import TripletHandle, fresh

RELEASED_STD = 0.02
RELEASED_EPSILON = 1e-5  # the released code divides α by r + 1e-5


@torch.no_grad()
def prepare(model: nn.Module, handles: list[TripletHandle], config: AdaLoraConfig, *, shrink: float) -> None:
    """Set scale, factors and forward of all layers of one adapter.

    An adapter that is trained already keeps its ΔW.

    Args:
        model: The PEFT model.
        handles: The adapter's layers.
        config: Settings.
        shrink: Initial budget over target budget.

    Raises:
        AttachError: Trained values would be lost, or a scale is asked for that they cannot have.
    """
    new = fresh(handles)
    if not new and config.initialization == "gaussian":
        raise AttachError(
            'the adapter is trained already and initialization="gaussian" would lose that: use "orthonormal" (its '
            'exact singular vectors) or "keep"'
        )
    if not new and "scale" in config.model_fields_set and config.scale != "initial":
        raise AttachError(
            f'the adapter is trained already and keeps its scale: leave scale={config.scale!r} out, or use "initial"'
        )
    if config.parametrization == "lora":
        for h in handles:
            fold_lambda(h)
    if new:
        _set_scale(model, handles, config, shrink=shrink)
    generator = torch.Generator().manual_seed(config.seed)
    for h in handles:
        if config.parametrization == "svd" and h.lambda_parameter is None:
            _start_svd(h, config, new=new, generator=generator)
        elif config.parametrization == "lora" and not h.is_embedding and isinstance(_Q_module(h), nn.Linear):
            h.layer.lora_variant[h.adapter] = TripletVariant()
            shorten(h.layer)
        h.measure_rows()


def _Q_module(handle: TripletHandle) -> nn.Module:
    module: nn.Module = handle.layer.lora_A[handle.adapter]
    return module


def _set_scale(model: nn.Module, handles: list[TripletHandle], config: AdaLoraConfig, *, shrink: float) -> None:
    """PEFT's α/r of a new adapter; a copy of an attached one starts from the scale it had before."""
    first = handles[0].layer
    before = getattr(first, "triplet_scale", {}).get(handles[0].adapter)
    already = first.scaling[handles[0].adapter] / before if before else 1.0
    rslora = bool(first.use_rslora.get(handles[0].adapter))
    factor = 1.0
    if config.scale in ("target", "matched"):
        factor = shrink**0.5 if rslora else shrink
    if config.scale == "matched" and config.parametrization == "lora":
        factor /= matched_divisor(shrink)
    if factor != already:
        rescale(model, handles, factor / already)
    if isinstance(config.scale, float | int):
        for h in handles:
            h.layer.scaling[h.adapter] = float(config.scale)
            r = h.lora_rank(h.rank)
            h.layer.lora_alpha[h.adapter] = config.scale * (r**0.5 if rslora else r)
        write_patterns(model, handles)


def matched_divisor(shrink: float) -> int:
    """√(r₀/r) as a whole number, at least 1, by which α/r is divided.

    Adam moves every entry of B and A by the learning rate, so both ‖B·ΔA‖ and ‖ΔB·A‖ grow with √r₀: with s = α/√(r·r₀)
    the adapter trains as a LoRA of rank r does, and no less steadily. Whole, so that α = s·r stays what servers read.
    """
    return max(1, round(math.sqrt(shrink)))


def _start_svd(handle: TripletHandle, config: AdaLoraConfig, *, new: bool, generator: torch.Generator) -> None:
    weights_gr = torch.zeros(handle.groups, handle.rank)
    if config.initialization == "keep":
        add_lambda(handle, torch.ones_like(weights_gr).flatten())
        return
    for P_or, Q_ri, weights_r in zip(handle.P_gor, handle.Q_gri, weights_gr):
        if new:
            P, Q = (_directions(t, config.initialization, generator) for t in (P_or.T, Q_ri))
            P_or.copy_(P.T)
            Q_ri.copy_(Q)
        else:
            U, S, Vh = factored_svd(P_or, Q_ri)
            k = len(S)
            weights_r[:k] = S
            P_or[:, :k], Q_ri[:k] = U.to(P_or.dtype), Vh.to(Q_ri.dtype)
    add_lambda(handle, weights_gr.flatten(), gain=_gain(handle, config) if new else 1.0)


def _directions(like_rd: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """New rows of [r, d]: Gaussian, or orthonormal as far as d allows."""
    r, d = like_rd.shape
    normal = torch.randn(r, d, generator=generator)
    if kind == "gaussian":
        return normal * RELEASED_STD
    normal[: min(r, d)] = torch.linalg.qr(normal[: min(r, d)].T).Q.T
    unit: Tensor = normal / normal.norm(dim=1, keepdim=True)
    return unit


def _gain(handle: TripletHandle, config: AdaLoraConfig) -> float:
    """Factor on α/r.

    "matched": Adam's first step moves every λ by the learning rate, and every entry of LoRA's B, d_out times as many,
    against rows of A of length 1/√3: ‖ΔW‖ is the same where ‖P_i‖·‖Q_i‖·gain = √d_out/√3; so in every group, with
    the outputs that it has.
    """
    if config.scale == "released":
        r = handle.lora_rank(handle.rank)
        return r / (r + RELEASED_EPSILON)
    if config.scale != "matched":
        return 1.0
    P_gor, Q_gri = handle.P_gor.float(), handle.Q_gri.float()
    lengths_gr = P_gor.norm(dim=1) * Q_gri.norm(dim=2)
    return float(LORA_ROW_NORM * P_gor.shape[1] ** 0.5 / lengths_gr.square().mean().sqrt())
