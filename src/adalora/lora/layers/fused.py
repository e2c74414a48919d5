"""LoRA's part of a Linear layer as one autograd function: fewest products, fewest tensors kept.

With a λ of its own it is folded into the activation of size r. Shape suffixes: n rows of the flattened input, i = d_in,
o = d_out, r triplets. Activations of size r are kept as
[r, n]: thin products run several times faster on a CPU when the thin side comes first.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

Gradients = tuple[Tensor | None, ...]


def fused_lora(
    x: Tensor,
    base: Tensor | None,
    Q_ri: Tensor,
    P_or: Tensor,
    *,
    scale: float,
    lambda_r: Tensor | None = None,
    dropout: float = 0.0,
    weight_oi: Tensor | None = None,
    bias_o: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """Base + scale · dropout(x) Qᵀ diag(λ) Pᵀ, keeping only x, the dropout's mask as bytes and the product of size r.

    Gradients of any order. Products are made in the type of x, and what is of another type is cast to it, as autocast
    would, but out of autograd's sight; the caller casts x.

    Args:
        x: Input, [..., d_in].
        base: Output of the layer without LoRA, [..., d_out], of the type of x or a narrower one. None: x Wᵀ + bias is
            made here, where autograd need not note it.
        Q_ri: `lora_A`'s weight, [r, d_in].
        P_or: `lora_B`'s weight, [d_out, r].
        scale: s.
        lambda_r: λ, [r]; None for 1.
        dropout: Probability of a zero, 0 <= dropout < 1. A seed gives the same zeros as `torch.nn.Dropout`.
        weight_oi: The base weight W, [d_out, d_in], where `base` is x Wᵀ + bias and nothing in it is trained: the
            gradient of x is then made in one sum, and autograd leaves the base layer out.
        bias_o: The base layer's bias, [d_out]; read only without `base`.
        in_place: The sum may overwrite `base`.

    Returns:
        [..., d_out], of the type of x.
    """
    if weight_oi is not None and base is not None:
        base = base.detach()
    return cast(Tensor, _apply(x, base, Q_ri, P_or, lambda_r, weight_oi, bias_o, scale, dropout, in_place))


def _drop(rows_ni: Tensor, dropout: float) -> tuple[Tensor, Tensor, float, float]:
    """Rows with zeros, the mask (uint8), and the factors still to be applied to h and to what comes back."""
    kept = 1 / (1 - dropout)
    if rows_ni.is_cuda:  # pragma: no cover - a GPU's: as nn.Dropout there, one kernel and its own random numbers
        rows_ni, mask_ni = torch.native_dropout(rows_ni, dropout, True)
        return rows_ni, mask_ni.view(torch.uint8), 1.0, kept
    # Bytes draw the same zeros as floats do, and products with them are the faster ones.
    mask_ni = torch.empty(rows_ni.shape, dtype=torch.uint8, device=rows_ni.device).bernoulli_(1 - dropout)
    return rows_ni * mask_ni, mask_ni, kept, 1.0


class _FusedLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor | None,
        Q_ri: Tensor,
        P_or: Tensor,
        lambda_r: Tensor | None,
        weight_oi: Tensor | None,
        bias_o: Tensor | None,
        scale: float,
        dropout: float,
        in_place: bool,
    ) -> Tensor:
        dtype, given = x.dtype, (Q_ri, P_or, lambda_r)
        if weight_oi is not None and weight_oi.dtype != dtype:
            weight_oi = weight_oi.to(dtype)
        if base is None:
            base, in_place = functional.linear(x, cast(Tensor, weight_oi), bias_o), True
        cast_too: tuple[Tensor | None, ...] = ()
        if Q_ri.dtype != dtype or P_or.dtype != dtype or (lambda_r is not None and lambda_r.dtype != dtype):
            Q_ri, P_or = Q_ri.to(dtype), P_or.to(dtype)
            lambda_r = None if lambda_r is None else lambda_r.to(dtype)
            cast_too = (Q_ri, P_or, lambda_r)
        rows_ni, mask_ni, mask_scale = x.reshape(-1, x.shape[-1]), None, 1.0
        if dropout > 0:
            rows_ni, mask_ni, forward_scale, mask_scale = _drop(rows_ni, dropout)
            scale *= forward_scale
        h_rn = torch.mm(Q_ri, rows_ni.t())
        ctx.save_for_backward(x, mask_ni, h_rn, weight_oi, *given, *cast_too)
        ctx.settings = scale, mask_scale, base.dtype
        if lambda_r is not None:
            h_rn = h_rn * lambda_r.unsqueeze(1)
        if base.dtype != dtype:
            base, in_place = base.to(dtype), True
        if not (in_place and base.is_contiguous()):
            rows_no = torch.addmm(base.reshape(-1, base.shape[-1]), h_rn.t(), P_or.t(), alpha=scale)
            return rows_no.view(base.shape).detach()  # the next layer may change it in place: no view of rows_no
        out = base.detach()  # the same memory, and no view either
        out.view(-1, out.shape[-1]).addmm_(h_rn.t(), P_or.t(), alpha=scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        (grad,) = grads
        if torch.is_grad_enabled():
            return _gradients_in_graph(ctx, grad)
        if not under_autocast(grad):
            return _gradients(ctx, grad)
        with torch.autocast(grad.device.type, enabled=False):
            return _gradients(ctx, grad)


# The function's own `apply`, without what `torch.autograd.Function` puts around it for functorch's transforms: under
# those nobody comes here. It is a third of the call.
_apply = cast(Any, super(torch.autograd.Function, _FusedLora)).apply


def under_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device; `meta` knows none."""
    if not torch._C._is_any_autocast_enabled():  # every layer asks: the tensor's device takes longer to read
        return False
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def _gradients(ctx: Any, grad: Tensor) -> Gradients:
    """Of x, base, Q, P and λ; autograd casts them to the type that each has.

    Factors ride on products as `alpha`; with beta=0 `addmm` never reads its first input.
    """
    x, mask, h_rn, weight_oi, *factors = ctx.saved_tensors
    Q_ri, P_or, lambda_r = factors[-3:]  # in the type of x
    scale, mask_scale, base_dtype = ctx.settings
    for_x, for_base, for_Q, for_P, for_lambda = ctx.needs_input_grad[:5]
    grad_no, P_ro = grad.reshape(-1, grad.shape[-1]), P_or.t()
    grad_x = grad_Q = grad_P = grad_lambda = None
    if (for_P or for_lambda) and grad.is_cuda:  # pragma: no cover - a GPU's: it lies as P does, and is not copied
        grad_P = torch.addmm(P_or, grad_no.t(), h_rn.t(), beta=0, alpha=scale)
    elif for_P or for_lambda:
        grad_P = torch.addmm(P_ro, h_rn, grad_no, beta=0, alpha=scale).t()
    if lambda_r is not None and grad_P is not None:
        grad_lambda = (grad_P * P_or).sum(dim=0) if for_lambda else None
        grad_P = grad_P.mul_(lambda_r) if for_P else None
    if for_Q or for_x:
        grad_rn = torch.addmm(h_rn, P_ro, grad_no.t(), beta=0, alpha=scale * mask_scale)
        if lambda_r is not None:
            grad_rn.mul_(lambda_r.unsqueeze(1))
    if for_Q:
        rows_ni = x.reshape(-1, x.shape[-1])
        grad_Q = torch.mm(grad_rn, rows_ni if mask is None else rows_ni * mask)
    if for_x:
        if weight_oi is None:
            grad_x = torch.mm(grad_rn.t(), Q_ri)
            grad_x = grad_x if mask is None else grad_x.mul_(mask)
        elif mask is None:
            grad_x = torch.mm(grad_no, weight_oi).addmm_(grad_rn.t(), Q_ri)
        else:
            grad_x = torch.mm(grad_no, weight_oi).addcmul_(torch.mm(grad_rn.t(), Q_ri), mask)
        grad_x = grad_x.view(x.shape)
    grad_base = grad.to(base_dtype) if for_base else None
    return grad_x, grad_base, grad_Q, grad_P, grad_lambda, None, None, None, None, None


