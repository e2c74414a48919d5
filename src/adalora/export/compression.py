"""Re-allocating the rank of an adapter that is already trained, by energy or by measured sensitivity."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adalora.errors import AdapterFileError
from adalora.export.adapter import Adapter, Factor
from adalora.export.cleanup import Truncation, clean, truncate
from adalora.export.exporting import ExportReport, check_request, load_source, write_export
from adalora.export.formats import to_tensors
from adalora.export.merged import load_model, merge, quiet

Loss = Callable[[nn.Module, Any], Tensor]
Score = Callable[[nn.Module], float]


@dataclass(frozen=True)
class CompressionReport:
    """What a compression did.

    Attributes:
        truncation: The smaller adapter, errors by module, kept energy.
        export: What was written.
        criterion: `energy` or `sensitivity`.
        ranks_before: Rank of each module in the source.
        score_before: Score of the base model with the source, where data were given.
        score_after: The same with the compressed adapter.
        score_name: What the score is.
    """

    truncation: Truncation
    export: ExportReport
    criterion: str
    ranks_before: Mapping[str, int]
    score_before: float | None
    score_after: float | None
    score_name: str


class _Triplets(nn.Module):
    """A frozen module plus its triplets, whose λ record the gradient: out + ((x Qᵀ) · λ) Pᵀ."""

    def __init__(self, inner: nn.Module, factor: Factor, device: torch.device) -> None:
        super().__init__()
        self.inner, self.kind = inner, factor.kind
        self.left, self.right = factor.left.float().to(device), factor.right.float().to(device)
        self.values = nn.Parameter(factor.values.float().to(device, copy=True))

    def forward(self, x: Tensor) -> Tensor:
        left, right, out = self.left, self.right, self.inner(x)
        if self.kind == "embedding":
            change: Tensor = nn.functional.embedding(x, right.T) * self.values @ left.T
        else:
            change = x.to(right.dtype) @ right.T * self.values @ left.T
        total: Tensor = out + change.to(out.dtype)
        return total


def sensitivities(model: nn.Module, adapter: Adapter, batches: Iterable[Any], loss: Loss) -> dict[str, Tensor]:
    """Mean of (λ_i · ∂loss/∂λ_i)² over batches: how much the loss depends on each triplet.

    It is the empirical Fisher estimate of what cutting λ_i to 0 costs, λ² F / 2 up to the factor.

    Args:
        model: The base model without the adapter; it is used in place and given back as it was.
        adapter: A cleaned adapter.
        batches: What `loss` takes, one after the other.
        loss: loss(model, batch) -> scalar tensor.

    Returns:
        Module name -> [r] float64.

    Raises:
        AdapterFileError: A convolution (no λ there), no batch, or a loss that is not finite.
    """
    layers: dict[str, _Triplets] = {}
    modules = dict(model.named_modules())
    trained = [p for p in model.parameters() if p.requires_grad]
    totals = {name: torch.zeros(f.rank, dtype=torch.float64) for name, f in adapter.factors.items()}
    device = next(model.parameters()).device
    try:
        for p in trained:
            p.requires_grad_(False)
        for name, f in adapter.factors.items():
            if f.rank == 0:
                continue
            if f.kind == "conv":
                raise AdapterFileError(f"{name} is a convolution; --data takes linear and embedding modules")
            layers[name] = _Triplets(modules[name], f, device)
            _set_module(model, name, layers[name])
        count = 0
        for batch in batches:
            value = loss(model, batch)
            if not torch.isfinite(value):
                raise AdapterFileError(f"the loss of batch {count} is {float(value.detach())}")
            grads = torch.autograd.grad(value, [x.values for x in layers.values()], allow_unused=True)
            for (name, layer), grad in zip(layers.items(), grads, strict=True):
                if grad is not None:
                    totals[name] += (grad * layer.values.detach()).double().cpu() ** 2
            count += 1
        if count == 0:
            raise AdapterFileError("no batch of data")
    finally:
        for name in layers:
            _set_module(model, name, modules[name])
        for p in trained:
            p.requires_grad_(True)
    return {name: total / count for name, total in totals.items()}


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def with_extras(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Load an adapter's trained head into the base model; its LoRA matrices stay out."""
    loaded: nn.Module = merge(model, adapter.replace({}))
    return loaded


