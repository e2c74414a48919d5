"""The picture of a budget curve: score against parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adalora.report.style import DASHES, SERIES, axes_of, figure_of, styled

Point = tuple[float, float]


@styled
def plot_curve(
    curves: Mapping[str, Sequence[Point]],
    *,
    metric: str,
    split: str,
    whole: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Score of an adapter cut to several budgets.

    Args:
        curves: Name -> points (LoRA parameters, score).
        metric: Name of the score.
        split: Rows it was measured on.
        whole: Parameters of the trained adapter, where points lie beyond it; a line marks it.
        ax: Where to draw; a new figure if None.
    """
    ax = axes_of(ax, 5.6, 3.4)
    for number, (name, points) in enumerate(curves.items()):
        x, y = zip(*sorted(points))
        colour, dash = SERIES[number % len(SERIES)], DASHES[number % len(DASHES)]
        ax.plot(x, y, marker="o", ms=4, label=name, color=colour, ls=dash)
    ax.set_xlim(left=0)
    if whole is not None:
        ax.axvline(whole, ls=":", lw=1, color="0.5")
        ax.annotate(
            "pruned ones back →", (whole, 0.03), xycoords=("data", "axes fraction"), xytext=(3, 0),
            textcoords="offset points", fontsize="x-small", color="0.4",
        )  # fmt: skip
    ax.set_xlabel("LoRA parameters")
    ax.set_ylabel(f"{metric} ({split})")
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_title("One training, every budget")
    if len(curves) > 1:
        ax.legend(loc="center right")
    return figure_of(ax)
