"""The tables of a comparison: for the terminal, for Markdown, for HTML."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from rich.table import Table

from adalora.compare.statistics import Interval, share_interval
from adalora.compare.summary import Line, Summary

COLUMNS = (
    "method", "parameters", "lr", "score", "difference", "wins–losses", "P(better)", "p (Holm)", "pace", "seconds",
    "verdict",
)  # fmt: skip


def tables(summary: Summary) -> Iterator[tuple[str, list[list[str]]]]:
    """Title and rows for each task and budget; methods without a size stand in each table of their task."""
    keys = dict.fromkeys((line.task, line.budget) for line in summary.lines if line.budget)
    sizeless = {line.task for line in summary.lines if not line.budget} - {task for task, _ in keys}
    for task, budget in [*keys, *((task, 0) for task in sorted(sizeless))]:
        chosen = [line for line in summary.lines if line.task == task and line.budget in (0, budget)]
        metric = next((line.metric for line in chosen if line.metric), "no score yet")
        arrow = "lower is better" if any(line.better < 0 for line in chosen) else "higher is better"
        size = f", target rank {budget}" if budget else ""
        yield f"{task}{size}: {metric} ({arrow})", [_row(summary, line) for line in chosen]


def overall(summary: Summary) -> list[list[str]]:
    """Over all tasks and budgets: method, mean difference with interval, comparisons, verdict, runs that kept pace."""
    return [
        [name, _gain(gain, digits=2, unit=" %"), str(count), gain.verdict, _kept_pace(summary, name)]
        for name, (gain, count) in summary.overall.items()
    ]


def _kept_pace(summary: Summary, method: str) -> str:
    """How many of a method's runs had the baseline's final dev score in no more steps, of those that can be told.

    Beside it the interval of the share, which holds a half for a method that is as good as the baseline.
    """
    lines = [line for line in summary.lines if line.method == method]
    kept, total = sum(line.kept_pace for line in lines), sum(len(line.pace) for line in lines)
    if not total:
        return ""
    low, high = share_interval(kept, total, confidence=summary.suite.confidence)
    return f"{kept} of {total} ({low:.0%} to {high:.0%})"


def pace(line: Line) -> str:
    """Median steps to the baseline's final dev score / the baseline's; how many seeds got there if not all."""
    if not line.pace:
        return ""
    mine = statistics.median(math.inf if steps is None else steps for steps, _ in line.pace)
    theirs = statistics.median(steps for _, steps in line.pace)
    if math.isinf(mine):
        return f"not reached / {theirs:g}"
    reached = sum(steps is not None for steps, _ in line.pace)
    few = "" if reached == len(line.pace) else f" ({reached} of {len(line.pace)} seeds)"
    return f"{mine:g} / {theirs:g}{few}"


def rich_tables(summary: Summary, *, wide: bool = True) -> Iterator[Table]:
    """All tables for a terminal; narrow ones leave out what only the report then has."""
    for title, rows in tables(summary):
        kept = [n for n, name in enumerate(COLUMNS) if wide or name not in WIDE_ONLY]
        yield _rich(title, tuple(COLUMNS[n] for n in kept), [[row[n] for n in kept] for row in rows])
    if summary.overall:
        yield _rich(f"mean over tasks, against {summary.suite.baseline}", OVERALL, overall(summary))


WIDE_ONLY = ("P(better)", "p (Holm)", "pace", "seconds", "parameters", "lr")
OVERALL = ("method", "difference in % of the score", "comparisons", "verdict", "runs that kept pace")


def sentences(summary: Summary) -> list[str]:
    """One sentence per comparison that shows no difference, or shows one."""
    found = []
    for line in summary.lines:
        if line.comparison is None:
            continue
        gain = line.comparison.difference
        where = f"{line.task}" + (f" at rank {line.budget}" if line.budget else "")
        found.append(f"{line.method} against {summary.suite.baseline} on {where}: {gain.verdict} ({_gain(gain)}).")
    return found


def number(value: float | None, digits: int = 4) -> str:
    """A number for a table; a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _row(summary: Summary, line: Line) -> list[str]:
    found = line.comparison
    score = number(line.mean())
    if not math.isnan(line.deviation):
        score += f" ± {line.deviation:.4f}"
    size = line.mean("parameters")
    verdict = found.difference.verdict if found else ("baseline" if line.method == summary.suite.baseline else "")
    return [
        line.method,
        "–" if math.isnan(size) else f"{size:,.0f}",
        "–" if line.rate is None else str(line.rate),
        score,
        _gain(found.difference) if found else "",
        f"{found.wins}–{found.losses}" if found else "",
        number(found.improvement, 2) if found else "",
        number(found.corrected, 3) if found else "",
        pace(line),
        number(line.mean("seconds"), 0),
        "; ".join(part for part in (verdict, line.trouble) if part),
    ]


def _gain(gain: Interval, *, digits: int = 4, unit: str = "") -> str:
    interval = "" if math.isnan(gain.low) else f" [{gain.low:+.{digits}f}, {gain.high:+.{digits}f}]"
    return f"{gain.mean:+.{digits}f}{unit}{interval}"


def _rich(title: str, columns: tuple[str, ...], rows: list[list[str]]) -> Table:
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in ("method", "verdict") else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
