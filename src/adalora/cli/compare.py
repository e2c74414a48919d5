"""`adalora compare`: methods side by side on the same tasks, budgets, learning rates and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

WIDE = 140  # columns that the whole table takes
SUITES = ", ".join(sorted(file.stem for file in (Path(__file__).parents[1] / "recipes" / "suites").glob("*.yaml")))

if TYPE_CHECKING:
    from adalora.compare.cells import Cell
    from adalora.compare.suite import Suite


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compare")(compare)


def compare(
    suite: Annotated[str, typer.Argument(help=f"A YAML file, or a suite of the package: {SUITES}.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of results and report.")] = None,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Workers that share the cores.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print cells and estimated time, train nothing.")] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="Report what there is, train nothing.")] = False,
) -> None:
    """Compare methods fairly: the same budget, steps, learning rates and seeds; go on where it was stopped."""
    from rich.console import Console

    from adalora.compare.cells import RESULTS, Results
    from adalora.compare.files import load_suite
    from adalora.compare.report import write_report
    from adalora.compare.running import quiet, run_suite
    from adalora.compare.summary import summarize
    from adalora.compare.tables import rich_tables

    console = Console()
    found = load_suite(suite, output=None if out is None else str(out))
    if dry_run:
        _show_plan(console, found, processes)
        return
    quiet()
    if report_only:
        results = Results(found.folder / RESULTS)
    else:
        results = run_suite(found, processes=processes, report=lambda cell, row: _show(console, cell, row))
    summary = summarize(found, results)
    for table in rich_tables(summary, wide=console.width >= WIDE):
        console.print(table)
    for path in write_report(summary, found.folder):
        typer.echo(f"wrote {path}")


def _show(console: Any, cell: Cell, row: dict[str, Any]) -> None:
    outcome = f"{row['metric']} {row['score']:.4f}" if row["status"] == "ok" else f"{row['status']}: {row['error']}"
    console.print(f"{cell.label}  {outcome}  {row['seconds']:.0f} s", highlight=False, markup=False)


def _show_plan(console: Any, suite: Suite, processes: int) -> None:
    from rich.table import Table

    from adalora.compare.cells import RESULTS, Results
    from adalora.compare.running import planned

    plan = planned(suite, Results(suite.folder / RESULTS))
    table = Table("cell", "done", "seconds", title=f"{suite.name}: {len(plan)} cells", title_justify="left")
    for cell, done, seconds in plan:
        table.add_row(cell.label, "yes" if done else "", "" if seconds is None else f"{seconds:.0f}")
    console.print(table)
    left = [seconds for _, done, seconds in plan if not done]
    known = sum(seconds for seconds in left if seconds is not None)
    unknown = sum(seconds is None for seconds in left)
    words = f"{len(left)} cells to run, about {known / 60:.1f} minutes of one process"
    if processes > 1:
        words += f"; {processes} processes share the same cores, so count on little less"
    if unknown:
        words += f", and {unknown} cells of unknown length (no cell of their task has run)"
    console.print(words, highlight=False)
