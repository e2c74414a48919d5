"""Do several runs agree on where the rank belongs?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd

from adalora.errors import HistoryError
from adalora.report.frames import newest_ranks, start_of
from adalora.report.history import History


@dataclass(frozen=True)
class Agreement:
    """How far the newest ranks of several runs agree; means over all pairs of runs.

    Attributes:
        ranks: One row per module, one column per run.
        correlation: Spearman correlation; None where no pair has one (all modules alike).
        shared: Share of the triplets that two runs put into the same module.
        expected: The same share if each run dealt out its ranks to the modules at random.
        spread: Standard deviation of a module's rank between runs, mean over modules.
    """

    ranks: pd.DataFrame
    correlation: float | None
    shared: float
    expected: float
    spread: float


def rank_agreement(histories: Sequence[History], names: Sequence[str] | None = None) -> Agreement:
    """Compare the newest ranks of runs that adapt the same modules.

    Raises:
        HistoryError: Fewer than two runs, or runs with different modules.
    """
    if len(histories) < 2:
        raise HistoryError(f"{len(histories)} run: an agreement needs at least two")
    modules = [[m["name"] for m in start_of(h)["modules"]] for h in histories]
    for at, other in enumerate(modules[1:], start=2):
        if set(other) != set(modules[0]):
            only = sorted(set(other) ^ set(modules[0]))
            raise HistoryError(f"run {at} does not adapt the same modules as run 1: {only[0]} is in one of them only")
    columns = list(names) if names is not None else [f"run {i + 1}" for i in range(len(histories))]
    parts = [pd.Series(newest_ranks(h), index=own) for h, own in zip(histories, modules)]
    ranks = pd.concat(parts, axis=1, keys=columns)
    table = ranks.to_numpy(dtype=float)
    pairs = list(combinations(range(table.shape[1]), 2))
    with np.errstate(invalid="ignore", divide="ignore"):  # a run with equal ranks correlates with nothing
        matrix = ranks.rank().corr().to_numpy()
    correlations = [matrix[i, j] for i, j in pairs if np.isfinite(matrix[i, j])]
    return Agreement(
        ranks=ranks,
        correlation=float(np.mean(correlations)) if correlations else None,
        shared=float(np.mean([_shared(table[:, i], table[:, j]) for i, j in pairs])),
        expected=float(np.mean([_expected(table[:, i], table[:, j]) for i, j in pairs])),
        spread=float(table.std(axis=1, ddof=1).mean()),
    )


def _shared(first: np.ndarray, second: np.ndarray) -> float:
    total = max(first.sum(), second.sum())
    return float(np.minimum(first, second).sum() / total) if total else 1.0


def _expected(first: np.ndarray, second: np.ndarray) -> float:
    """Mean of `_shared` over all pairings of the two runs' ranks."""
    total = max(first.sum(), second.sum())
    return float(np.minimum.outer(first, second).mean() * len(first) / total) if total else 1.0
