"""What the report's template is given."""

from __future__ import annotations

import base64
import gzip
from typing import Any

import pandas as pd
from markupsafe import Markup

from adalora.errors import HistoryError
from adalora.report.agreement import rank_agreement
from adalora.report.diagnostics import diagnose_seeds, findings_of
from adalora.report.frames import metrics_frame, modules_frame, steps_frame
from adalora.report.history import History
from adalora.report.html.charts import compared_charts, run_charts, time_chart
from adalora.report.runs import NamedRun
from adalora.report.summary import summarize
from adalora.report.tables import heatmap, modules_table, settings, small_csv_frames, to_csv


def run_context(run: NamedRun, *, key: str) -> dict[str, Any]:
    """Everything the template shows of one run; `key` keeps its element ids apart from other runs'."""
    history = run.history
    modules, findings = modules_table(history), findings_of(history)
    heat = heatmap(history, modules)
    return {
        "key": key,
        "name": run.name,
        "summary": summarize(history, findings),
        "findings": findings,
        "facts": facts(history, modules),
        "heatmap": {**heat, "frames": Markup(heat["frames"])},
        "time_chart": time_chart(history, key),
        "charts": run_charts(history, key),
        "modules": modules.astype(object).where(modules.notna(), None).to_dict("records"),
        "top_rank": max(int(modules["initial_rank"].max()), int(modules["rank"].max()), 1),
        "settings": settings(history),
        "downloads": _downloads(history, name=run.name, key=key),
    }


def compared_context(runs: list[NamedRun], contexts: list[dict[str, Any]]) -> dict[str, Any]:
    """What the template shows of several runs together."""
    columns = list(dict.fromkeys(fact["label"] for context in contexts for fact in context["facts"]))
    rows = []
    for context in contexts:
        values = {fact["label"]: fact["value"] for fact in context["facts"]}
        rows.append({"name": context["name"], "key": context["key"], "values": [values.get(c) for c in columns]})
    return {"charts": compared_charts(runs), "columns": columns, "rows": rows, "agreement": _agreement(runs)}


def _agreement(runs: list[NamedRun]) -> dict[str, Any] | None:
    """Do the runs put the rank in the same places? None where they adapt different modules."""
    histories = [run.history for run in runs]
    try:
        agreement = rank_agreement(histories, [run.name for run in runs])
    except HistoryError:
        return None
    apart = agreement.ranks.max(axis=1) - agreement.ranks.min(axis=1)
    labels = modules_frame(histories[0]).set_index("module")
    return {
        "values": agreement,
        "findings": diagnose_seeds(histories),
        "apart": [
            {
                "row": labels["row"][name],
                "type": labels["type"][name],
                "ranks": agreement.ranks.loc[name].tolist(),
            }
            for name in apart.sort_values(ascending=False, kind="stable").index[:8]
        ],
    }


def facts(history: History, modules: pd.DataFrame) -> list[dict[str, Any]]:
    """Label, value and the value before (or None), for the tiles and for the table of several runs."""
    cuts = history.of("compaction") or [{}]  # one, or one for each stage
    start, done = cuts[0], cuts[-1]
    newest = history.last("finish") or history.last("allocation") or {}
    loss = steps_frame(history)["loss"].dropna()
    steps = [r["step"] for r in history if "step" in r]
    rows: list[tuple[str, Any, Any]] = [
        ("Rank, all modules", int(modules["rank"].sum()), int(modules["initial_rank"].sum())),
        ("Modules at rank 0", int((modules["rank"] == 0).sum()), None),
        ("Adapter parameters", int(modules["parameters"].sum()), int(modules["initial_parameters"].sum())),
        ("Adapter bytes", done.get("bytes_after"), start.get("bytes_before")),
        ("Optimizer bytes", done.get("optimizer_bytes_after"), start.get("optimizer_bytes_before")),
        ("Loss, last 5 %", loss.iloc[-max(1, len(loss) // 20) :].mean() if len(loss) else None, None),
    ]
    for (metric, split), part in list(metrics_frame(history).groupby(["metric", "split"], sort=False))[:3]:
        rows.append((f"{metric} ({split})" if split else str(metric), part["value"].iloc[-1], None))
    rows += [
        ("Orthogonality error", newest.get("orthogonality"), None),
        ("Newest step", max(steps, default=None), None),
        ("Seconds", history.records[-1].get("seconds"), None),
    ]
    return [{"label": label, "value": value, "before": before} for label, value, before in rows]


def _downloads(history: History, *, name: str, key: str) -> list[dict[str, Any]]:
    """The CSV files, compressed, for the page to hand out."""
    return [
        {
            "id": f"{key}-csv-{title}",
            "file": f"{name}-{title}.csv",
            "title": title,
            "data": base64.b64encode(gzip.compress(to_csv(frame).encode(), mtime=0)).decode(),
            "rows": len(frame),
        }
        for title, frame in small_csv_frames(history).items()
    ]
