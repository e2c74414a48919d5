"""The command line: `adalora …`. One module per group of commands, each thin: the work is done elsewhere."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from adalora.errors import AdaLoraError
from adalora.faults import storage_fault
from adalora.version import __version__

app = typer.Typer(
    name="adalora",
    help="Adaptive-rank fine-tuning on PEFT's LoRA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"adalora {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Adaptive-rank fine-tuning on PEFT's LoRA."""


def main() -> None:
    """Entry point: an AdaLoraError, or a full disk, becomes one line on stderr and exit code 2."""
    from adalora.cli import commands

    commands.register(app)
    try:
        app()
    except AdaLoraError as error:
        _end(str(error))
    except Exception as error:
        fault = storage_fault(error)
        if fault is None:
            raise
        file = getattr(error, "filename", None)
        _end(f"{file}: {fault}" if file else fault)


def _end(message: str) -> NoReturn:
    typer.secho(f"error: {message}", fg="red", err=True)
    sys.exit(2)
