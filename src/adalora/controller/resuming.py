"""What a controller saves and how it goes on from it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from adalora.config import AdaLoraConfig
from adalora.core.schedule import BudgetSchedule
from adalora.errors import AdaLoraWarning, CheckpointError, ConfigError
from adalora.lora.layers.patterns import write_patterns
from adalora.lora.layers.triplets import TripletHandle, lora_config
from adalora.lora.measures.scoring import Scorer
from adalora.lora.optimizers.state import find_optimizer
from adalora.lora.processes.replicas import Replicas
from adalora.lora.processes.sharding import Shards
from adalora.lora.ranks.compaction import resize
from adalora.lora.state.checkpoint import DESCRIPTION, explain_differences, read_state
from adalora.lora.state.pruned import PrunedTriplets
from adalora.lora.state.training_state import check_layers, layers_state, load_layers
from adalora.recording import Recorder, versions
from adalora.report.history import History

_STEP_NAME = re.compile(r"checkpoint-\d+")  # the Trainer's: one of these without our state is unfinished or foreign


class Resumable:
    """State of a `RankController`; a part of it, in a file of its own."""

    config: AdaLoraConfig
    adapter: str
    history: History
    step: int
    allocations: int
    finished: bool
    handles: list[TripletHandle]
    initial_budget: int
    target_budget: int
    model: Any
    optimizer: Any
    _schedule: BudgetSchedule | None
    _scorer: Scorer
    _shards: Shards
    _written_ranks: list[int]
    _excluded: Any
    _pruned: PrunedTriplets | None
    _record: Recorder

    # A file that is being loaded holds the whole adapter: layers that it lacks have left it.
    expects_all_layers = False
    # The checkpoint whose adapter was loaded last.
    loaded_from: str | None = None

    def set_total_steps(self, total_steps: int) -> None:
        """See `RankController`."""
        raise NotImplementedError

    def _go_on(self) -> None:
        """What else the coming step needs."""
        raise NotImplementedError

    def owns(self, optimizer: Optimizer) -> bool:
        """See `RankController`."""
        raise NotImplementedError

    @property
    def schedule(self) -> BudgetSchedule:
        """The budget over the run; known once the number of steps is."""
        if self._schedule is None:
            raise ConfigError("total_steps is not known yet: adalora.attach(model, total_steps=…)")
        return self._schedule

    @property
    def live(self) -> int:
        """Triplets not pruned."""
        return sum(h.live_rank for h in self.handles)

    def state_dict(self) -> dict[str, Any]:
        """The exact training state: `load_state_dict` in a new process goes on bit for bit.

        Returns:
            `tensors` (factors, masks, averages, by name) and JSON-ready values.
        """
        with self._shards.whole():
            tensors, modules = layers_state(self.handles)
        tensors |= {f"averages.{name}": value for name, value in self._scorer.state_dict().items()}
        if self._pruned is not None:
            tensors |= self._pruned.state_dict()
        return {
            "tensors": tensors,
            "adapter": self.adapter,
            "config": self.config.model_dump(mode="json"),
            "modules": modules,
            "step": self.step,
            "total_steps": self._schedule.total_steps if self._schedule else None,
            "initial_budget": self.initial_budget,
            "target_budget": self.target_budget,
            "allocations": self.allocations,
            "finished": self.finished,
            "skipped": self._scorer.skipped,
            "observed": self._scorer.observed,
            "versions": versions(),
            "keeps_pruned": self._pruned is not None,
            "history": list(self.history.records),
        }

    def load_state_dict(self, state: dict[str, Any], *, optimizer: Optimizer | None = None) -> None:
        """Go on from `state_dict`: layers get its ranks and weights, the history its records.

        Args:
            state: From `state_dict`, or `adalora.lora.state.checkpoint.read_state`.
            optimizer: The optimizer of the run if it exists already: parameters of layers that the adapter has left
                are taken out of it. One that holds the adapter's parameters is found by itself. Load its own state
                after this one.

        Raises:
            CheckpointError: The state is of another config, other target modules, another base model, another length
                of run; the difference is shown and nothing is changed.
        """
        self._check_state(state)
        if optimizer is not None:
            self.owns(optimizer)
        self._refuse_other_ranks([line["rank"] for line in state["modules"]])
        seen = self.optimizer or find_optimizer([p for h in self.handles for p, _ in h.factors.values()])
        averages = {n.removeprefix("averages."): v for n, v in state["tensors"].items() if n.startswith("averages.")}
        with self._shards.whole():
            load_layers(self.handles, state["tensors"], state["modules"], optimizer=seen, model=self.model)
            self._scorer.load_state_dict(averages)
        self._write_patterns()
        self._scorer.skipped, self._scorer.observed = state["skipped"], state["observed"]
        self.step, self.allocations, self.finished = state["step"], state["allocations"], state["finished"]
        self._restore_pruned(state)
        self.history.restore(state["history"])
        self._go_on()

    def _refuse_other_ranks(self, ranks: list[int]) -> None:
        if self.is_sharded and [h.rank for h in self.handles] != ranks:
            raise CheckpointError(
                "the checkpoint's adapter has been compacted, and sharded parameters cannot change their size: load it "
                "before fully_shard, or go on in one process or under DDP"
            )

    def _restore_pruned(self, state: dict[str, Any]) -> None:
        if self._pruned is None:
            return
        self._pruned.load_state_dict(state["tensors"])
        if not state.get("keeps_pruned") and state["allocations"] > 0:
            warnings.warn(
                "the checkpoint is of a run that did not keep what it pruned: pruned triplets of before are lost, and "
                "none are kept now",
                AdaLoraWarning,
                stacklevel=3,
            )
            self._pruned = None

    def _check_state(self, state: dict[str, Any]) -> None:
        wrong = explain_differences(state["config"], self.config.model_dump(mode="json"))
        if wrong:
            raise CheckpointError(
                f"the config differs from the checkpoint's: {'; '.join(wrong)}. Resume with the config of the run that "
                "wrote it, or start a new run from its plain adapter"
            )
        check_layers(self.handles, state["modules"])
        self._same_run(state, "initial_budget", self.initial_budget)
        if self._schedule is not None:
            self._same_run(state, "total_steps", self._schedule.total_steps)
        elif state["total_steps"] is not None:
            self.set_total_steps(state["total_steps"])
        if self.config.nested and not state["finished"] and self._schedule is not None:
            self._check_order(state, self._schedule.decrease_end)

    def _check_order(self, state: dict[str, Any], decrease_end: int) -> None:
        """A nested run needs the scores of the triplets it kept; without them it would go on un-nested."""
        if state["step"] <= decrease_end:
            return
        record: dict[str, Any] = next((r for r in reversed(state["history"]) if r["event"] == "allocation"), {})
        found = [len(part) for part in record.get("triplet_scores", [])]
        live = [int(state["tensors"][f"{line['name']}.mask"].sum()) for line in state["modules"]]
        if found != live:
            raise CheckpointError(
                f"nested=True cannot go on from step {state['step']}: the checkpoint's history has no scores of the "
                f"{sum(live)} triplets that were kept, so their order is unknown. Resume from a checkpoint of step "
                f"{decrease_end} or earlier, or start a new run"
            )

    def expect_total_steps(self, total_steps: int, state: dict[str, Any]) -> None:
        """Refuse a state of a run of another length.

        Raises:
            CheckpointError: The lengths differ; both are shown.
        """
        self._same_run(state, "total_steps", total_steps)

    def _same_run(self, state: dict[str, Any], name: str, here: int) -> None:
        if state[name] != here:
            raise CheckpointError(
                f"the run differs from the checkpoint's: {name}: {state[name]} in the checkpoint, {here} here. Resume "
                "with the same LoraConfig and the same number of steps"
            )

    def _write_patterns(self) -> None:
        """Tell the adapter's LoraConfig the ranks of its layers."""
        if any(h.rank != rank for h, rank in zip(self.handles, self._written_ranks)):
            lora_config(self.model, self.adapter).exclude_modules = self._excluded
            write_patterns(self.model, self.handles)
            self._written_ranks = [h.rank for h in self.handles]

    def adopt_masks(self, state: dict[str, Any], *, checkpoint: str) -> None:
        """Take over which triplets are live from the checkpoint whose weights the model has, and record it."""
        for h in self.handles:
            mask = state["tensors"][f"{h.name}.mask"]
            if len(mask) != h.rank:
                raise CheckpointError(f"{h.name} has rank {h.rank}, the checkpoint {len(mask)}: not the same weights")
            h.mask = mask.clone()
        self._restore_pruned(state)
        self._record.restored(self.step, of_step=state["step"], checkpoint=Path(checkpoint).name)

    def has_weights_of(self, state: dict[str, Any]) -> bool:
        """Whether the layers hold the weights of a state already."""
        with self._shards.whole():
            tensors, _ = layers_state(self.handles)
        saved = state["tensors"]
        return all(
            name in saved and saved[name].shape == value.shape and bool((saved[name] == value.cpu()).all())
            for name, value in tensors.items()
            if not name.endswith(".mask")
        )

    @torch.no_grad()
    def weights_are_finite(self) -> bool:
        """Whether no factor holds NaN or infinities."""
        with self._shards.whole():
            values = [parameter.detach() for h in self.handles for parameter, _ in h.factors.values()]
            norms = [norm.reshape(()) for norm in torch._foreach_norm(values)] if values else []
        return not norms or bool(torch.stack(norms).isfinite().all())

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are spread over processes (FSDP2)."""
        return bool(self._shards.parameters)

    @property
    def _replicas(self) -> Replicas:
        return Replicas(self.model, mesh=self._shards.mesh)

    @contextmanager
    def loading(self, folder: Any) -> Iterator[None]:
        """While a whole adapter is loaded from a folder: verify it first, and remember where it came from.

        Raises:
            CheckpointError: It is a damaged checkpoint, or one of another run.
        """
        state = None
        if (Path(folder) / DESCRIPTION).exists() or _STEP_NAME.fullmatch(Path(folder).name):
            state = read_state(folder)
            self._check_state(state)
            self.fit_to([line["rank"] for line in state["modules"]])  # PEFT finds keys of layers that are there alone
        self.expects_all_layers = True
        try:
            yield
        finally:
            self.expects_all_layers = False
        self.loaded_from = str(folder) if state is not None else None

    def fit_to(self, ranks: list[int]) -> None:
        """Bring layers to the ranks of weights that are about to be loaded into the model.

        Args:
            ranks: In the order of `handles`, 0 for a layer that the adapter has left.
        """
        if [h.rank for h in self.handles] == ranks:
            return
        self._refuse_other_ranks(ranks)
        optimizer = self.optimizer or find_optimizer([p for h in self.handles for p, _ in h.factors.values()])
        resize(self.handles, ranks, optimizer, model=self.model)
        self._scorer.reset()
        self._write_patterns()
