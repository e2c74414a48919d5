"""What is wrong with a run, why, and what to do: read from its records, while it trains or afterwards."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from adalora.report.agreement import rank_agreement
from adalora.report.explanations import EXPLANATIONS
from adalora.report.history import History, Record
from adalora.report.thresholds import DiagnosticThresholds, recorded_thresholds

Finding: TypeAlias = dict[str, Any]


class Diagnostics:
    """Reads records one by one, as they are written, and says what is wrong. Each code is raised once a run.

    Args:
        thresholds: Limits; the defaults if None.
    """

    def __init__(self, thresholds: DiagnosticThresholds | None = None) -> None:
        self.thresholds = thresholds or DiagnosticThresholds()
        self._begin({})

    def _begin(self, start: Record) -> None:
        self.raised: set[str] = set()
        self._start = start
        self._churn: deque[float] = deque(maxlen=self.thresholds.allocations)
        self._revived: Counter[tuple[int, int]] = Counter()
        self._silent: set[int] | None = None
        self._allocations = 0
        self._losses: dict[int, float] = {}
        self._threshold_share: float | None = None
        self._loss_checked = self._size_checked = False
        self._angles: float | None = None

    def update(self, record: Record) -> list[Finding]:
        """Take one record.

        Args:
            record: As `History.add` returns it; unknown events are passed over.

        Returns:
            New findings: dicts with step, code, message, cause and cure, the fields of a `diagnostic` record.
        """
        event = record["event"]
        if event == "start":
            self._begin(record)
        if not self._start or self._start["total_steps"] < self.thresholds.min_steps:
            return []
        readers = {
            "start": (self._final_share,),
            "step": (self._loss,),
            "handover": (self._update_size,),
            "allocation": (self._update_size, self._revivals, self._gradients, self._balance, self._note_angles),
            "finish": (self._final_steps, self._loss_at_end, self._balance, self._orthogonality),
        }
        found = []
        for reader in readers.get(event, ()):
            for code, message in reader(record):
                if code not in self.raised and code not in self.thresholds.ignore:
                    self.raised.add(code)
                    found.append(_finding(code, message, step=record.get("step", 0)))
        return found

    @property
    def _shrinks(self) -> bool:
        return bool(self._start["initial_budget"] > self._start["target_budget"])

    @property
    def _decrease_end(self) -> int:
        return int(self._start["decrease_end"])

    def _name(self, module: int) -> str:
        return str(self._start["modules"][module]["name"])

    def _final_share(self, start: Record) -> Iterable[tuple[str, str]]:
        total = start["total_steps"]
        share = (total - start["decrease_end"]) / total
        if self._shrinks and share < self.thresholds.final_share:
            steps = total - start["decrease_end"]
            yield (
                "final-phase-too-short",
                f"the final phase is {steps:,} of {total:,} steps "
                f"({share:.1%}; wanted: {self.thresholds.final_share:.0%})",
            )

    def _final_steps(self, finish: Record) -> Iterable[tuple[str, str]]:
        done, end = finish["step"], self._decrease_end
        if self._shrinks and done and max(done - end, 0) < self.thresholds.final_share * done:
            yield (
                "final-phase-too-short",
                f"training ended at step {done:,}; the budget reaches its target at step {end:,}, "
                f"so {max(done - end, 0):,} steps were left for the final ranks",
            )

    def _update_size(self, record: Record) -> Iterable[tuple[str, str]]:
        """The first record after warm-up that knows the size of the update decides."""
        ratio = record.get("update_ratio")
        if ratio is None or self._size_checked or record["step"] < self._start["warmup_steps"] - 1:
            return  # a run that was stopped in its warm-up is cut to its target too, and tells nothing
        self._size_checked = True
        if ratio < self.thresholds.update_ratio:
            yield (
                "slow-start",
                f"after warm-up the median module's ‖ΔW‖ is {ratio:.1e} of ‖W‖ "
                f"(wanted: {self.thresholds.update_ratio:.0e})",
            )

    def _revivals(self, record: Record) -> Iterable[tuple[str, str]]:
        limits = self.thresholds
        self._churn.append((record.get("revived") or 0) / max(record["live"], 1))
        self._revived.update((module, triplet) for module, triplet in record.get("revived_triplets") or ())
        mean = float(np.mean(self._churn))
        if len(self._churn) == limits.allocations and mean > limits.revived_share:
            yield (
                "unstable-scores",
                f"in the last {len(self._churn)} allocations {mean:.0%} of the live triplets each time "
                f"had just been revived (limit: {limits.revived_share:.0%}){self._most_revived(2)}",
            )
        often = sum(count >= limits.revivals for count in self._revived.values())
        if often > limits.revived_often * self._start["target_budget"]:
            yield (
                "unstable-scores",
                f"{often} triplets have been revived {limits.revivals} times or more{self._most_revived(2)}",
            )

    def _most_revived(self, least: int) -> str:
        """The triplets that came back most often, where they did at least `least` times."""
        top = [f"{self._name(m)}[{i}] ({n} times)" for (m, i), n in self._revived.most_common(3) if n >= least]
        return f"; most often: {', '.join(top)}" if top else ""

    def _gradients(self, record: Record) -> Iterable[tuple[str, str]]:
        scores = record.get("module_scores") or []
        silent = {i for i, score in enumerate(scores) if not score}
        self._silent = silent if self._silent is None else self._silent & silent
        self._allocations += 1
        if self._silent and self._allocations == self.thresholds.allocations:
            names = [self._name(i) for i in sorted(self._silent)]
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            yield (
                "no-gradient",
                f"{len(names)} of {len(scores)} modules never got a gradient in {self._allocations} "
                f"allocations: {some}",
            )

    def _balance(self, record: Record) -> Iterable[tuple[str, str]]:
        """Judged once the budget has reached its target."""
        ranks, limits = record.get("ranks") or [], self.thresholds
        total = sum(ranks)
        self._threshold_share = _threshold_share(record, otherwise=self._threshold_share)
        if record["step"] < self._decrease_end or len(ranks) < limits.min_modules or not total:
            return
        if not self._shrinks:
            return
        largest, zeros = max(ranks), sum(rank == 0 for rank in ranks)
        if largest / total > limits.largest_share and largest > limits.largest_ratio * total / len(ranks):
            yield (
                "ranks-unbalanced",
                f"{self._name(ranks.index(largest))} holds {largest} of {total:,} triplets ({largest / total:.0%})",
            )
        if zeros / len(ranks) > limits.zero_share:
            yield (
                "ranks-unbalanced",
                f"{zeros} of {len(ranks)} modules have rank 0 ({zeros / len(ranks):.0%})",
            )

    def _note_angles(self, record: Record) -> Iterable[tuple[str, str]]:
        self._angles = record.get("orthogonality")
        return ()

    def _orthogonality(self, record: Record) -> Iterable[tuple[str, str]]:
        error = self._angles  # scores are compared at allocations; in the final phase nothing need hold vectors apart
        if record["step"] < self._start["warmup_steps"]:
            return  # plain LoRA still, cut to its target
        if error is not None and error > self.thresholds.orthogonality:
            yield (
                "orthogonality-not-reached",
                f"the vectors of a module have a root mean square cosine of {error:.2f} at the last allocation "
                f"(limit: {self.thresholds.orthogonality})",
            )

    def _loss(self, record: Record) -> Iterable[tuple[str, str]]:
        if record.get("loss") is None:
            return
        self._losses[record["step"]] = record["loss"]
        total = self._start["total_steps"]
        recovered = self._decrease_end + self.thresholds.recovery * (total - self._decrease_end)
        window = self._window()
        if not self._loss_checked and record["step"] >= recovered:
            after = sum(step >= recovered for step in self._losses)
            if after >= window:
                self._loss_checked = True
                yield from self._not_recovered()

    def _loss_at_end(self, finish: Record) -> Iterable[tuple[str, str]]:
        del finish
        yield from self._not_recovered()

    def _window(self) -> int:
        return min(max(len(self._losses) // 20, 3), 50)

    def _not_recovered(self) -> Iterable[tuple[str, str]]:
        """Compare the lowest mean loss of a window before the target was reached with the newest window's."""
        limits, window, end = self.thresholds, self._window(), self._decrease_end
        before = [loss for step, loss in sorted(self._losses.items()) if step < end]
        after = [loss for step, loss in sorted(self._losses.items()) if step >= end][-window:]
        if not self._shrinks or len(before) < window or len(after) < window:
            return
        windows = np.lib.stride_tricks.sliding_window_view(np.asarray(before), window)
        best = windows[windows.mean(axis=1).argmin()]
        rise = float(np.mean(after) - best.mean())
        error = math.sqrt((np.var(after, ddof=1) + best.var(ddof=1)) / window)
        share = self._threshold_share  # None, as of random scores, does not speak against it
        matters = share is None or share > limits.threshold_share
        if matters and rise > limits.loss_rise * abs(best.mean()) and rise > limits.loss_errors * error:
            yield (
                "budget-too-low",
                f"the loss rose from {best.mean():.3g} to {np.mean(after):.3g} while the budget "
                f"shrank and did not recover; "
                f"the last threshold is {share or 0:.0%} of the scores' 95 % quantile",
            )


