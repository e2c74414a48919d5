"""`adalora report` and `adalora watch`: see what a run did or does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("report")(report)
    app.command("watch")(watch)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders or history.jsonl files.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File to write; default: report.html in the first run's folder."),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Folder for the data as CSV files as well.")] = None,
) -> None:
    """Write one self-contained HTML report of one run, or of several side by side."""
    from adalora.report import write
    from adalora.report.runs import load_runs
    from adalora.report.tables import write_csv

    typer.echo(f"report: {write(runs, out)}")
    if csv is not None:
        for run in load_runs(runs):
            for file in write_csv(run, csv):
                typer.echo(f"data: {file}")


def watch(
    run: Annotated[Path, typer.Argument(help="Run folder or history.jsonl; it need not exist yet.")],
    once: Annotated[bool, typer.Option("--once", help="Show what there is now and stop.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Show a running job: heatmap in blocks, budget, loss. Plain lines where there is no terminal."""
    from adalora.report.watch import watch as show

    show(run, once=once, interval=interval)
