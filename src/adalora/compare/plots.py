"""Figures of a comparison: differences, score against parameters, learning curves, score against learning rate."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adalora.compare.suite import Rate
from adalora.compare.summary import Line, Summary, baseline_of, mean_size, paired
from adalora.report.style import DASHES, MUTED, SERIES, new_figure, styled

MARKS = ("o", "s", "^", "D", "v", "P")


@styled
def plot_differences(summary: Summary) -> Figure:
    """Difference to the baseline of every method on every task: the mean with its interval, and each seed.

    In percent of the baseline's mean score, so that tasks with different metrics share an axis; right is better.
    """
    lines = [line for line in summary.lines if line.comparison is not None]
    figure = new_figure(7.0, 1.1 + 0.3 * max(len(lines), 1))
    axes = figure.add_subplot()
    methods = _methods(summary, lines)
    who = f"{methods[0]}: difference" if len(methods) == 1 else "Difference"
    axes.set_title(f"{who} to {summary.suite.baseline}, with {summary.suite.confidence:.0%} intervals; dots are seeds")
    axes.axvline(0, color=MUTED, linewidth=1)
    for row, line in enumerate(lines):
        seeds, mean, low, high = _percent(summary, line)
        colour = look(methods.index(line.method), marker=False)["color"]
        axes.plot(seeds, [row] * len(seeds), color=colour, marker="o", linestyle="", markersize=4, fillstyle="none")
        if len(seeds) > 1:
            axes.plot([low, high], [row, row], color=colour, linestyle="-")
        axes.plot([mean], [row], color=colour, marker="D", linestyle="", markersize=6)
    axes.set_yticks(range(len(lines)), [_name(line, lines) for line in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set(xlabel=f"percent of the score of {summary.suite.baseline}; right is better")
    return figure


@styled
def plot_parameters(summary: Summary, task: str) -> Figure:
    """Mean test score against the parameters in use at the end, one line per method."""
    figure, axes = _axes(f"{task}: score against parameters")
    lines = [line for line in summary.lines if line.task == task and line.tests]
    for number, method in enumerate(_methods(summary, lines)):
        mine = sorted((x for x in lines if x.method == method), key=lambda x: x.mean("parameters"))
        sizes = [max(line.mean("parameters"), 1.0) for line in mine]
        errors = [line.deviation if len(line.tests) > 1 else 0.0 for line in mine]
        axes.errorbar(
            sizes, [line.mean() for line in mine], yerr=errors, label=method, capsize=2, **look(number, marker=True)
        )
    axes.set(xscale="log", xlabel="trained parameters without head", ylabel=_metric(lines))
    return _legend(figure, axes)


@styled
def plot_curves(summary: Summary, task: str, budget: int) -> Figure:
    """Dev score over steps where it was measured, else the training loss; mean over seeds."""
    figure, axes = _axes(f"{task}: learning curves" + (f", rank {budget}" if budget else ""))
    _draw_curves(axes, summary, task, budget)
    return _legend(figure, axes)


@styled
def plot_all_curves(summary: Summary, columns: int = 3) -> Figure:
    """`plot_curves` of every task and budget on which methods can be compared, side by side."""
    counts = Counter((line.task, line.budget) for line in summary.lines if line.budget and line.tests)
    panels = [panel for panel, count in counts.items() if count > 1 or max(counts.values()) == 1]
    columns = max(1, min(columns, len(panels)))
    rows = -(-len(panels) // columns)
    figure = new_figure(max(5.6, 3.1 * columns), 0.7 + 2.4 * max(rows, 1))
    handles: dict[str, Any] = {}
    for number, (task, budget) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.set_title(f"{task}, rank {budget}")
        _draw_curves(axes, summary, task, budget)
        handles |= {text: handle for handle, text in zip(*axes.get_legend_handles_labels())}
    if handles:
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=2 + columns)
    return figure


def _draw_curves(axes: Axes, summary: Summary, task: str, budget: int) -> None:
    lines = [x for x in summary.lines if x.task == task and x.budget in (0, budget) and x.tests]
    name = "dev_curve" if any(row.get("dev_curve") for x in lines for row in x.tests.values()) else "loss_curve"
    for number, method in enumerate(_methods(summary, lines)):
        line = next(x for x in lines if x.method == method)
        points = mean_curve(row.get(name) or [] for row in line.tests.values())
        if points:
            axes.plot(*zip(*points), label=method, **look(number, marker=len(points) == 1))
    axes.set(xlabel="optimizer step", ylabel=f"dev {_metric(lines)}" if name == "dev_curve" else "training loss")


@styled
def plot_rates(summary: Summary, task: str, budget: int) -> Figure:
    """Mean dev score against the learning rate."""
    figure, axes = _axes(f"{task}: score against learning rate" + (f", rank {budget}" if budget else ""))
    lines = [x for x in summary.lines if x.task == task and x.budget in (0, budget) and x.dev]
    curves: dict[tuple[str, float | None], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for method in _methods(summary, lines):
        for row in next(x for x in lines if x.method == method).dev:
            rate = Rate.of(row)
            curves[method, rate.head][rate.learning_rate].append(row["score"])
    for number, ((method, head), points) in enumerate(curves.items()):
        means = sorted((rate, statistics.fmean(scores)) for rate, scores in points.items())
        name = method if head is None else f"{method}, head {head:g}"
        axes.plot(*zip(*means), label=name, **look(number, marker=True))
    axes.set(xscale="log", xlabel="learning rate", ylabel=f"dev {_metric(lines)}")
    return _legend(figure, axes)


def mean_curve(curves: Iterable[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Mean value at every step that all curves have."""
    found: list[dict[float, float]] = [dict(curve) for curve in curves]
    common = set.intersection(*map(set, found)) if found else set()
    return [(step, statistics.fmean(curve[step] for curve in found)) for step in sorted(common)]


