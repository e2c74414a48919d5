"""What a controller does once the ranks are reached: removal, nested draws, and the end of the run."""

from __future__ import annotations

import warnings

import torch

from adalora.controller.resuming import Resumable
from adalora.errors import AdaLoraWarning, CompactionError
from adalora.faults import storage_fault
from adalora.lora.layers.svd import fold_lambda
from adalora.lora.ranks.budget import Budget
from adalora.lora.ranks.compaction import adapter_size, compact
from adalora.lora.state.pruned import PrunedTriplets
from adalora.lora.steps.nested import NestedTruncation


class FinalPhase(Resumable):
    """End of a `RankController`'s run; a part of it, in a file of its own."""

    _budget: Budget
    _nested: NestedTruncation | None
    _uncuttable: bool

    def _allocate(self, budget: int) -> None:
        """Keep the best `budget` triplets, zero the others."""
        raise NotImplementedError

    def warn_if_idle(self, *, over: bool = False) -> None:
        """See `RankController`."""
        raise NotImplementedError

    def _enter_final_phase(self) -> None:
        """Ranks are fixed from here: free the averages, remove what was pruned."""
        self._scorer.reset()
        self._remove_masked(during_training=True)

    def compact(self) -> None:
        """Remove pruned triplets now. Under DDP wrap the model again afterwards, the old wrapper refuses to train.

        Done by itself at the end of the decrease, and at `compact_at`, where one process trains.
        """
        self._remove_masked(during_training=False)

    def _remove_masked(self, *, during_training: bool) -> None:
        """Make memory smaller; averages of what stays go on."""
        if not self.config.compact or self.live == sum(h.rank for h in self.handles):
            return
        replicas = self._replicas
        if self.is_sharded or (during_training and replicas.several):
            return  # masked: parameters of a wrapped model keep their size until the training is over
        before, averages = adapter_size(self.handles, self.optimizer), self._scorer.cut()
        try:
            compact(self.handles, self.optimizer)
        except CompactionError as error:  # nothing was changed; a run must not die of it
            self._uncuttable = True
            warnings.warn(f"pruned triplets stay in memory, masked: {error}", AdaLoraWarning, stacklevel=2)
            return
        if self._pruned is not None:
            self._pruned.remove()
        replicas.retire_wrappers()
        self._scorer.load_state_dict(averages)
        self._write_patterns()
        self._record.compaction(self.step, before=before, after=adapter_size(self.handles, self.optimizer))

    def _go_on(self) -> None:
        if self._nested is not None:  # of the ranks that the run had before the checkpoint was loaded
            self._nested.stop()
            self._nested = None
        if self.config.nested and not self.finished and self.step > self.schedule.decrease_end:
            self._truncate_at_random()

    def _truncate_at_random(self) -> None:
        """Draw what the coming step trains; the order is that of the last allocation, which a resumed run has too."""
        if self._nested is None:
            record = self.history.last("allocation")
            if record is None or "triplet_scores" not in record:
                return
            self._nested = NestedTruncation(self.handles, record["triplet_scores"], seed=self.config.seed)
        self._nested.draw(self.step)

    def finalize(self, *, cut: bool = True) -> None:
        """End the run: bring the adapter to its target even if the training ended before the schedule did.

        Called by the Trainer callback; call it at the end of your own loop. Warns where the schedule was cut short or
        never ran.

        Args:
            cut: False leaves the triplets that are live now, even if they are more than the target.
        """
        if self.finished:
            return
        self.warn_if_idle()
        with self._shards.whole():
            self._settle(cut=cut)

    def _settle(self, *, cut: bool) -> None:
        schedule = self.schedule
        if not cut:
            self.compact()
        elif schedule.shape != "constant" and self.step <= schedule.decrease_end:
            if self.step > 0:
                warnings.warn(
                    f"training ended after {self.step} of {schedule.total_steps} steps, before the budget had reached "
                    f"its target: {self.live} triplets are cut to {self._budget.triplets(self.target_budget)} now, "
                    f"untrained. Give the real number of steps: adalora.attach(model, total_steps={self.step})",
                    AdaLoraWarning,
                    stacklevel=3,
                )
            with torch.no_grad():
                self._allocate(self.target_budget)
                self._enter_final_phase()
        if self._nested is not None:
            self._nested.stop()
        if not self._uncuttable:
            self.compact()  # put off until now, by several processes or the run that was resumed here
        for h in self.handles:
            if not (h.removed or self.is_sharded):  # FSDP2 would put the λ back; what is saved is folded anyway
                fold_lambda(h)
        if self._pruned is not None:
            self._write_pruned(self._pruned)
        self.finished = True
        self._record.finish(self.step, allocations=self.allocations)

    def _write_pruned(self, pruned: PrunedTriplets) -> None:
        """A disk that is full costs what was pruned, not what was trained."""
        try:
            self._record.pruned(self.step, **pruned.write())
        except OSError as error:
            fault = storage_fault(error) or error.strerror
            warnings.warn(f"{pruned.path}: {fault}. What was pruned is not kept", AdaLoraWarning, stacklevel=4)
