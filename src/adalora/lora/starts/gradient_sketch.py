"""Starts triplets along the loss's gradient: its leading singular directions, from a few batches."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from adalora.core.sketch import MatrixSketch
from adalora.errors import AttachError, ConfigError
from adalora.lora.layers.triplets import TripletHandle, adapter_name, find_triplets, fresh

Loss = Callable[[nn.Module, Any], Tensor]


class GradientSketch:
    """Leading singular directions of ∂L/∂W of every adapted linear layer, from a few batches.

    A layer's weight gradient is Σ δᵀx over the tokens of the batches. Hooks catch x in the forward pass and δ in the
    backward pass and feed both to a streaming sketch, so a full weight gradient is never formed: memory is
    O((d_in + d_out)·k) a layer. Neither weights, gradients nor the model's mode are changed.

    ```python
    sketch = adalora.GradientSketch(model, itertools.islice(loader, 8))
    sketch.initialize()
    adalora.attach(model, target_rank=8, total_steps=3000)
    ```

    Attributes:
        batches: Batches seen.
        spectra: Singular values of the gradient by full module name, [r] each, falling; r is the adapter's rank.

    Args:
        model: From `peft.get_peft_model`, with a fresh adapter. Linear layers and GPT-2's Conv1D are sketched; others
            keep their start.
        batches: A few training batches, on the model's device.
        loss: Loss of a batch, e.g. `lambda model, batch: criterion(model(batch[0]), batch[1])`; by default
            `model(**batch).loss`.
        adapter: The active one by default.
        oversampling: Directions looked at beyond each layer's rank.
        seed: Of the random test matrices.

    Raises:
        AttachError: No layer can be sketched, or the adapter is trained already.
        ConfigError: There is no batch, or a batch gave no finite gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        loss: Loss | None = None,
        adapter: str | None = None,
        oversampling: int = 8,
        seed: int = 0,
    ) -> None:
        name = adapter_name(model, adapter)
        handles = find_triplets(model, name)
        if not fresh(handles):
            raise AttachError(f"adapter {name!r} is trained already: its directions would be lost")
        self._handles = {h.name: h for h in handles if _is_linear(h)}
        if not self._handles:
            raise AttachError(f"adapter {name!r} has no linear layer whose gradient could be sketched")
        self._sketches = {h.name: _sketch(h, oversampling=oversampling, seed=seed) for h in self._handles.values()}
        self.batches = 0
        with _left_as_found(model), self._watching():
            for batch in batches:
                torch.autograd.backward((loss or _own_loss)(model, batch))
                self.batches += 1
        if self.batches == 0:
            raise ConfigError("batches is empty: a sketch needs at least one training batch, better about eight")
        broken = [key for key, s in self._sketches.items() if not s.is_finite]
        if broken:
            raise ConfigError(f"{broken[0]}: the batches' gradient is not finite; no weight was changed")
        self._directions = {key: s.svd() for key, s in self._sketches.items()}
        self.spectra = {key: values for key, (_, values, _) in self._directions.items()}

    @torch.no_grad()
    def initialize(self) -> None:
        """Turn the rows of Q (LoRA's A) to the gradient's leading right singular vectors, at the length they had.

        P (LoRA's B) stays 0, so the model computes what it did before; its first gradient is the largest that r rows of
        this length can give. Directions without a gradient keep LoRA's random start.
        """
        for key, h in self._handles.items():
            _, values, Vh = self._directions[key]
            used = int((values > values[:1] * torch.finfo(torch.float32).eps).sum()) if len(values) else 0
            h.Q_ri[:used] = (Vh[:used] * h.row_norm).to(h.Q_ri)

    def rank_pattern(self, total_rank: int) -> dict[str, int]:
        """Initial ranks for a `LoraConfig(rank_pattern=…)`: the strongest directions of the whole model.

        Directions are ranked by σ², what a step along them takes off the loss to first order. Every module keeps at
        least one triplet, LoRA has no rank 0; the others can have at most the rank that was sketched.

        Args:
            total_rank: Triplets in the sketched modules together.

        Raises:
            ConfigError: Fewer than one triplet a module, or more than were sketched.
        """
        names, sizes = list(self.spectra), [len(values) for values in self.spectra.values()]
        if not len(names) <= total_rank <= sum(sizes):
            raise ConfigError(
                f"total_rank={total_rank} must be from {len(names)}, one a module, to {sum(sizes)}, the directions "
                "sketched; sketch a LoRA of higher r for more"
            )
        strength = torch.cat([values.square() for values in self.spectra.values()])
        owner = torch.tensor([n for n, size in enumerate(sizes) for _ in range(size)])
        first = torch.cat([torch.arange(size) == 0 for size in sizes])
        order = torch.where(first, torch.inf, strength).argsort(descending=True, stable=True)[:total_rank]
        counts = torch.bincount(owner[order], minlength=len(names)).tolist()
        return dict(zip(names, counts))

    @contextmanager
    def _watching(self) -> Iterator[None]:
        hooks = [h.layer.register_forward_hook(self._hook(key)) for key, h in self._handles.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, key: str) -> Callable[[nn.Module, Any, Tensor], None]:
        sketch = self._sketches[key]

        def watch(layer: nn.Module, args: Any, output: Tensor) -> None:
            inputs = args[0].detach()

            def add(gradient: Tensor) -> None:
                sketch.add(inputs.flatten(0, -2), gradient.flatten(0, -2))

            if output.requires_grad:
                cast(Any, output).register_hook(add)

        return watch


def _is_linear(handle: TripletHandle) -> bool:
    return not handle.is_embedding and isinstance(handle.layer.lora_A[handle.adapter], nn.Linear)


def _sketch(handle: TripletHandle, *, oversampling: int, seed: int) -> MatrixSketch:
    return MatrixSketch(
        handle.d_out,
        handle.d_in,
        rank=handle.rank,
        oversampling=oversampling,
        seed=seed + zlib.crc32(handle.name.encode()),
        device=handle.Q_parameter.device,
    )


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor | None = model(**batch).loss if isinstance(batch, Mapping) else None
    if loss is None:
        raise ConfigError(
            f"a batch of {type(batch).__name__} gives no loss by itself: pass loss=lambda model, batch: …, or batches "
            "with labels"
        )
    return loss


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout in the directions), and afterwards the mode and the gradients of before."""
    training = {module: module.training for module in model.modules()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    for parameter in gradients:
        parameter.grad = None
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
