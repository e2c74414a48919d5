"""Tables of the report: modules, rank heatmap, settings, and the CSV files it hands out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from adalora.report.frames import (
    allocations_frame,
    metrics_frame,
    model_name,
    module_scores_frame,
    modules_frame,
    ranks_frame,
    start_of,
    steps_frame,
    thin,
)
from adalora.report.history import History
from adalora.report.runs import NamedRun, write_atomically
from adalora.report.style import SHADES, shade

FRAMES = 48  # positions of the slider over time
CSV_CELLS = 60_000  # a frame of scores larger than this is thinned in the page: digits do not compress


def modules_table(history: History) -> pd.DataFrame:
    """`modules_frame` with each module's share of the budget and its largest and smallest singular value."""
    modules = modules_frame(history)
    modules["share"] = 100 * modules["rank"] / max(int(modules["rank"].sum()), 1)
    sizes = [[abs(v) for v in row if v] for row in spectra(history)]
    modules["largest"] = [max(s, default=np.nan) for s in sizes]
    modules["smallest"] = [min(s, default=np.nan) for s in sizes]
    return modules


def spectra(history: History) -> list[list[float]]:
    """Singular values per module from the `finish` record; empty lists before it."""
    values = (history.last("finish") or {}).get("singular_values")
    return values or [[] for _ in start_of(history)["modules"]]


def heatmap(history: History, modules: pd.DataFrame) -> dict[str, Any]:
    """Layer × type cells with totals, and the ranks at each position of the slider.

    A cell adds up the modules that share it, e.g. the experts of a layer.
    """
    ranks = thin(ranks_frame(history), FRAMES)
    rows, types = list(dict.fromkeys(modules["row"])), list(dict.fromkeys(modules["type"]))
    members = {at: list(part.index) for at, part in modules.groupby(["row", "type"])}
    values = ranks.to_numpy()
    top = max(int(values[:, m].sum(1).max()) for m in members.values()) or 1

    def cell(row: str, kind: str) -> dict[str, Any] | None:
        inside = members.get((row, kind))
        if inside is None:
            return None
        rank = int(values[-1, inside].sum())
        title = modules["module"].iloc[inside[0]] if len(inside) == 1 else f"{len(inside)} modules {kind}"
        return {
            "value": rank,
            "shade": shade(rank, top),
            "members": ",".join(map(str, inside)),
            "title": title,
        }

    frames = {"steps": [int(s) for s in ranks.index], "ranks": values.tolist(), "top": top, "shades": SHADES}
    return {
        "rows": [
            {
                "name": row,
                "cells": [cell(row, kind) for kind in types],
                "total": int(modules.loc[modules["row"] == row, "rank"].sum()),
            }
            for row in rows
        ],
        "types": types,
        "totals": [int(modules.loc[modules["type"] == kind, "rank"].sum()) for kind in types],
        "total": int(modules["rank"].sum()),
        "top": top,
        "shades": [round(SHADES * i / 24) for i in range(25)],
        "frames": json.dumps(frames, separators=(",", ":")),
        "last_step": int(ranks.index[-1]),
        "positions": len(ranks),
    }


def settings(history: History) -> list[dict[str, Any]]:
    """Groups of names and values: the run's plan, settings, versions, machine."""
    start = start_of(history)
    plan = ("total_steps", "warmup_steps", "decrease_end", "initial_budget", "target_budget")
    groups = {
        "Run": {"model": model_name(history), **{name: start.get(name) for name in plan}},
        "Settings": start.get("config"),
        "Versions": {"adalora": start.get("version"), **(start.get("versions") or {})},
        "Machine": start.get("machine"),
    }
    return [
        {"title": title, "rows": [(k, _plain(v)) for k, v in values.items() if v is not None]}
        for title, values in groups.items()
        if values
    ]


def csv_frames(history: History) -> dict[str, pd.DataFrame]:
    """All data of a run as frames ready for CSV, by name; empty ones are left out."""
    modules = modules_table(history)
    columns = [f"sigma_{i + 1}" for i in range(max(len(row) for row in spectra(history)))]
    padded = [row + [np.nan] * (len(columns) - len(row)) for row in spectra(history)]
    frames = {
        "modules": modules.set_index("module"),
        "steps": steps_frame(history),
        "allocations": allocations_frame(history),
        "ranks": ranks_frame(history),
        "module-scores": module_scores_frame(history),
        "metrics": metrics_frame(history).set_index("step"),
        "singular-values": pd.DataFrame(padded, index=modules["module"], columns=columns, dtype=float),
    }
    return {name: frame for name, frame in frames.items() if frame.size}


def small_csv_frames(history: History) -> dict[str, pd.DataFrame]:
    """`csv_frames`, the module scores thinned out where they would make the page heavy."""
    frames = csv_frames(history)
    if "module-scores" in frames:
        scores = frames["module-scores"]
        frames["module-scores"] = thin(scores, max(2, CSV_CELLS // scores.shape[1]))
    return frames


def to_csv(frame: pd.DataFrame) -> str:
    """CSV text with six significant digits."""
    return frame.to_csv(float_format="%.6g")


def write_csv(run: NamedRun, folder: str | os.PathLike[str]) -> list[Path]:
    """Write every frame of `csv_frames` as `<run>-<name>.csv`; returns the files."""
    written = []
    for name, frame in csv_frames(run.history).items():
        path = Path(folder) / f"{run.name}-{name}.csv".replace("/", "_")
        write_atomically(path, to_csv(frame))
        written.append(path)
    return written


def _plain(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)
