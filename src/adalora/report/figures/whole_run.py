"""Pictures with all modules together: budget, loss, metrics, scores, orthogonality; runs in common axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adalora.report.frames import allocations_frame, metrics_frame, start_of, steps_frame, thin
from adalora.report.history import History
from adalora.report.style import DASHES, GRID, INK, MUTED, PHASES, SERIES, axes_of, figure_of, styled

PHASE_NAMES = ("warm-up", "decrease", "final")


@styled
def plot_budget(history: History, *, ax: Axes | None = None) -> Figure:
    """Budget and live triplets over optimizer steps."""
    steps = thin(steps_frame(history)[["budget", "live"]])
    ax = axes_of(ax)
    ax.plot(steps.index, steps["budget"], drawstyle="steps-post", ls="--", label="budget", color=SERIES[1])
    ax.plot(steps.index, steps["live"], drawstyle="steps-post", label="live", color=SERIES[0])
    ax.set_ylim(bottom=0)
    ax.set_ylabel("triplets")
    return _over_steps(ax, history)


@styled
def plot_loss(history: History, *, ax: Axes | None = None) -> Figure:
    """Training loss over optimizer steps: each step's, and smoothed over about 2 % of the run."""
    loss = steps_frame(history)["loss"].dropna()
    ax = axes_of(ax)
    smooth = loss.ewm(span=max(2, len(loss) // 50)).mean()
    ax.plot(*_xy(thin(loss)), color=SERIES[5], lw=0.8, alpha=0.8, label="each step")
    ax.plot(*_xy(thin(smooth)), color=SERIES[0], label="smoothed")
    usual = float(loss.quantile(0.99)) if len(loss) else 0.0
    if len(loss) and loss.max() > 3 * usual > 0:  # a spike should not flatten all the rest
        ax.set_ylim(bottom=min(0.0, loss.min()), top=1.3 * usual)
    ax.set_ylabel("loss")
    return _over_steps(ax, history)


@styled
def plot_metrics(history: History, *, ax: Axes | None = None) -> Figure:
    """Every metric of every split over optimizer steps."""
    ax = axes_of(ax)
    groups = metrics_frame(history).groupby(["metric", "split"], sort=False)
    for i, ((metric, split), rows) in enumerate(groups):
        label = f"{metric} ({split})" if split else str(metric)
        ax.plot(rows["step"], rows["value"], marker="o", ms=3.5, label=label, color=_colour(i), ls=_dash(i))
    ax.set_ylabel("value")
    return _over_steps(ax, history)


@styled
def plot_scores(history: History, *, ax: Axes | None = None) -> Figure:
    """Distribution of all triplet scores at the newest allocation, with the threshold that was kept."""
    ax = axes_of(ax)
    record = next((r for r in reversed(history.of("allocation")) if (r.get("scores") or {}).get("histogram")), None)
    if record is None:
        return _empty(ax, "no allocation yet")
    scores, threshold = record["scores"], record.get("threshold")
    edges = 10.0 ** np.asarray(scores["edges_log10"], dtype=float)
    ax.stairs(scores["histogram"], edges, fill=True, color=SERIES[0], alpha=0.75, label="triplets")
    if threshold and threshold > 0:
        ax.axvline(threshold, color=SERIES[1], ls="--", label=f"threshold {threshold:.2g}")
    ax.set_xscale("log")
    ax.set_xlabel(f"score at step {record['step']:,}")
    ax.set_ylabel("triplets")
    ax.legend(loc="upper left")
    return figure_of(ax)


@styled
def plot_score_quantiles(history: History, *, ax: Axes | None = None) -> Figure:
    """Scores of all triplets over the allocations: median, middle half, 5-95 %, and the threshold."""
    ax = axes_of(ax)
    frame = thin(allocations_frame(history))
    frame = frame.where(frame.select_dtypes("number") > 0)  # a log axis has no zero
    if frame["score_q50"].notna().sum() == 0:
        return _empty(ax, "no allocation yet")
    ax.fill_between(
        frame.index, frame["score_q05"], frame["score_q95"], color=SERIES[5], alpha=0.3, lw=0, label="5-95 %"
    )
    ax.fill_between(
        frame.index, frame["score_q25"], frame["score_q75"], color=SERIES[0], alpha=0.4, lw=0, label="25-75 %"
    )
    ax.plot(frame.index, frame["score_q50"], color=SERIES[0], label="median")
    ax.plot(frame.index, frame["threshold"], color=SERIES[1], ls="--", label="threshold")
    ax.set_yscale("log")
    ax.set_ylabel("score")
    return _over_steps(ax, history)


@styled
def plot_churn(history: History, *, ax: Axes | None = None) -> Figure:
    """Triplets pruned and revived at each allocation."""
    ax = axes_of(ax)
    frame = thin(allocations_frame(history))
    ax.plot(frame.index, frame["pruned"], color=SERIES[0], drawstyle="steps-mid", label="pruned")
    ax.plot(frame.index, frame["revived"], color=SERIES[1], ls="--", drawstyle="steps-mid", label="revived")
    ax.set_ylim(bottom=0)
    ax.set_ylabel("triplets per allocation")
    return _over_steps(ax, history)


@styled
def plot_orthogonality(history: History, *, ax: Axes | None = None) -> Figure:
    """Distance of P and Q from orthonormal columns and rows, at each allocation and at the end."""
    ax = axes_of(ax)
    points = {r["step"]: r.get("orthogonality") for r in history if r["event"] in ("allocation", "finish")}
    values = thin(pd.Series(points, dtype=float).dropna())
    ax.plot(*_xy(values), color=SERIES[0], marker="o", ms=2.5, label="orthogonality error")
    if len(values) and (values > 0).all() and values.max() > 20 * values.min():
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    ax.set_ylabel("error")
    return _over_steps(ax, history, legend=False)


@styled
def plot_compared(
    series: Sequence[pd.Series],
    names: Sequence[str],
    *,
    ylabel: str,
    smooth: bool = False,
    ax: Axes | None = None,
) -> Figure:
    """One quantity of several runs over optimizer steps, told apart by colour and dash."""
    ax = axes_of(ax)
    for i, (values, name) in enumerate(zip(series, names)):
        values = values.dropna()
        if smooth:
            values = values.ewm(span=max(2, len(values) // 50)).mean()
        ax.plot(*_xy(thin(values)), color=_colour(i), ls=_dash(i), label=name)
    ax.set_ylabel(ylabel)
    ax.set_xlabel("optimizer step")
    ax.legend(loc="upper right")
    return figure_of(ax)


def _xy(values: pd.Series) -> tuple[Any, Any]:
    return values.index.to_numpy(), values.to_numpy()


def _colour(i: int) -> str:
    return SERIES[i % len(SERIES)]


def _dash(i: int) -> Any:
    return DASHES[i % len(DASHES)]


def _over_steps(ax: Axes, history: History, *, legend: bool = True) -> Figure:
    """What all pictures over time share: phases as bands with their names, axis label, legend."""
    start = start_of(history)
    total = start.get("total_steps") or max((r["step"] for r in history if "step" in r), default=1)
    bounds = [0, start.get("warmup_steps") or 0, start.get("decrease_end") or total, total]
    for left, right, colour, name in zip(bounds, bounds[1:], PHASES, PHASE_NAMES):
        if right > left:
            ax.axvspan(left, right, color=colour, lw=0, zorder=0)
            ax.annotate(
                name, ((left + right) / 2, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 2),
                textcoords="offset points", ha="center", va="bottom", fontsize=9.5, color=MUTED,
            )  # fmt: skip
    ax.set_xlim(0, total)
    ax.set_xlabel("optimizer step")
    if legend and ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper right")
    return figure_of(ax)


def _empty(ax: Axes, text: str) -> Figure:
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes, color=INK)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_color(GRID)
    return figure_of(ax)
