"""Keeps the pace of a LoRA of the target rank while triplets go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from adalora.lora.layers.triplets import TripletHandle
from adalora.lora.optimizers.state import weight_copies


class Pace:
    """Makes the optimizer's steps of P longer by what is gone of the triplets.

    Adam moves every entry of P by the learning rate, so a layer's output moves by lr·s·Σ|Q_i·x| a step: with s = α/r,
    as LoRA has it, alike at every rank. Triplets that go take their part of it with them: at s = α/r₀ what is left
    would train r₀/r times slower than a LoRA of rank r. That LoRA has the scale α/r and a P that is r₀/r times shorter:
    a step of the same length moves its ΔW r₀/r times as far by P, and as far by Q. Steps of P that are r₀/r times as
    long do the same, and change nothing but weights: what is saved, captured or compiled at any time stays right.
    """

    def __init__(self, handles: Sequence[TripletHandle]) -> None:
        self.handles = handles
        self._triplets = sum(h.rank for h in handles)
        self._rslora = bool(handles[0].layer.use_rslora.get(handles[0].adapter))
        self._times = 1.0
        self._moving: list[Tensor] = []
        self._before: list[Tensor] = []

    @property
    def factor(self) -> float:
        """Triplets at the start over those that are live; its root where s = α/√r (rsLoRA)."""
        live = sum(h.live_rank for h in self.handles)
        ratio = self._triplets / live if live else 1.0
        return ratio**0.5 if self._rslora else ratio

    @torch.no_grad()
    def before(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step: note where P is. For the time of the step, when activations are gone."""
        self._moving = self._before = []
        self._times = self.factor
        if self._times != 1:
            parameters = [h.P_parameter for h in self.handles if not h.removed]
            copies = []
            if parameters and weight_copies(optimizer, parameters[0]):  # few optimizers keep any
                copies = [copy for parameter in parameters for copy in weight_copies(optimizer, parameter)]
            self._moving = [_local(values) for values in (*parameters, *copies)]
            self._before = list(torch._foreach_mul(self._moving, 1.0))

    @torch.no_grad()
    def after(self) -> None:
        """It has stepped: go on in the same direction. Where nothing has moved, nothing does."""
        if self._before:
            torch._foreach_lerp_(self._moving, self._before, 1 - self._times)
        self._moving = self._before = []


def _local(parameter: Tensor) -> Tensor:
    """The values, of a sharded parameter those of this process."""
    values = parameter.detach()
    return values.to_local() if isinstance(values, DTensor) else values
