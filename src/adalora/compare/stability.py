"""How steadily the runs of a method trained: their loss, their dev score, and what their allocation took back."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from adalora.compare.summary import Line, Summary

STABILITY = ("method", "loss variance", "dev drop", "revived / pruned", "ranks")


def loss_variance(row: dict[str, Any]) -> float | None:
    """Variance of the logged loss in the second half of a run around its trend: half that of successive differences.

    The estimator of von Neumann et al. 1941: a slow fall of the loss does not count, a jumping loss does.

    Returns:
        None with fewer than three logged values in that half.
    """
    losses = [loss for _, loss in row.get("loss_curve") or []]
    half = losses[len(losses) // 2 :]
    return float(np.mean(np.square(np.diff(half)))) / 2 if len(half) > 2 else None


def dev_drop(row: dict[str, Any], better: int) -> float | None:
    """Mean loss of dev score from an evaluation to the next, rises counted as 0; None with fewer than two."""
    scores = [better * score for _, score in row.get("dev_curve") or []]
    return float(np.mean(np.maximum(-np.diff(scores), 0.0))) if len(scores) > 1 else None


def stability(summary: Summary) -> list[tuple[str, list[list[str]]]]:
    """Title and rows for each task and budget with curves: means over the seeds."""
    found: dict[str, list[list[str]]] = {}
    for line in summary.lines:
        row = _row(line)
        if any(row[1:]):
            size = f", target rank {line.budget}" if line.budget else ""
            found.setdefault(f"{line.task}{size}", []).append(row)
    return list(found.items())


def _row(line: Line) -> list[str]:
    rows = list(line.tests.values())
    pruned, revived = (sum(row.get(name) or 0 for row in rows) for name in ("pruned", "revived"))
    ranks = [rank for row in rows for rank in (row.get("ranks") or {}).values()]
    return [
        line.method,
        _mean([loss_variance(row) for row in rows]),
        _mean([dev_drop(row, line.better) for row in rows]),
        f"{revived} / {pruned}" if pruned else "",
        f"{min(ranks)} to {max(ranks)}" if ranks else "",
    ]


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.2g}" if known else ""