def compress_adapter(
    source: str | os.PathLike[str] | Adapter,
    out: str | os.PathLike[str],
    *,
    budget: float = 0.5,
    format: str = "ragged",
    base: str | None = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    score: Score | None = None,
    score_name: str = "loss",
    model: nn.Module | None = None,
    alpha: float | None = None,
    overwrite: bool = False,
    **export_options: Any,
) -> CompressionReport:
    """Re-allocate an adapter's rank across its matrices to a share of its parameters.

    Without data, triplets are ranked by their energy σ² per parameter; with `batches` and `loss`, by how
    much the loss depends on them.

    Args:
        source: Any adapter that `export_adapter` takes.
        out: Folder to make.
        budget: Share of the LoRA parameters to keep (up to 1), or a number of parameters.
        format: Layout to write.
        base: Base model folder or hub name; needed with data unless `model` is given.
        batches: Data, iterated once for the sensitivities and once for each score.
        loss: loss(model, batch) -> scalar tensor.
        score: score(model) -> number, for the report; the mean of `loss` by default.
        score_name: Name of the score.
        model: The base model, already loaded.
        alpha: lora_alpha of a loralib state dict.
        overwrite: Replace an earlier export.
        **export_options: `dtype`, `rank_multiple`, `scores` and `mlx` of `export_adapter`.

    Raises:
        AdapterFileError: Wrong input, or `out` exists; nothing is written then.
    """
    check_request(out, format=format, overwrite=overwrite)
    adapter = load_source(source, alpha=alpha)
    if batches is None:
        cut = truncate(adapter, budget=budget)
        before = after = None
    else:
        if loss is None:
            raise AdapterFileError("data need a loss: loss(model, batch) -> scalar")
        batches = list(batches)
        ground = model if model is not None else load_model(_base(adapter, base), adapter)
        cleaned = clean(adapter)
        ground = with_extras(ground.eval(), adapter)
        cut = truncate(adapter, budget=budget, scores=sensitivities(ground, cleaned, batches, loss))
        measure = score or _mean_loss(batches, loss)
        before, after = (score_with(ground, a, measure) for a in (cleaned, cut.adapter))
    report = write_export(cut, adapter, out, format=format, base=base, overwrite=overwrite, **export_options)
    criterion = "energy" if batches is None else "sensitivity"
    return CompressionReport(cut, report, criterion, adapter.ranks, before, after, score_name)


def _base(adapter: Adapter, base: str | None) -> str:
    model = base or adapter.base_model
    if model is None:
        raise AdapterFileError("data need the base model: add --base MODEL")
    return model


def _mean_loss(batches: Iterable[Any], loss: Loss) -> Score:
    def mean(model: nn.Module) -> float:
        with torch.no_grad():
            values = [float(loss(model, batch)) for batch in batches]
        return sum(values) / len(values)

    return mean


def score_with(model: nn.Module, adapter: Adapter, score: Callable[[nn.Module], Any]) -> Any:
    """The score of the base model with an adapter, which is taken out again afterwards."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    live = {name: f for name, f in adapter.factors.items() if f.rank}
    if not live:
        return score(model)
    rank = max(f.rank for f in live.values())
    tensors: dict[str, Tensor] = {}
    for f in live.values():
        tensors.update(to_tensors(f, rank=rank, scale=1.0, dtype=torch.float32))
    with quiet():
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(live))
        wrapped = get_peft_model(model, config)
        set_peft_model_state_dict(wrapped, tensors)
        wrapped.eval()
    try:
        return score(wrapped.get_base_model())
    finally:
        wrapped.unload()
