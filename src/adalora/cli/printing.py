"""What commands print: JSON and tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import typer


def plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf"
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def echo_json(value: Any) -> None:
    """Print JSON."""
    typer.echo(json.dumps(plain(value), indent=2, ensure_ascii=False))


def show_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; long names are folded, not cut."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", highlight=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
