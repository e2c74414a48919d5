"""Paired comparisons with the baseline: intervals, wins, probability of improvement, corrected p-values."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 9_999
SEED = 0  # of the bootstrap, so that a report can be made again


@dataclass(frozen=True)
class Interval:
    """A mean difference, better is positive.

    Attributes:
        mean: The difference.
        low: Lower end; NaN where there is one pair only.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """In words."""
        if not np.isfinite([self.low, self.high]).all():
            return "too few seeds"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no difference shown"


@dataclass(frozen=True)
class Comparison:
    """One method against the baseline on the same seeds.

    Attributes:
        difference: Of the scores, per seed; better is positive.
        wins: Seeds on which the method is better.
        losses: Seeds on which it is worse.
        improvement: Probability that a run of the method beats one of the baseline (ties count half).
        p_value: Two-sided, of the paired t-test; NaN with fewer than two pairs or without any spread.
        corrected: The same after Holm's correction over all comparisons of a report.
    """

    difference: Interval
    wins: int
    losses: int
    improvement: float
    p_value: float
    corrected: float = float("nan")


def compare(ours: Sequence[float], baseline: Sequence[float], *, confidence: float = 0.95) -> Comparison:
    """Compare two methods on paired seeds.

    Args:
        ours: Scores by seed; higher is better.
        baseline: Scores on the same seeds in the same order.
        confidence: Of the interval.
    """
    mine, theirs = np.asarray(ours, dtype=float), np.asarray(baseline, dtype=float)
    gains = mine - theirs
    u_statistic = stats.mannwhitneyu(mine, theirs, method="asymptotic").statistic if np.ptp([*mine, *theirs]) else None
    improvement = 0.5 if u_statistic is None else float(u_statistic) / (len(mine) * len(theirs))
    spread = len(gains) > 1 and float(np.ptp(gains)) > 1e-12 * max(1.0, float(np.abs(gains).max()))
    return Comparison(
        difference=interval([gains], confidence=confidence),
        wins=int((gains > 0).sum()),
        losses=int((gains < 0).sum()),
        improvement=improvement,
        p_value=float(stats.ttest_rel(mine, theirs).pvalue) if spread else float("nan"),
    )


def interval(gains: Sequence[Sequence[float] | np.ndarray], *, confidence: float = 0.95) -> Interval:
    """Bootstrap interval of a mean of paired differences, over seeds within each task.

    Args:
        gains: One row of differences per task, one entry per seed; tasks weigh the same.
        confidence: Of the interval.

    Returns:
        Bias-corrected and accelerated (BCa); by percentiles where BCa is not defined.
    """
    rows = [np.asarray(row, dtype=float) for row in gains]
    mean = float(np.mean([row.mean() for row in rows]))
    if min(len(row) for row in rows) < 2:
        return Interval(mean, float("nan"), float("nan"))
    if all(np.ptp(row) == 0 for row in rows):
        return Interval(mean, mean, mean)

    def statistic(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
        mean: np.ndarray = np.mean([sample.mean(axis=axis) for sample in samples], axis=0)
        return mean

    for method in ("BCa", "percentile") if len(rows) == 1 else ("percentile",):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            found = stats.bootstrap(
                rows,
                statistic,
                n_resamples=RESAMPLES,
                confidence_level=confidence,
                method=method,
                rng=np.random.default_rng(SEED),
            ).confidence_interval
        if np.isfinite([found.low, found.high]).all():
            break
    return Interval(mean, float(found.low), float(found.high))


def share_interval(count: int, total: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share, `count` of `total` ≥ 1 independent trials."""
    found = stats.binomtest(count, total).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction; NaN entries are not counted and stay."""
    values = np.asarray(p_values, dtype=float)
    corrected = np.full(len(values), np.nan)
    order = [int(i) for i in np.argsort(values) if np.isfinite(values[i])]
    highest = 0.0
    for position, index in enumerate(order):
        highest = max(highest, min(1.0, float(values[index]) * (len(order) - position)))
        corrected[index] = highest
    return [float(value) for value in corrected]
