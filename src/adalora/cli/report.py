"""`adalora report` and `adalora watch`: see what a run did or does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("report")(report)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders or history.jsonl files.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File to write; default: report.html in the first run's folder."),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Folder for the data as CSV files as well.")] = None,
) -> None:
    """Write one self-contained HTML report of one run, or of several side by side."""
    from adalora.report.html import build_report
    from adalora.report.runs import load_runs
    from adalora.report.tables import write_csv

    loaded = load_runs(runs)
    first = runs[0] if runs[0].is_dir() else runs[0].parent
    path = build_report(
        [run.history for run in loaded], out or first / "report.html", names=[r.name for r in loaded]
    )
    typer.echo(f"report: {path}")
    if csv is not None:
        for run in loaded:
            for file in write_csv(run, csv):
                typer.echo(f"data: {file}")