def diagnose(history: History, thresholds: DiagnosticThresholds | None = None) -> list[Finding]:
    """All findings over a history, finished or not, oldest first; by the run's own limits if none are given."""
    diagnostics = Diagnostics(thresholds or recorded_thresholds(history))
    return [finding for record in history for finding in diagnostics.update(record)]


def findings_of(history: History, thresholds: DiagnosticThresholds | None = None) -> list[Finding]:
    """Findings recorded while the run trained, and those of a fresh look where a code is not among them."""
    recorded = [{"cause": "", "cure": "", "step": None, **record} for record in history.of("diagnostic")]
    codes = {record["code"] for record in recorded}
    for record in recorded:
        record["cause"] = record["cause"] or EXPLANATIONS.get(record["code"], ("", ""))[0]
    return recorded + [f for f in diagnose(history, thresholds) if f["code"] not in codes]


def diagnose_seeds(histories: Sequence[History], thresholds: DiagnosticThresholds | None = None) -> list[Finding]:
    """Findings over several runs of the same model that differ in their seed.

    Raises:
        HistoryError: The runs do not adapt the same modules.
    """
    limits = thresholds or DiagnosticThresholds()
    agreement = rank_agreement(histories)
    code = "ranks-differ-between-seeds"
    value = agreement.correlation
    if code in limits.ignore or value is None or value >= limits.seed_correlation:
        return []
    if agreement.shared >= limits.seed_shared:
        return []
    message = (
        f"the final ranks of {len(histories)} runs have a Spearman correlation of {value:.2f} "
        f"(wanted: {limits.seed_correlation}); {agreement.shared:.0%} of the triplets sit in the same modules"
    )
    return [_finding(code, message, step=None)]


def _finding(code: str, message: str, *, step: int | None) -> Finding:
    cause, cure = EXPLANATIONS[code]
    return {"step": step, "code": code, "message": message, "cause": cause, "cure": cure}


def _threshold_share(record: Record, *, otherwise: float | None) -> float | None:
    high, threshold = (record.get("scores") or {}).get("q95"), record.get("threshold")
    return threshold / high if threshold is not None and high else otherwise
