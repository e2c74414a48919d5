"""A run's history as pandas frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from adalora.errors import HistoryError
from adalora.report.history import History, Record
from adalora.report.modules import place_modules

RANK_EVENTS = ("handover", "allocation", "compaction", "finish")
QUANTILES = ("min", "q05", "q25", "q50", "q75", "q95", "max")


def start_of(history: History) -> Record:
    """The `start` record.

    Raises:
        HistoryError: There is none, so nothing is known of the modules.
    """
    start = history.last("start")
    if start is None:
        raise HistoryError("this history has no `start` record: is it a history.jsonl that adalora wrote?")
    return start


def steps_frame(history: History) -> pd.DataFrame:
    """One row per recorded step: phase, budget, live, loss, learning_rate, seconds (NaN where unknown).

    The controller and the trainer's log may both record a step: they are merged, the newest value counts.
    """
    columns = ["step", "phase", "budget", "live", "loss", "learning_rate", "seconds"]
    frame = _numbers(pd.DataFrame(history.of("step"), columns=columns), keep=("phase",))
    return frame.groupby("step").last()


def allocations_frame(history: History) -> pd.DataFrame:
    """One row per allocation: budget, live, threshold, pruned, revived, score quantiles, orthogonality."""
    rows = []
    for record in history.of("allocation"):
        row = {k: v for k, v in record.items() if not isinstance(v, list | dict) and k != "event"}
        scores = record.get("scores") or {}
        row.update({f"score_{q}": scores.get(q) for q in QUANTILES})
        row["below_threshold"] = scores.get("below_threshold")
        rows.append(row)
    columns = [
        "step", "phase", "budget", "live", "threshold", "pruned", "revived", "orthogonality", "skipped_steps",
        *(f"score_{q}" for q in QUANTILES), "below_threshold",
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    frame = frame.reindex(columns=columns + [c for c in frame.columns if c not in columns])
    return _numbers(frame, keep=("phase",)).set_index("step")


def ranks_frame(history: History) -> pd.DataFrame:
    """Rank of every module over time: one row per record that changed ranks, one column per module.

    The first row, at step 0, holds the initial ranks; where several records share a step the newest counts.
    """
    modules = start_of(history)["modules"]
    rows = {0: [m["rank"] for m in modules]}
    for record in history:
        if record["event"] in RANK_EVENTS and record.get("ranks"):
            rows[int(record["step"])] = record["ranks"]
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=[m["name"] for m in modules]).sort_index()
    frame.index.name = "step"
    return frame


def module_scores_frame(history: History) -> pd.DataFrame:
    """Summed score of every module over time: one row per allocation, one column per module."""
    names = [m["name"] for m in start_of(history)["modules"]]
    records = [r for r in history.of("allocation") if r.get("module_scores")]
    values = np.array([[np.nan if s is None else s for s in r["module_scores"]] for r in records], dtype=float)
    frame = pd.DataFrame(values.reshape(len(records), len(names)), columns=names)
    frame.index = pd.Index([r["step"] for r in records], name="step")
    return frame


def modules_frame(history: History) -> pd.DataFrame:
    """One row per module: place, shape, initial and newest rank, parameters before and after, last score."""
    modules = start_of(history)["modules"]
    places = place_modules([m["name"] for m in modules])
    frame = pd.DataFrame(
        {
            "module": [p.name for p in places],
            "row": [p.row for p in places],
            "stack": [p.stack for p in places],
            "layer": pd.array([p.layer for p in places], dtype="Int64"),
            "type": [p.type for p in places],
            "d_out": [m["d_out"] for m in modules],
            "d_in": [m["d_in"] for m in modules],
            "groups": [m.get("groups", 1) for m in modules],
            "initial_rank": [m["rank"] for m in modules],
            "rank": newest_ranks(history),
        }
    )
    cost = np.array([m["parameters_per_triplet"] for m in modules])
    frame["initial_parameters"] = frame["initial_rank"] * cost
    frame["parameters"] = frame["rank"] * cost
    last = next((r for r in reversed(history.of("allocation")) if r.get("module_scores")), None)
    frame["score"] = pd.Series(last["module_scores"] if last else [None] * len(modules), dtype=float)
    return frame


def metrics_frame(history: History) -> pd.DataFrame:
    """One row per value: step, split, metric, value."""
    rows = [
        {"step": r["step"], "split": r.get("split", ""), "metric": name, "value": value}
        for r in history.of("metric")
        for name, value in (r.get("values") or {}).items()
        if isinstance(value, int | float)
    ]
    return pd.DataFrame(rows, columns=["step", "split", "metric", "value"])


def newest_ranks(history: History) -> list[int]:
    """Ranks in the order of `start.modules` as the newest record has them."""
    for record in reversed(history.records):
        if record["event"] in RANK_EVENTS and record.get("ranks"):
            return list(record["ranks"])
    return [m["rank"] for m in start_of(history)["modules"]]


def thin(data: Any, points: int = 1200) -> Any:
    """At most `points` rows, evenly spread, the first and the last among them."""
    if len(data) <= points:
        return data
    return data.iloc[np.unique(np.linspace(0, len(data) - 1, points).round().astype(int))]


def model_name(history: History) -> str:
    """Name of the model; of a local folder only the last two parts, which say what it is."""
    name = str(start_of(history).get("model") or "the model")
    parts = name.replace("\\", "/").split("/")
    return "/".join(parts[-2:]) if len(parts) > 2 else name


def _numbers(frame: pd.DataFrame, *, keep: tuple[str, ...]) -> pd.DataFrame:
    """JSON's null as NaN: every column but the kept ones becomes numeric."""
    for name in frame.columns:
        if name not in keep:
            frame[name] = pd.to_numeric(frame[name], errors="coerce")
    return frame


FRAMES: dict[str, Callable[[History], pd.DataFrame]] = {
    "steps": steps_frame,
    "allocations": allocations_frame,
    "ranks": ranks_frame,
    "module_scores": module_scores_frame,
    "modules": modules_frame,
    "metrics": metrics_frame,
}


def frame_of(history: History, name: str) -> pd.DataFrame:
    """One frame by name.

    Raises:
        HistoryError: No such frame.
    """
    if name not in FRAMES:
        raise HistoryError(f"no frame {name!r}; there are {', '.join(FRAMES)}")
    return FRAMES[name](history)


def to_frames(history: History) -> dict[str, Any]:
    """All frames of a run by name: steps, allocations, ranks, module_scores, modules, metrics."""
    return {name: frame(history) for name, frame in FRAMES.items()}
