"""What a controller writes into its history."""

from __future__ import annotations

import itertools
import platform
from typing import Any

import torch
from torch import Tensor

from adalora.core.factored_svd import factored_svd
from adalora.core.schedule import BudgetSchedule
from adalora.core.statistics import describe_scores
from adalora.lora.layers.triplets import TripletHandle
from adalora.lora.measures.update_size import update_ratio
from adalora.lora.orthogonality.orthogonal import orthogonality_error
from adalora.lora.ranks.budget import Budget
from adalora.report.history import History
from adalora.version import __version__

STEP_RECORDS = 500  # so many `step` records a run at most, beside those of allocations and of the trainer's log


def versions() -> dict[str, str]:
    """Of the libraries that a run's numbers hang on."""
    import peft
    import transformers

    return {"torch": str(torch.__version__), "peft": peft.__version__, "transformers": transformers.__version__}


class Recorder:
    """Turns a controller's decisions into records; holds no state of the method."""

    def __init__(self, history: History, handles: list[TripletHandle], budget: Budget) -> None:
        self.history = history
        self.handles = handles
        self.budget = budget

    @property
    def ranks(self) -> list[int]:
        """Live triplets of every module, in the order of `start.modules`."""
        return [h.live_rank for h in self.handles]

    def position(self, schedule: BudgetSchedule, step: int) -> dict[str, Any]:
        """Where a step is in the run."""
        return {
            "step": step,
            "phase": schedule.phase(step),
            "budget": self.budget.triplets(schedule.budget(step)),
            "live": sum(self.ranks),
        }

    def start(self, schedule: BudgetSchedule, *, config: dict[str, Any], model: str) -> None:
        """The run's settings."""
        self.history.add(
            "start",
            version=__version__,
            versions=versions(),
            machine={
                "python": platform.python_version(),
                "system": platform.system(),
                "cpu": platform.machine(),
            },
            config=config,
            model=model,
            total_steps=schedule.total_steps,
            warmup_steps=schedule.warmup_steps,
            decrease_end=schedule.decrease_end,
            initial_budget=sum(h.rank for h in self.handles),
            target_budget=self.budget.triplets(schedule.target_budget),
            budget_unit=self.budget.unit,
            budget_amounts=[schedule.initial_budget, schedule.target_budget],
            modules=[h.describe() for h in self.handles],
        )

    def step(self, schedule: BudgetSchedule, step: int) -> None:
        """An ordinary step; thinned out to `STEP_RECORDS`."""
        if step % max(1, schedule.total_steps // STEP_RECORDS) == 0:
            self.history.add("step", **self.position(schedule, step))

    def allocation(
        self,
        schedule: BudgetSchedule,
        step: int,
        *,
        scores: Tensor,
        live_before: Tensor,
        keep: Tensor,
        skipped: int,
    ) -> None:
        """A budget was dealt out."""
        self.history.add(
            "allocation",
            **{**self.position(schedule, step), "budget": int(keep.sum())},
            pruned=int((live_before & ~keep).sum()),
            revived=int((keep & ~live_before).sum()),
            revived_triplets=self._places(keep & ~live_before),
            **self._kept_scores(scores, keep, schedule),
            ranks=self.ranks,
            module_scores=_sums(scores, [h.rank for h in self.handles]),
            orthogonality=orthogonality_error(self.handles),
            skipped_steps=skipped,
            # Without a hand-over, the first allocation tells how far the warm-up has come.
            update_ratio=None if self.history.last("handover") else update_ratio(self.handles),
            **describe_scores(scores, keep),
        )

    def _kept_scores(self, scores: Tensor, keep: Tensor, schedule: BudgetSchedule) -> dict[str, Any]:
        """Scores of the triplets that stay for good, by module: the order in which the final adapter can be cut."""
        if int(keep.sum()) > schedule.target_budget:
            return {}
        ranks = [h.rank for h in self.handles]
        values, kept, starts = scores.double().tolist(), keep.tolist(), itertools.accumulate(ranks, initial=0)
        parts = [range(start, start + rank) for start, rank in zip(starts, ranks)]
        return {"triplet_scores": [[values[i] for i in part if kept[i]] for part in parts]}

    def _places(self, chosen: Tensor) -> list[list[int]]:
        """Module and number inside it of each chosen triplet."""
        ranks = [h.rank for h in self.handles]
        places = [[module, i] for module, rank in enumerate(ranks) for i in range(rank)]
        return list(itertools.compress(places, chosen.tolist()))

    def handover(self, step: int) -> None:
        """P·Q were rewritten in their singular vectors."""
        self.history.add("handover", step=step, ranks=self.ranks, update_ratio=update_ratio(self.handles))

    def compaction(self, step: int, *, before: tuple[int, int, int], after: tuple[int, int, int]) -> None:
        """Pruned triplets were removed; sizes are (parameters, bytes, bytes of the optimizer's state)."""
        self.history.add(
            "compaction",
            step=step,
            ranks=self.ranks,
            parameters_before=before[0],
            parameters_after=after[0],
            bytes_before=before[1],
            bytes_after=after[1],
            optimizer_bytes_before=before[2],
            optimizer_bytes_after=after[2],
        )

    def pruned(self, step: int, **file: Any) -> None:
        """What was pruned lies in a file of its own."""
        self.history.add("pruned", step=step, **file)

    def restored(self, step: int, *, of_step: int, checkpoint: str) -> None:
        """The adapter was replaced by that of a checkpoint, which the trainer has kept as the best."""
        self.history.add("restored", step=step, of_step=of_step, checkpoint=checkpoint, ranks=self.ranks)

    def finish(self, step: int, *, allocations: int) -> None:
        """The end, with the spectrum of every module."""
        spectra = [_spectrum(h) for h in self.handles]
        self.history.add(
            "finish",
            step=step,
            ranks=self.ranks,
            singular_values=spectra,
            orthogonality=orthogonality_error(self.handles),
            allocations=allocations,
        )


def _sums(scores: Tensor, ranks: list[int]) -> list[float]:
    """Sum of the finite scores of each module."""
    module = torch.repeat_interleave(torch.tensor(ranks))
    finite = torch.where(scores.isfinite(), scores, 0.0).double()
    sums: list[float] = torch.zeros(len(ranks), dtype=torch.float64).index_add_(0, module, finite).tolist()
    return sums


def _spectrum(handle: TripletHandle) -> list[float | None]:
    """Singular values of one module's update, those of its groups together; unknown where training has diverged."""
    if handle.rank == 0:
        return []
    if not bool(handle.left_or.isfinite().all() and handle.Q_ri.isfinite().all()):
        return [None] * handle.lora_rank(handle.rank)
    parts = zip(handle.by_group(handle.left_or), handle.Q_gri)
    values = torch.cat([factored_svd(P_or, Q_ri)[1] for P_or, Q_ri in parts]) * handle.scale
    return list(values.sort(descending=True).values.tolist())
