"""What each means of the fast path brings, alone: `python -m benchmarks.means`.

One Linear of 384 × 384, rank 8, 1024 tokens, forward and backward; variants in turn, medians and quartiles in µs.
Writes `results/means.json`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
import typer
from benchmarks.measuring import quartiles
from benchmarks.models import MINILM, training
from benchmarks.overhead import RESULTS, _leaves, _machine, _print
from torch import Tensor
from torch.nn import functional

from adalora.lora.fused import fused_lora
from adalora.lora.orthogonal import hand_over

ROWS, WIDTH, RANK, SCALE = 1024, 384, 8, 2.0


def _timed(variants: dict[str, Callable[[], Any]], *, turns: int = 60) -> dict[str, dict[str, float]]:
    """Microseconds of each variant, one call of each in turn."""
    seen: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(turns):
        for name, action in variants.items():
            start = time.perf_counter()
            action()
            if turn >= 5:
                seen[name].append(1e6 * (time.perf_counter() - start))
    return {name: quartiles(values) for name, values in seen.items()}


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

    return _timed(
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
        "h": _timed({"x Qᵀ": lambda: x.mm(Q.T), "Q xᵀ": lambda: Q.mm(x.T)}),
        "gradient of h": _timed({"g P": lambda: g.mm(P), "Pᵀ gᵀ": lambda: P.T.mm(g.T)}),
        "gradient of P": _timed({"gᵀ h": lambda: g.T.mm(h), "hᵀ g": lambda: h_t.mm(g)}),
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

    return _timed({"floats": floats, "bytes": in_bytes})


def handover() -> dict[str, Any]:
    """The 36 modules of MiniLM's shape at the end of warm-up: one after the other, and a shape at a time."""
    run = training("ours", MINILM, steps=1000)
    for h in run.controller.handles:
        h.P_or.normal_(std=0.01)
    alone = lambda: [hand_over([h], run.optimizer) for h in run.controller.handles]  # noqa: E731
    together = lambda: hand_over(run.controller.handles, run.optimizer)  # noqa: E731
    return _timed({"one by one": alone, "together": together}, turns=20)


def shared_input() -> dict[str, Any]:
    """Three adapters that read one input: their products of size r one by one, and as one of three times the size."""
    x, out = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    Q, Q3 = torch.randn(RANK, WIDTH), torch.randn(3 * RANK, WIDTH)
    g, g3 = torch.randn(RANK, ROWS), torch.randn(3 * RANK, ROWS)

    def one_by_one() -> None:
        for _ in range(3):
            Q.mm(x.T)
            g.mm(x)
            out.addmm_(g.T, Q, alpha=1e-9)

    def together() -> None:
        torch.cat([Q, Q, Q])
        Q3.mm(x.T)
        g3.mm(x)
        out.addmm_(g3.T, Q3, alpha=1e-9)

    return _timed({"one by one": one_by_one, "together": together})


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
    }
    for name, result in results.items():
        _print(name, {" / ".join(keys[:-1]): value for keys, value in _leaves(result) if keys[-1] == "median"})
    (RESULTS / "means.json").write_text(
        json.dumps({**results, "measured": _machine()}, indent=1, ensure_ascii=False) + "\n"
    )


if __name__ == "__main__":
    typer.run(main)
