"""Which module brings which commands.

Modules import what they need inside the command, so that `adalora --help` stays quick.
"""

from __future__ import annotations

import importlib
import importlib.util

import typer

# Each has a function `register(app: typer.Typer) -> None`.
MODULES = ("train", "export", "compress", "report", "curve", "compare")


def register(app: typer.Typer) -> None:
    """Add every group of commands to the application."""
    for name in MODULES:
        if importlib.util.find_spec(f"adalora.cli.{name}"):
            importlib.import_module(f"adalora.cli.{name}").register(app)
