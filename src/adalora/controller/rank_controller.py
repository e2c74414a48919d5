"""RankController: watches the optimizer, runs the schedule, decides the ranks."""

from __future__ import annotations

import os
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from adalora.config import AdaLoraConfig
from adalora.controller.final_phase import FinalPhase
from adalora.core.schedule import BudgetSchedule, plan_schedule
from adalora.errors import AdaLoraWarning, AttachError, ConfigError
from adalora.lora.layers.triplets import find_triplets, lora_config
from adalora.lora.measures.scoring import Scorer
from adalora.lora.optimizers.seen import Optimizers, overflowed
from adalora.lora.orthogonality.orthogonal import hand_over
from adalora.lora.orthogonality.reorthonormal import reorthonormalize
from adalora.lora.processes.sharding import Shards
from adalora.lora.ranks.budget import make_budget
from adalora.lora.ranks.masking import zero_pruned
from adalora.lora.starts.parametrization import prepare
from adalora.lora.state.pruned import PrunedTriplets
from adalora.lora.steps.idle import WeightWatch
from adalora.lora.steps.nested import NestedTruncation, refuse_unfit
from adalora.lora.steps.observation import Observation
from adalora.lora.steps.pace import Pace
from adalora.recording import Recorder
from adalora.report.history import History
from adalora.report.plot_methods import HistoryPlots


