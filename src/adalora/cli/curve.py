"""`adalora curve`: what a finished adapter is worth at every budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from adalora.tasks.runs.curve import CurvePoint


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("curve")(curve)


def curve(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run of adalora train.")],
    data: Annotated[
        str | None, typer.Option("--data", help="File with rows to measure on; by default the run's held-out rows.")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Of the run's data: validation, test or train.")] = None,
    order: Annotated[
        str | None,
        typer.Option("--order", help="score, sensitivity or energy: what is cut first. Default: score if recorded."),
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option("--budget", help="Share of the parameters; repeat it. Default: 0.1 to 1, or 1.5."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for curve.json, .svg, .png; default: RUN.")] = None,
) -> None:
    """Measure a finished run's adapter cut to 10 … 100 % of its budget, and draw score against parameters.

    Above 100 % pruned triplets come back, frozen as they were when they were pruned.
    """
    from adalora.cli.train import _quiet
    from adalora.tasks.runs.curve import budget_curve, write_curve

    def show(point: CurvePoint) -> None:
        scores = "  ".join(f"{name} {value:.4f}" for name, value in point.scores.items())
        back = f"  ({point.revived:,} pruned ones back)" if point.revived else ""
        typer.echo(
            f"{point.budget:5.0%}  {point.parameters:>10,} parameters  {point.triplets:>6,} triplets  {scores}{back}"
        )

    _quiet()
    found = budget_curve(run, data=data, split=split, order=order, budgets=budget or None, progress=show)
    typer.echo(f"cut by {found.order.name}, measured on {found.rows:,} rows ({found.split})")
    if found.note:
        typer.echo(found.note)
    files = write_curve(found, out or run)
    for file in files:
        typer.echo(f"wrote {file}")
    typer.echo(f"to cut there: adalora export {run / 'adapter'} OUT --budget 0.5 --curve {files[0]}")
