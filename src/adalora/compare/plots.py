"""Figures of a comparison: score against parameters, learning curves, score against learning rate."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adalora.compare.summary import Line, Summary
from adalora.report.style import DASHES, SERIES, new_figure, styled

MARKS = ("o", "s", "^", "D", "v", "P")


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
    lines = [x for x in summary.lines if x.task == task and x.budget in (0, budget) and x.tests]
    name = "dev_curve" if any(row.get("dev_curve") for x in lines for row in x.tests.values()) else "loss_curve"
    for number, method in enumerate(_methods(summary, lines)):
        line = next(x for x in lines if x.method == method)
        points = mean_curve(row.get(name) or [] for row in line.tests.values())
        if points:
            axes.plot(*zip(*points), label=method, **look(number, marker=len(points) == 1))
    axes.set(xlabel="optimizer step", ylabel=f"dev {_metric(lines)}" if name == "dev_curve" else "training loss")
    return _legend(figure, axes)


@styled
def plot_rates(summary: Summary, task: str, budget: int) -> Figure:
    """Mean dev score against the learning rate."""
    figure, axes = _axes(f"{task}: score against learning rate" + (f", rank {budget}" if budget else ""))
    lines = [x for x in summary.lines if x.task == task and x.budget in (0, budget) and x.dev]
    for number, method in enumerate(_methods(summary, lines)):
        line = next(x for x in lines if x.method == method)
        rates = sorted({row["learning_rate"] for row in line.dev})
        means = [statistics.fmean(r["score"] for r in line.dev if r["learning_rate"] == rate) for rate in rates]
        axes.plot(rates, means, label=method, **look(number, marker=True))
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
