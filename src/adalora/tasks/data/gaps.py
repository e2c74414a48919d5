"""Cells that hold nothing: an empty one of CSV, a null of JSON or Parquet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from adalora.errors import DataError
from adalora.tasks.recipe.fields import Recipe

SHOWN = 60  # characters of a row in a message
MAY_LACK = "labels"  # of several labels, a row may have none
CURE = 'drop or mend such rows; a text that is meant to be empty is "" in JSON lines or Parquet'


def refuse_gaps(recipe: Recipe, table: Any, split: str) -> None:
    """Refuse rows without text or label, before anything is trained.

    Args:
        recipe: Says which columns its task reads. Those that a template alone names may have gaps.
        table: Rows in memory, with the names of their roles.
        split: Its name.

    Raises:
        DataError: Names the column, the number of such rows, and one of them by its text.
    """
    for role in _full(recipe, table.column_names):
        if not table.data.column(role).null_count:
            continue
        arrow = table.with_format("arrow")[:]
        gaps = arrow[role].is_null().to_pylist()
        if any(gaps):  # of the rows that were chosen
            row = gaps.index(True)
            texts = [arrow[other][row].as_py() for other in arrow.column_names if other != role]
            raise DataError(_message(recipe.column(role), f"{sum(gaps)} of {len(gaps)} rows of {split}", texts))


def refuse_gaps_of_stream(recipe: Recipe, rows: dict[str, list[Any]]) -> None:
    """The same for rows of a stream, as they come.

    Raises:
        DataError: Names the column, and a row by its text.
    """
    for role in _full(recipe, rows):
        if None in rows[role]:
            texts = [others[rows[role].index(None)] for other, others in rows.items() if other != role]
            raise DataError(_message(recipe.column(role), "a row of the stream", texts))


def _full(recipe: Recipe, present: Iterable[str]) -> list[str]:
    return [role for role in recipe.roles if role in present and role != MAY_LACK]


def _message(column: str, where: str, texts: list[Any]) -> str:
    beside = next((f", beside {text[:SHOWN]!r}" for text in texts if isinstance(text, str) and text), "")
    return f"column {column!r} is empty in {where}{beside}: {CURE}"
