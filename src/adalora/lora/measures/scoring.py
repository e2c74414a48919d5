"""Triplet scores of a whole model: reads weights and gradients, keeps the averages."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from adalora.config import AdaLoraConfig
from adalora.core.importance import SmoothedImportance, step_weights
from adalora.lora.layers.triplets import TripletHandle
from adalora.lora.measures.averages import LeftAverages, RightAverages, all_finite


class Scorer:
    """Averages and scores for all layers of one adapter, stacked by shape.

    The averages are built at the first `observe` and dropped by `reset`. Ī and Ū of every entry take twice the
    adapter's size in fp32. A score of Ī alone needs one number a triplet: its mean over entries and its average over
    steps may change places.
    """

    def __init__(self, handles: Sequence[TripletHandle], config: AdaLoraConfig) -> None:
        self.handles = list(handles)
        self.config = config
        self._skipped: list[int | Tensor] = []
        self.observed = 0
        self._means = not config.needs_uncertainty
        self._left: dict[tuple[int, ...], LeftAverages] = {}
        self._right: dict[tuple[int, ...], RightAverages] = {}
        self._random = torch.Generator().manual_seed(config.seed)

    @property
    def needs_averages(self) -> bool:
        """Whether the score is built on gradients; magnitudes are not."""
        return self.config.needs_gradients

    @property
    def skipped(self) -> int:
        """Steps left out of the averages, for a gradient that was not finite or none at all; waits for the device."""
        total = sum(int(steps) for steps in self._skipped)
        self._skipped = [total]
        return total

    @skipped.setter
    def skipped(self, steps: int) -> None:
        self._skipped = [steps]

    def _skip(self, step: int | Tensor) -> None:
        """Count 0 or 1 steps, on the device that knows; the host asks only for `skipped`."""
        last = self._skipped[-1] if self._skipped else None
        if isinstance(step, Tensor) and isinstance(last, Tensor) and last.device == step.device:
            last.add_(step)
        else:
            self._skipped.append(step)

    def reset(self) -> None:
        """Forget the averages and free their memory."""
        self._left, self._right = {}, {}

    def skip(self) -> None:
        """Count a step that moved no weight."""
        self.observed += 1
        self._skip(1)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages of every layer, by module name, and the state of the random scores."""
        state = {"random": self._random.get_state()}
        for name, average, row in self._rows():
            state[f"{name}.sensitivity"] = average.sensitivity[row].clone()
            state[f"{name}.uncertainty"] = average.uncertainty[row].clone()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave, for layers of the same ranks; missing averages start anew."""
        self.reset()
        self._random.set_state(state["random"].cpu())
        if len(state) == 1:
            return
        self._build()
        for name, average, row in self._rows():
            average.sensitivity[row].copy_(state[f"{name}.sensitivity"])
            average.uncertainty[row].copy_(state[f"{name}.uncertainty"])

    def cut(self) -> dict[str, Tensor]:
        """`state_dict` without the masked triplets: for after they are removed."""
        masks = {h.name: h.mask for h in self.handles}
        state = {"random": self._random.get_state()}
        for name, value in self.state_dict().items():
            if name == "random":
                continue
            module, factor, _ = name.rsplit(".", 2)
            index = masks[module].nonzero().squeeze(1).to(value.device, non_blocking=True)
            if len(index):
                state[name] = value.index_select(value.dim() - 1 if factor == "P" else 0, index)
        return state

    def _rows(self) -> Iterator[tuple[str, SmoothedImportance, int]]:
        """Every layer's averages: module name with "P", "lambda" or "Q", the stack and the row in it."""
        for left in self._left.values():
            for row, number in enumerate(left.members):
                yield f"{self.handles[number].name}.P", left.factors, row
                yield f"{self.handles[number].name}.lambda", left.weights, row
        for right in self._right.values():
            for row, number in enumerate(right.members):
                yield f"{self.handles[number].name}.Q", right.factors, row

    @torch.no_grad()
    def observe(self, *, loss_scale: float = 1.0) -> None:
        """Take one optimizer step's weights and gradients into the averages.

        A step with infinite or NaN gradients, or with none at all, is left out and counted.

        Args:
            loss_scale: What the gradients are multiplied with: a GradScaler's scale where the optimizer unscales them
                itself.
        """
        if not self.needs_averages:
            return
        self.observed += 1
        if not self._left:
            self._build()
        stacks = [*self._left.values(), *self._right.values()]
        gradients = [gradient for gradient in (stack.look() for stack in stacks) if gradient is not None]
        gradients += self._of_lambda()
        if not gradients:
            self._skip(1)
            return
        finite = all_finite(gradients)
        self._skip((~finite).int())
        betas = {"beta1": self.config.sensitivity_beta, "beta2": self.config.uncertainty_beta}
        devices = {gradient.device for gradient in gradients}
        weights = {device: step_weights(finite.to(device, non_blocking=True), **betas) for device in devices}
        for stack in stacks:
            stack.observe(weights=weights, unscale=1 / loss_scale, **betas)

    def _of_lambda(self) -> list[Tensor]:
        """Gradients of λ where it is a parameter."""
        if self.config.parametrization != "svd":
            return []
        found = [h.lambda_parameter for h in self.handles if not h.removed]
        return [p.grad for p in found if p is not None and p.grad is not None and p.numel()]

    def scores(self) -> Tensor:
        """S for every triplet of every layer, layer after layer, [n], on the CPU."""
        kind = self.config.importance
        if kind == "random":
            return torch.rand(sum(h.rank for h in self.handles), generator=self._random)
        if not self.needs_averages:
            measure = _absolute_lambda if kind == "lambda_magnitude" else _magnitude
            return torch.cat([measure(h).cpu() for h in self.handles if h.rank] or [torch.empty(0)])
        if not self._left:
            self._build()
        scores = torch.zeros(sum(h.rank for h in self.handles))
        elementwise = self.config.registered_importance() or ("sensitivity" if kind == "lambda_sensitivity" else kind)
        for left in self._left.values():
            score_kr = left.weights.score(elementwise)
            if kind != "lambda_sensitivity":
                score_kr += left.factor_scores(elementwise)
            scores.index_add_(0, self._positions(left.members), score_kr.flatten().cpu())
        if kind != "lambda_sensitivity":
            for right in self._right.values():
                score_kr = right.factor_scores(elementwise)
                scores.index_add_(0, self._positions(right.members), score_kr.flatten().cpu())
        return scores

    def _positions(self, members: list[int]) -> Tensor:
        """Where the triplets of some layers stand among all, [k · r], int64."""
        starts = list(itertools.accumulate((h.rank for h in self.handles), initial=0))
        rank = self.handles[members[0]].rank
        return (torch.tensor(starts)[members].unsqueeze(1) + torch.arange(rank)).flatten()

    def _build(self) -> None:
        for number, h in enumerate(self.handles):
            if h.rank == 0:
                continue
            key = (*h.P_or.shape, h.P_or.device.index or 0)
            self._left.setdefault(key, LeftAverages(means=self._means)).members.append(number)
            key = (*h.Q_ri.shape, h.Q_ri.device.index or 0)
            self._right.setdefault(key, RightAverages(means=self._means)).members.append(number)
        for left in self._left.values():
            left.start([self.handles[n] for n in left.members])
        for right in self._right.values():
            right.start([self.handles[n] for n in right.members])


def _magnitude(h: TripletHandle) -> Tensor:
    """|λ_i|·‖P_i‖·‖Q_i‖·s: the singular value where P and Q are orthogonal, [r]; over several groups the norm."""
    lengths = h.by_group(h.left_or).float().norm(dim=1) * h.Q_gri.float().norm(dim=2)
    return _over_groups(lengths).mul_(h.scale)


def _absolute_lambda(h: TripletHandle) -> Tensor:
    """|λ_i|, [r]; over several groups the norm."""
    weights = h.lambda_gr
    assert weights is not None  # the config allows it with a λ of its own alone
    return _over_groups(weights.float().abs())


def _over_groups(lengths_gr: Tensor) -> Tensor:
    return lengths_gr[0] if len(lengths_gr) == 1 else lengths_gr.norm(dim=0)
