"""From the rows of a suite to what the report says."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adalora.compare.cells import Results, cells_of_rate, dev_cells, groups, pick_rate, sign
from adalora.compare.statistics import Comparison, Interval, compare, holm, interval
from adalora.compare.suite import Rate, Suite, task_name


@dataclass(frozen=True, kw_only=True)
class Line:
    """One method on one task at one budget.

    Attributes:
        task: Its name.
        budget: Target rank; 0 where the method has no size.
        method: Its name.
        metric: What is compared; empty while nothing was measured.
        better: 1 where a higher score is better, else -1.
        rate: As picked on dev; None while it is not.
        tests: Rows of the test cells that have a score, by seed.
        dev: Rows of the dev cells that have a score.
        trouble: What did not work, in words.
        comparison: Against the baseline on the common seeds.
        pace: Steps until the dev score was at least what the baseline ends with, and the baseline's steps until then,
            on each common seed; None where that was never reached.
    """

    task: str
    budget: int
    method: str
    metric: str = ""
    better: int = 1
    rate: Rate | None = None
    tests: dict[int, dict[str, Any]] = field(default_factory=dict)
    dev: list[dict[str, Any]] = field(default_factory=list)
    trouble: str = ""
    comparison: Comparison | None = None
    pace: list[tuple[int | None, int]] = field(default_factory=list)

    @property
    def scores(self) -> list[float]:
        """Test scores in the order of the seeds."""
        return [self.tests[seed]["score"] for seed in sorted(self.tests)]

    def mean(self, name: str = "score") -> float:
        """Mean over the test cells; NaN without any."""
        values = [row[name] for row in self.tests.values() if row.get(name) is not None]
        return statistics.fmean(values) if values else float("nan")

    @property
    def kept_pace(self) -> int:
        """How many of the runs in `pace` had the baseline's final dev score in no more steps."""
        return sum(mine is not None and mine <= theirs for mine, theirs in self.pace)

    @property
    def deviation(self) -> float:
        """Standard deviation of the scores; NaN with fewer than two."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else float("nan")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A suite's outcome.

    Attributes:
        suite: What was wanted.
        lines: By task, budget and method.
        overall: Method → interval of the mean difference over the tasks and budgets that it shares with the baseline,
            in percent of the baseline's mean score, so that tasks with different metrics weigh the same.
        done: Cells with an outcome.
        environments: Machines and versions that the rows were made on.
    """

    suite: Suite
    lines: list[Line]
    overall: dict[str, tuple[Interval, int]]
    done: int
    environments: list[str]


def summarize(suite: Suite, results: Results) -> Summary:
    """Put a suite's results together."""
    lines = [_line(suite, group, results) for group in groups(suite)]
    lines = [_against_baseline(suite, line, lines) for line in lines]
    compared = [n for n, line in enumerate(lines) if line.comparison is not None]
    corrected = holm([lines[n].comparison.p_value for n in compared])  # type: ignore[union-attr]
    for n, value in zip(compared, corrected):
        comparison = dataclasses.replace(lines[n].comparison, corrected=value)  # type: ignore[type-var]
        lines[n] = dataclasses.replace(lines[n], comparison=comparison)
    rows = [row for line in lines for row in [*line.tests.values(), *line.dev]]
    kinds = {
        f"{row['machine']}; " + ", ".join(f"{k} {v}" for k, v in row["versions"].items())
        for row in rows
        if "machine" in row
    }
    return Summary(
        suite=suite,
        lines=lines,
        overall={method.name: gain for method in suite.methods if (gain := _overall(suite, method.name, lines))},
        done=len(rows),
        environments=sorted(kinds),
    )


def baseline_of(suite: Suite, line: Line, lines: list[Line]) -> Line | None:
    """The baseline on the same task at the same budget; methods without a size meet the largest."""
    found = [other for other in lines if other.method == suite.baseline and other.task == line.task]
    if line.budget:
        found = [other for other in found if other.budget in (0, line.budget)]
    return max(found, key=lambda other: other.budget, default=None)


def paired(line: Line, base: Line) -> tuple[list[float], list[float]]:
    """Scores on the common seeds, better is higher."""
    seeds = sorted(set(line.tests) & set(base.tests))
    return [line.better * line.tests[s]["score"] for s in seeds], [base.better * base.tests[s]["score"] for s in seeds]


def mean_size(scores: list[float]) -> float:
    """The size of their mean, by which differences of any metric can be divided."""
    return max(abs(statistics.fmean(scores)), 1e-12)


def _line(suite: Suite, group: Any, results: Results) -> Line:
    task, budget, method = group
    rate = pick_rate(suite, *group, results=results)
    dev = results.of(dev_cells(suite, *group))
    tests = results.of(cells_of_rate(suite, *group, rate=rate)) if rate is not None else []
    good = [row for row in [*tests, *dev] if row["status"] == "ok"]
    errors = {
        f"{row['status']}: {row.get('error', 'no finite score')}" for row in [*tests, *dev] if row["status"] != "ok"
    }
    return Line(
        task=task_name(task),
        budget=budget,
        method=method.name,
        metric=good[0]["metric"] if good else "",
        better=sign(good[0], task) if good else 1,
        rate=rate,
        tests={row["seed"]: row for row in tests if row["status"] == "ok"},
        dev=[row for row in dev if row["status"] == "ok"],
        trouble="; ".join(sorted(errors)),
    )


def _against_baseline(suite: Suite, line: Line, lines: list[Line]) -> Line:
    base = baseline_of(suite, line, lines)
    if base is None or line.method == suite.baseline:
        return line
    mine, theirs = paired(line, base)
    if not mine:
        return line
    return dataclasses.replace(
        line, comparison=compare(mine, theirs, confidence=suite.confidence), pace=_pace(line, base)
    )


def _pace(line: Line, base: Line) -> list[tuple[int | None, int]]:
    """By seed, the first evaluation that is as good as the baseline's last one."""
    found = []
    for seed in sorted(set(line.tests) & set(base.tests)):
        curves = [each.tests[seed].get("dev_curve") or [] for each in (line, base)]
        if not all(curves):
            continue
        goal = line.better * curves[1][-1][1]
        mine, theirs = (next((s for s, score in c if line.better * score >= goal), None) for c in curves)
        found.append((mine, theirs or curves[1][-1][0]))
    return found


def _overall(suite: Suite, method: str, lines: list[Line]) -> tuple[Interval, int] | None:
    """Mean difference in percent of the baseline's mean score, tasks and budgets weighing the same."""
    gains = []
    for line in lines:
        base = baseline_of(suite, line, lines)
        if line.method != method or base is None or method == suite.baseline:
            continue
        mine, theirs = paired(line, base)
        if mine:
            gains.append(100 * np.subtract(mine, theirs) / mean_size(theirs))
    return (interval(gains, confidence=suite.confidence), len(gains)) if gains else None