class RankController(FinalPhase, HistoryPlots):
    """Runs the method for one adapter of one model; made by `adalora.attach`.

    The optimizer is found by itself: a post-step hook of torch, global to the process, calls the controller once per
    real step of whichever optimizer owns the triplets' parameters.

    Attributes:
        step: Optimizer steps seen, which is the number of the next one, counted from 0.
        history: What was decided, on which scores.
        allocations: How often a budget was dealt out.
        initial_budget: b0 in the unit of `budget_unit`.
        target_budget: b_T in the unit of `budget_unit`.
        budget_unit: "triplets", or "parameters" or "bytes" where the config counts those.
    """

    def __init__(
        self,
        model: nn.Module,
        config: AdaLoraConfig,
        *,
        adapter: str,
        history: History,
        total_steps: int | None,
        pruned: str | os.PathLike[str] | None = None,
    ) -> None:
        self.config = config
        self.adapter = adapter
        self.history = history
        self.step = 0
        self.allocations = 0
        self.finished = False
        self._warned_idle = False
        self._uncuttable = False
        self._model = weakref.ref(model)
        self._optimizers = Optimizers()
        self._schedule: BudgetSchedule | None = None
        self.handles = find_triplets(model, adapter)
        self._shards = Shards(self.handles)
        self._budget = make_budget(config, self.handles)
        self.budget_unit = self._budget.unit
        self.initial_budget = self._budget.initial
        self.target_budget = self._budget.target
        self._scorer = Scorer(self.handles, config)
        self._observation = Observation(self.handles, config, self._scorer)
        self._record = Recorder(history, self.handles, self._budget)
        self._written_ranks = [h.rank for h in self.handles]
        self._excluded = lora_config(model, adapter).exclude_modules
        self._nested: NestedTruncation | None = None
        self._pruned = PrunedTriplets(self.handles, Path(pruned)) if pruned is not None else None
        if config.nested:
            refuse_unfit(self.handles)
        self._weights = WeightWatch(self.handles)
        if total_steps is not None:
            self.set_total_steps(total_steps)
        # Everything is checked: only now is the model touched.
        prepare(model, self.handles, config, shrink=self.initial_budget / self.target_budget)
        self._pace = Pace(self.handles) if config.pace == "steady" else None

    @property
    def model(self) -> nn.Module:
        """The model that was attached."""
        model = self._model()
        if model is None:
            raise AttachError("the attached model no longer exists")
        return model

    def set_total_steps(self, total_steps: int) -> None:
        """Fix the length of the run in optimizer steps; before the first step.

        Raises:
            ConfigError: Not a positive number, warm-up and final phase do not fit into it, or training has begun.
        """
        if self._schedule is not None and self._schedule.total_steps == total_steps:
            return
        if self.step > 0:
            raise ConfigError(
                f"total_steps={total_steps} comes after {self.step} steps of a run of {self.schedule.total_steps}: "
                "set it before the first step"
            )
        self._schedule = plan_schedule(
            self.config,
            initial_budget=self.initial_budget,
            target_budget=self.target_budget,
            total_steps=total_steps,
        )
        name = getattr(getattr(self.model, "config", None), "_name_or_path", "") or type(self.model).__name__
        self._record.start(self._schedule, config=self.config.to_dict(), model=name)

    @property
    def phase(self) -> str:
        """One of "warmup", "decrease" and "final"."""
        return self.schedule.phase(self.step)

    @property
    def budget(self) -> int:
        """What the schedule allows now, in the unit of `budget_unit`."""
        return self.schedule.budget(self.step)

    @property
    def ranks(self) -> dict[str, int]:
        """Live triplets of every module, by full module name."""
        return {h.name: h.live_rank for h in self.handles}

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer that was seen to step, once one was; a view of them all where there are several."""
        return self._shards.of(self._optimizers.joined)

    def owns(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer trains the triplets."""
        if self._optimizers.knows(optimizer):
            return True
        mine = {id(p) for h in self.handles for p in h.parameters}
        return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])

    @property
    def _observes(self) -> bool:
        """Whether this step's gradients go into the scores: from the first step that counts to the last allocation."""
        phase = self.schedule.phase(self.step)
        scored = phase == "decrease" or (phase == "warmup" and not self.config.handover)
        return scored and self.schedule.shape != "constant"  # never allocates: nobody asks for a score

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """An optimizer step is about to be made, its gradients are there: add the coupled orthogonality term."""
        if self.finished or self._model() is None:
            return
        if self._pace is not None:
            self._pace.before(optimizer)
        observe = self._observes and not self._optimizers.partner(optimizer)
        if self._observation.acts_before(observe=observe) and not overflowed(optimizer):
            with self._shards.whole():
                self._observation.before(self._shards.of(optimizer) or optimizer, observe=observe)

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """One optimizer step has been made: score, regularise, and where it is time re-allocate."""
        if self.finished or self._model() is None:
            return
        if self._pace is not None:
            self._pace.after()
        if overflowed(optimizer):  # no weight has moved: it is no step of the run
            self._scorer.skip()
            return
        if self._optimizers.counts(optimizer):
            with self._shards.whole():
                self._advance(self._shards.of(optimizer) or optimizer)

    def _advance(self, optimizer: Optimizer) -> None:
        schedule, step = self.schedule, self.step
        self._observation.after(optimizer, observe=self._observes, fixed=schedule.phase(step) == "final")
        if self.config.handover and step == schedule.warmup_steps - 1:
            self.hand_over()
        if schedule.allocates(step):
            self._allocate(schedule.budget(step))
            if schedule.passes(step, self.config.compact_at or ()):
                self._remove_masked(during_training=True)
        elif not self.config.revival or step > schedule.decrease_end:
            self._apply_masks()  # what is pruned for good, and not yet removed, may not grow
        if step == schedule.decrease_end and schedule.shape != "constant":
            self._enter_final_phase()
        self._record.step(schedule, step)
        self.step += 1
        if self.config.nested and step >= schedule.decrease_end:
            self._truncate_at_random()

    def hand_over(self) -> None:
        """Turn every P·Q into its singular vectors, exactly; the averages start anew."""
        with self._shards.whole():
            hand_over(self.handles, self.optimizer)
            self._replicas.share_layers(self.handles, self.optimizer)
            self._scorer.reset()
            self._record.handover(self.step)

    def _allocate(self, budget: int) -> None:
        """Keep the best `budget` triplets, zero the others."""
        scores = self._replicas.share(self._scorer.scores())
        live_before = torch.cat([h.mask for h in self.handles])
        if not self.config.revival:
            scores = torch.where(live_before, scores, -torch.inf)
        ranks = [h.rank for h in self.handles]
        keep = self._budget.deal(scores, ranks, amount=budget)
        if not self.config.revival:
            keep &= live_before  # a registered schedule may rise
        for h, mask in zip(self.handles, torch.split(keep, ranks)):
            h.mask = mask
        if self._pruned is not None:
            before = torch.split(live_before, ranks)
            self._pruned.keep(before, torch.split(scores, ranks), step=self.step)
        self._apply_masks()
        self.allocations += 1
        self._record.allocation(
            self.schedule,
            self.step,
            scores=scores,
            live_before=live_before,
            keep=keep,
            skipped=self._scorer.skipped,
        )
        self._observation.warn_if_skipped()
        if self.config.reorthonormalize:
            for h in self.handles:
                reorthonormalize(h, self.optimizer)
            self._scorer.reset()

    def _apply_masks(self) -> None:
        """λ of the pruned triplets to 0; they keep their directions, from which they may grow again."""
        zero_pruned(self.handles, self.optimizer)

    def note_weights(self) -> None:
        """Take the weights as they are for untrained: others were loaded."""
        self._weights.note()

    def warn_if_idle(self, *, over: bool = False) -> None:
        """Warn, once, if the parameters were trained but no optimizer was seen.

        Called whenever the model's state is taken to be saved, by `finalize`, and at the end of the process.

        Args:
            over: The training is over: warn as well if steps were seen but no allocation ever ran.
        """
        if self._warned_idle or self.finished:
            return
        if self.step == 0 and self._weights.moved:
            message = (
                "the adapter was trained but adalora saw no optimizer step, so no rank was allocated. Train with a "
                "torch.optim.Optimizer, or call controller.after_step(optimizer) after each step"
            )
        elif over and self.step > 0 and self.allocations == 0 and self.schedule.shape != "constant":
            message = (
                f"training ended after {self.step} of {self.schedule.total_steps} steps and no rank was ever "
                f"allocated: the adapter still has its initial {self.live} triplets. Give the real number of steps: "
                f"adalora.attach(model, total_steps={self.step}), or call controller.finalize() at the end"
            )
        else:
            return
        self._warned_idle = True
        warnings.warn(message, AdaLoraWarning, stacklevel=3)

    def log(self, **values: Any) -> None:
        """Put numbers of your own, such as `loss=…`, into the history at the current step."""
        self.history.add("step", **self._record.position(self.schedule, max(self.step - 1, 0)), **values)
