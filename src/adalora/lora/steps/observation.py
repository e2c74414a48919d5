"""What happens to weights and gradients around every optimizer step: scores see them, orthogonality acts on them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from adalora.config import AdaLoraConfig
from adalora.errors import AdaLoraWarning
from adalora.lora.layers.triplets import TripletHandle
from adalora.lora.measures.scoring import Scorer
from adalora.lora.optimizers.seen import loss_scale
from adalora.lora.orthogonality.orthogonal import Groups, decoupled_step
from adalora.lora.orthogonality.regularization import coupled_gradients, decoupled_svd_step

SKIPPED_SHARE = 0.1  # of all steps with a score: above it, and from `SKIPPED_STEPS` on, skipped steps are worth a word
SKIPPED_STEPS = 5


class Observation:
    """Feeds a scorer and applies the orthogonality term, in the order that the config asks for."""

    def __init__(self, handles: Sequence[TripletHandle], config: AdaLoraConfig, scorer: Scorer) -> None:
        self.handles = handles
        self.config = config
        self.scorer = scorer
        self._groups = Groups(handles)
        self._added: list[tuple[nn.Parameter, Tensor]] = []
        self._warned = False

    @property
    def _live(self) -> list[TripletHandle]:
        return [h for h in self.handles if not h.removed]

    @property
    def _couples(self) -> bool:
        return self.config.orthogonality in ("squared", "released") and bool(self.config.orthogonality_weight)

    def acts_before(self, *, observe: bool) -> bool:
        """Whether `before` has anything to do."""
        return self._couples or (observe and self.config.score_weights == "before")

    def before(self, optimizer: Optimizer, *, observe: bool) -> None:
        """The gradients are there and the weights have not moved."""
        config, scale = self.config, loss_scale(optimizer)
        observe = observe and config.score_weights == "before"
        if observe and config.score_gradient == "task":
            self.scorer.observe(loss_scale=scale)
        if self._couples:
            self._add_term(optimizer, scale=scale)
        if observe and config.score_gradient == "total":
            self.scorer.observe(loss_scale=scale)

    def _add_term(self, optimizer: Optimizer, *, scale: float) -> None:
        weight = self.config.orthogonality_weight * scale
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        # A closure may run several times in a step, and a step may have failed: only the last gradients count.
        self._added = [(p, term) for p, term in self._added if id(p) not in trained]
        for parameter, term in coupled_gradients(self._live, kind=self.config.orthogonality, weight=weight):
            if id(parameter) in trained and parameter.requires_grad:
                parameter.grad = term.clone() if parameter.grad is None else parameter.grad.add_(term)
                self._added.append((parameter, term))

    def after(self, optimizer: Optimizer, *, observe: bool, fixed: bool = False) -> None:
        """The weights have moved; `fixed`: and the ranks will not change any more."""
        if observe and self.config.score_weights == "after":
            if self.config.score_gradient == "task":
                scale = loss_scale(optimizer)
                for parameter, term in self._added:
                    if parameter.grad is not None:
                        parameter.grad.sub_(term, alpha=1 / scale)
            self.scorer.observe()  # torch's fused optimizers leave the gradients unscaled behind
        self._added.clear()
        svd = self.config.parametrization == "svd"
        acts = svd or not fixed  # then no triplet is compared with another any more, and a turn changes P·Q
        if acts and self.config.orthogonality == "decoupled" and self.config.orthogonality_weight:
            rate = optimizer.param_groups[0]["lr"]  # a number, or a tensor: that one is not asked
            if svd:
                decoupled_svd_step(self._live, weight=self.config.orthogonality_weight, learning_rate=rate)
            else:
                decoupled_step(self._groups, weight=self.config.orthogonality_weight, learning_rate=rate)

    def warn_if_skipped(self) -> None:
        """Warn once if the scores rest on too few of the steps."""
        skipped, observed = self.scorer.skipped, self.scorer.observed
        if not self._warned and skipped >= SKIPPED_STEPS and skipped > SKIPPED_SHARE * observed:
            self._warned = True
            warnings.warn(
                f"{skipped} of {observed} steps had no finite gradient and are left out of the scores; lower the "
                "learning rate, clip gradients, or train in bfloat16 instead of float16",
                AdaLoraWarning,
                stacklevel=3,
            )
