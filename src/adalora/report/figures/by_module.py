"""Pictures with one panel or cell per module: ranks now, ranks over time, spectra."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator

from adalora.report.frames import modules_frame, ranks_frame, thin
from adalora.report.history import History
from adalora.report.style import CMAP, axes_of, figure_of, new_figure, styled


@styled
def plot_ranks(history: History, *, ax: Axes | None = None) -> Figure:
    """Rank of every module as a layer × module type heatmap, totals at the margins.

    Args:
        history: A run.
        ax: Where to draw; a new figure if None.
    """
    grid = rank_grid(modules_frame(history))
    rows, columns = grid.shape
    ax = axes_of(ax, max(4.0, 1.6 + 0.62 * columns), max(2.4, 1.2 + 0.24 * rows))
    image = ax.imshow(grid.to_numpy(dtype=float), cmap=CMAP, aspect="auto", vmin=0)
    top = max(float(np.nanmax(grid.to_numpy(dtype=float))), 1.0)
    if rows <= 48:
        for (i, j), value in np.ndenumerate(grid.to_numpy(dtype=float)):
            if np.isfinite(value):
                colour = "#000000" if value > 0.6 * top else "#ffffff"
                ax.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    every = max(1, rows // 32)
    across = [f"{t}\nΣ {s:.0f}" for t, s in zip(grid.columns, grid.sum())]
    ax.set_xticks(range(columns), across, rotation=35, ha="right", fontsize=8)
    ax.set_yticks(range(0, rows, every), [f"{r}  Σ {s:.0f}" for r, s in grid.sum(axis=1).items()][::every], fontsize=8)
    ax.grid(visible=False)
    ax.set_title(f"Rank of every module, {np.nansum(grid.to_numpy(dtype=float)):.0f} in all")
    figure_of(ax).colorbar(image, ax=ax, label="rank")
    return figure_of(ax)


@styled
def plot_ranks_over_time(history: History) -> Figure:
    """One small heatmap per module type: layers upwards, steps to the right, colour is the rank."""
    modules, ranks = modules_frame(history), thin(ranks_frame(history), 160)
    types = list(dict.fromkeys(modules["type"]))
    columns = 2 if len(types) > 1 else 1
    lines = -(-len(types) // columns)
    figure = new_figure(4.9, 0.5 + 1.35 * lines)
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
    top, edges, image = max(int(ranks.to_numpy().max()), 1), _edges(ranks.index, history), None
    for ax, kind in zip(axes, types):
        of_type = modules[modules["type"] == kind]
        rows = list(dict.fromkeys(of_type["row"]))
        summed = ranks[list(of_type["module"])].T.groupby(of_type["row"].to_numpy(), sort=False).sum().loc[rows]
        image = ax.pcolormesh(
            edges, np.arange(len(rows) + 1), summed.to_numpy(), cmap=CMAP, vmin=0, vmax=top, rasterized=True
        )
        ax.set_title(kind, fontsize=10)
        ticks = sorted({0, len(rows) // 2, len(rows) - 1})
        ax.set_yticks([t + 0.5 for t in ticks], [rows[t] for t in ticks], fontsize=9.5)
        ax.tick_params(axis="x", labelsize=9.5)
        ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        ax.grid(visible=False)
    for ax in axes[len(types) :]:
        ax.set_axis_off()
    if image is not None:
        figure.colorbar(image, ax=list(axes), location="bottom", label="rank", shrink=0.7, aspect=40, pad=0.01)
    return figure


@styled
def plot_singular_values(history: History) -> Figure:
    """Singular values of every module's final update, largest first: one panel per module type."""
    finish = history.last("finish")
    modules = modules_frame(history)
    values = (finish or {}).get("singular_values") or [[] for _ in range(len(modules))]
    types = list(dict.fromkeys(modules["type"]))
    columns = 2 if len(types) > 1 else 1
    lines = -(-len(types) // columns)
    figure = new_figure(4.9, 0.45 + 1.35 * lines)
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    order = {row: i for i, row in enumerate(dict.fromkeys(modules["row"]))}
    colours = mpl.colormaps[CMAP].resampled(256)
    norm = mpl.colors.Normalize(0, max(len(order) - 1, 1))
    for ax, kind in zip(axes, types):
        for at in np.flatnonzero(modules["type"] == kind):
            spectrum = sorted((abs(v) for v in values[at] if v), reverse=True)
            colour = colours(0.9 * norm(order[modules["row"].iloc[at]]))  # the last tenth is too pale on white
            # Hundreds of vector lines are heavier than one picture of them.
            ax.plot(range(1, len(spectrum) + 1), spectrum, color=colour, lw=1, rasterized=len(modules) > 150)
        ax.set_title(kind, fontsize=10)
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.tick_params(labelsize=9.5)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for ax in axes[len(types) :]:
        ax.set_axis_off()
    scale = mpl.cm.ScalarMappable(norm, mpl.colors.ListedColormap([colours(0.9 * x) for x in np.linspace(0, 1, 128)]))
    bar = figure.colorbar(scale, ax=list(axes), location="bottom", label="layer", shrink=0.7, aspect=40, pad=0.01)
    labels, ticks = list(order), sorted({0, (len(order) - 1) // 2, len(order) - 1})
    bar.set_ticks(ticks, labels=[labels[t] for t in ticks])
    return figure


def rank_grid(modules: pd.DataFrame, value: str = "rank") -> pd.DataFrame:
    """Layer × module type table of a column of `modules_frame`; modules that share a cell add up."""
    grid = modules.pivot_table(index="row", columns="type", values=value, aggfunc="sum", sort=False)
    return grid.reindex(index=list(dict.fromkeys(modules["row"])), columns=list(dict.fromkeys(modules["type"])))


def _edges(steps: pd.Index, history: History) -> np.ndarray:
    """Each column of a time heatmap reaches from its record to the next, the last one to the newest step."""
    end = max(float(r["step"]) for r in history if "step" in r) if len(history) > 1 else 0.0
    return np.append(steps.to_numpy(dtype=float), max(end, float(steps[-1]) + 1))