def look(number: int, *, marker: bool) -> dict[str, Any]:
    """Colour, dash and marker: more methods than colours stay apart."""
    turn = number // len(SERIES)
    style: dict[str, Any] = {"color": SERIES[number % len(SERIES)], "linestyle": DASHES[turn % len(DASHES)]}
    return style | ({"marker": MARKS[(number + turn) % len(MARKS)], "markersize": 4} if marker else {})


def _percent(summary: Summary, line: Line) -> tuple[list[float], float, float, float]:
    """The seeds' differences, their mean and its interval, in percent of the baseline's mean score."""
    base = baseline_of(summary.suite, line, summary.lines)
    assert base is not None
    assert line.comparison is not None
    mine, theirs = paired(line, base)
    unit = mean_size(theirs) / 100
    found = line.comparison.difference
    return [(a - b) / unit for a, b in zip(mine, theirs)], found.mean / unit, found.low / unit, found.high / unit


def _name(line: Line, lines: list[Line]) -> str:
    """What tells a line from the others: task, rank and method, as far as there are several."""
    parts = {
        line.task: len({x.task for x in lines}) > 1,
        f"rank {line.budget}": line.budget > 0 and len({x.budget for x in lines}) > 1,
        line.method: len({x.method for x in lines}) > 1,
    }
    return ", ".join(text for text, told in parts.items() if told) or line.method


def _methods(summary: Summary, lines: list[Line]) -> list[str]:
    present = {line.method for line in lines}
    return [method.name for method in summary.suite.methods if method.name in present]


def _metric(lines: list[Line]) -> str:
    return next((line.metric for line in lines if line.metric), "score")


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = new_figure(6.4, 3.6)
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def _legend(figure: Figure, axes: Axes) -> Figure:
    if axes.get_legend_handles_labels()[1]:
        figure.legend(loc="outside right upper")
    return figure
