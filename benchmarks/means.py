"""What each means of the fast path brings, alone: `python -m benchmarks.means`.

One Linear of 384 × 384, rank 8, 1024 tokens, forward and backward; variants in turn, medians and quartiles in µs.
Writes `results/means.json`.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import typer
from torch import Tensor
from torch.nn import functional

from adalora.lora.layers.fused import fused_lora
from benchmarks.overhead import RESULTS, _leaves, _machine, _print
from benchmarks.stepwise import averages, finding, handover, memory, orthogonality, skipped_layers, timed

ROWS, WIDTH, RANK, SCALE = 1024, 384, 8, 2.0


def forward_and_backward(dropout: float) -> dict[str, Any]:
    """From PEFT's own sum to the fused function, one means after the other."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    W, bias = torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)
    Q, P = torch.randn(RANK, WIDTH, requires_grad=True), torch.randn(WIDTH, RANK, requires_grad=True)
    upstream = torch.randn(ROWS, WIDTH)

    def base() -> Tensor:
        return functional.linear(x, W, bias)

    def run(out: Tensor) -> None:
        torch.autograd.grad(out, (x, Q, P), upstream, allow_unused=True)

    def peft() -> Tensor:
        return base() + functional.linear(functional.linear(functional.dropout(x, dropout), Q), P) * SCALE

    def addmm() -> Tensor:
        return torch.addmm(base(), functional.linear(functional.dropout(x, dropout), Q) * SCALE, P.t())

    def fused(**options: Any) -> Tensor:
        return fused_lora(x, base(), Q, P, scale=SCALE, dropout=dropout, **options)

    return timed(
        {
            "no adapter": lambda: run(base()),
            "PEFT LoRA": lambda: run(peft()),
            "addmm into the base output, scale on the small product": lambda: run(addmm()),
            "one autograd function, thin products": lambda: run(fused()),
            "… adding in place": lambda: run(fused(in_place=True)),
            "… with the base layer's backward": lambda: run(fused(in_place=True, weight_oi=W)),
        }
    )


def products() -> dict[str, Any]:
    """Each thin product as autograd makes it, and with the thin side first."""
    x, g = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    Q, P = torch.randn(RANK, WIDTH), torch.randn(WIDTH, RANK)
    h = x @ Q.T
    h_t = h.T.contiguous()
    return {
        "h": timed({"x Qᵀ": lambda: x.mm(Q.T), "Q xᵀ": lambda: Q.mm(x.T)}),
        "gradient of h": timed({"g P": lambda: g.mm(P), "Pᵀ gᵀ": lambda: P.T.mm(g.T)}),
        "gradient of P": timed({"gᵀ h": lambda: g.T.mm(h), "hᵀ g": lambda: h_t.mm(g)}),
    }


def dropout_mask() -> dict[str, Any]:
    """What follows the drawing of a mask, forward and backward: as floats kept in a byte each, and as bytes."""
    x, out, grown = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    noise = torch.empty(ROWS, WIDTH).bernoulli_(0.9)
    mask = noise.to(torch.uint8)

    def floats() -> None:
        kept = (x * noise, noise.to(torch.bool))[1]
        again = kept.view(torch.uint8).to(torch.float32)
        x * again
        out.addcmul_(grown, again, value=1e-9)

    def in_bytes() -> None:
        x * mask
        x * mask
        out.addcmul_(grown, mask, value=1e-9)

    return timed({"floats": floats, "bytes": in_bytes})


def shared_input() -> dict[str, Any]:
    """Adapters that read one input: their products of size r one by one and as one, and all that the layers take."""
    return {"q, k, v": _shared(3, WIDTH), "gate, up": _shared(2, 4 * WIDTH)}


def _shared(layers: int, width: int) -> dict[str, Any]:
    torch.manual_seed(0)
    x, out = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    Q, Q_all = torch.randn(RANK, WIDTH), torch.randn(layers * RANK, WIDTH)
    g, g_all = torch.randn(RANK, ROWS), torch.randn(layers * RANK, ROWS)
    W, bias, upstream = torch.randn(width, WIDTH), torch.randn(width), torch.randn(ROWS, width)
    leaves = [x.clone().requires_grad_(), Q.clone().requires_grad_(), torch.randn(width, RANK, requires_grad=True)]

    def one_by_one() -> None:
        for _ in range(layers):
            Q.mm(x.T)
            g.mm(x)
            out.addmm_(g.T, Q, alpha=1e-9)

    def together() -> None:
        torch.cat([Q] * layers)
        Q_all.mm(x.T)
        g_all.mm(x)
        out.addmm_(g_all.T, Q_all, alpha=1e-9)

    def whole() -> None:
        for _ in range(layers):
            base = functional.linear(leaves[0], W, bias)
            made = fused_lora(leaves[0], base, leaves[1], leaves[2], scale=SCALE, weight_oi=W, in_place=True)
            torch.autograd.grad(made, leaves, upstream)

    found: dict[str, Any] = dict(
        timed({"one by one": one_by_one, "together": together, "the layers, forward and backward": whole})
    )
    saved = found["one by one"]["median"] - found["together"]["median"]
    found["saved share"] = {"median": saved / found["the layers, forward and backward"]["median"]}
    return found


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    results = {
        "layer": forward_and_backward(0.0),
        "layer, dropout 0.1": forward_and_backward(0.1),
        "products": products(),
        "shared input": shared_input(),
        "dropout mask": dropout_mask(),
        "hand-over": handover(),
        "averages": averages(),
        "orthogonality": orthogonality(),
        "finding the parameters": finding(),
        "skipped layers": skipped_layers(),
        "memory": memory(),
    }
    for name, result in results.items():
        _print(name, {" / ".join(keys[:-1]): value for keys, value in _leaves(result) if keys[-1] == "median"})
    (RESULTS / "means.json").write_text(
        json.dumps({**results, "measured": _machine()}, indent=1, ensure_ascii=False) + "\n"
    )


if __name__ == "__main__":
    typer.run(main)