def _gradients_in_graph(ctx: Any, grad: Tensor) -> Gradients:
    """The same for `create_graph=True`: in differentiable operations, from the inputs alone."""
    x, mask_ni, _, weight_oi, *factors = ctx.saved_tensors
    Q_ri, P_or = factors[0].to(x.dtype), factors[1].to(x.dtype)
    lambda_r = None if factors[2] is None else factors[2].to(x.dtype)
    scale, mask_scale, base_dtype = ctx.settings
    grad_no = grad.reshape(-1, grad.shape[-1])
    rows_ni = x.reshape(-1, x.shape[-1])
    mask = None if mask_ni is None else mask_ni.to(x.dtype) * mask_scale
    rows_ni = rows_ni if mask is None else rows_ni * mask
    grad_left = scale * (Q_ri.mm(rows_ni.t()).mm(grad_no)).t()  # of P·diag(λ)
    left_or = P_or if lambda_r is None else P_or * lambda_r
    grad_P = grad_left if lambda_r is None else grad_left * lambda_r
    grad_lambda = (grad_left * P_or).sum(dim=0)
    grad_rn = scale * left_or.t().mm(grad_no.t())
    grad_x = grad_rn.t().mm(Q_ri)
    grad_x = grad_x if mask is None else grad_x * mask
    if weight_oi is not None:
        grad_x = grad_x + grad_no.mm(weight_oi)
    wanted = (grad_x.view(x.shape), grad.to(base_dtype), grad_rn.mm(rows_ni), grad_P, grad_lambda)
    return (*(g if needed else None for g, needed in zip(wanted, ctx.needs_input_grad)), None, None, None, None, None)
