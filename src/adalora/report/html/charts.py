"""Charts of the report: each a picture as inline SVG with a table of its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from adalora.report import figures
from adalora.report.frames import (
    allocations_frame,
    metrics_frame,
    modules_frame,
    ranks_frame,
    steps_frame,
    thin,
)
from adalora.report.history import History
from adalora.report.runs import NamedRun
from adalora.report.style import to_svg

TABLE_ROWS = 24
_QUANTILES = ["score_q05", "score_q25", "score_q50", "score_q75", "score_q95"]


@dataclass(frozen=True)
class Chart:
    """One picture and its numbers.

    Attributes:
        key: Id of its element, unique on the page.
        title: Heading.
        svg: The picture.
        note: A sentence on how to read it, or nothing.
        columns: Column names of the table; empty if there is none.
        rows: At most `TABLE_ROWS` rows, evenly spread.
        all_rows: How many rows there are in all.
    """

    key: str
    title: str
    svg: Markup
    note: str
    columns: list[str]
    rows: list[list[object]]
    all_rows: int


def make_chart(title: str, figure: Figure, *, key: str, table: pd.DataFrame | None = None, note: str = "") -> Chart:
    """Chart of a figure; the table's index becomes its first column."""
    columns: list[str] = []
    rows: list[list[object]] = []
    if table is not None:
        shown = thin(table, TABLE_ROWS).reset_index()
        columns = [str(name) for name in shown.columns]
        rows = shown.astype(object).where(shown.notna(), None).to_numpy().tolist()
    svg = Markup(to_svg(figure, label=f"{title}: chart, its numbers follow", key=key))
    return Chart(key, title, svg, note, columns, rows, 0 if table is None else len(table))


def time_chart(history: History, key: str) -> Chart:
    """Rank over time, one panel per module type."""
    types = modules_frame(history)["type"].to_numpy()
    return make_chart(
        "Rank over time",
        figures.plot_ranks_over_time(history),
        key=f"{key}-time",
        table=ranks_frame(history).T.groupby(types, sort=False).sum().T,
        note="One panel per module type, layers upwards, steps to the right.",
    )


def run_charts(history: History, key: str) -> list[Chart]:
    """All other charts of a run; those without data are left out."""
    return [
        *_step_charts(history, key),
        *_allocation_charts(history, key),
        *_spectrum_charts(history, key),
    ]


def compared_charts(runs: Sequence[NamedRun]) -> list[Chart]:
    """Loss, live rank and metrics of several runs in common axes."""
    names = [run.name for run in runs]
    frames = [steps_frame(run.history) for run in runs]
    losses, live = [f["loss"] for f in frames], [f["live"] for f in frames]
    charts = []
    if any(loss.notna().any() for loss in losses):
        figure = figures.plot_compared(losses, names, ylabel="loss, smoothed", smooth=True)
        charts.append(make_chart("Loss", figure, key="all-loss", table=_joined(losses, names)))
    figure = figures.plot_compared(live, names, ylabel="triplets")
    charts.append(make_chart("Live rank", figure, key="all-live", table=_joined(live, names)))
    metrics = [metrics_frame(run.history) for run in runs]
    kinds = dict.fromkeys(kind for frame in metrics for kind in zip(frame["metric"], frame["split"]))
    for i, (metric, split) in enumerate(list(kinds)[:4]):
        title = f"{metric} ({split})" if split else metric
        series = [f[(f["metric"] == metric) & (f["split"] == split)].groupby("step")["value"].last() for f in metrics]
        figure = figures.plot_compared(series, names, ylabel=title)
        charts.append(make_chart(title, figure, key=f"all-metric{i}", table=_joined(series, names)))
    return charts


def _joined(series: Sequence[pd.Series], names: Sequence[str]) -> pd.DataFrame:
    return pd.concat(series, axis=1, keys=names).sort_index().rename_axis(index="step")


def _step_charts(history: History, key: str) -> list[Chart]:
    steps, metrics = steps_frame(history), metrics_frame(history)
    charts = []
    if len(steps):
        table = steps[["phase", "budget", "live"]]
        figure = figures.plot_budget(history)
        charts.append(make_chart("Budget and live rank", figure, key=f"{key}-budget", table=table))
    if steps["loss"].notna().any():
        table = steps.loc[steps["loss"].notna(), ["phase", "loss", "learning_rate"]]
        charts.append(make_chart("Loss", figures.plot_loss(history), key=f"{key}-loss", table=table))
    if len(metrics):
        label = metrics["metric"] + metrics["split"].map(lambda split: f" ({split})" if split else "")
        table = metrics.assign(label=label).pivot_table(
            index="step", columns="label", values="value", aggfunc="last", sort=False
        )
        figure = figures.plot_metrics(history)
        charts.append(make_chart("Metrics", figure, key=f"{key}-metrics", table=table.sort_index()))
    return charts


def _allocation_charts(history: History, key: str) -> list[Chart]:
    allocations = allocations_frame(history)
    if not len(allocations):
        return []
    charts = [
        make_chart(
            "Scores and threshold",
            figures.plot_scores(history),
            key=f"{key}-scores",
            table=_histogram(history),
            note="All triplets by importance at the newest allocation; left of the threshold: pruned.",
        ),
        make_chart(
            "Scores over time",
            figures.plot_score_quantiles(history),
            key=f"{key}-quantiles",
            table=allocations[["threshold", *_QUANTILES]],
        ),
        make_chart(
            "Pruned and revived",
            figures.plot_churn(history),
            key=f"{key}-churn",
            table=allocations[["budget", "live", "pruned", "revived"]],
        ),
    ]
    if allocations["orthogonality"].notna().any():
        charts.append(
            make_chart(
                "Orthogonality error",
                figures.plot_orthogonality(history),
                key=f"{key}-orthogonality",
                table=allocations[["orthogonality"]],
                note="How far P's columns and Q's rows are from orthonormal.",
            )
        )
    return charts


def _spectrum_charts(history: History, key: str) -> list[Chart]:
    finish = history.last("finish")
    if not finish or not any(finish.get("singular_values") or []):
        return []
    return [
        make_chart(
            "Singular values",
            figures.plot_singular_values(history),
            key=f"{key}-spectra",
            note="Every module's final update, largest first; a flat line uses its whole rank. "
            "The numbers are in the module table and in the CSV.",
        )
    ]


def _histogram(history: History) -> pd.DataFrame:
    """Score ranges of the newest allocation and how many triplets each holds."""
    scores = (history.last("allocation") or {}).get("scores") or {}
    edges = 10.0 ** np.asarray(scores.get("edges_log10") or [], dtype=float)
    table = pd.DataFrame({"from": edges[:-1], "to": edges[1:], "triplets": scores.get("histogram") or []})
    return table.set_index("from")
