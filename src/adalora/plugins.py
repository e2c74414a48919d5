"""Scores and schedules of other packages, found by entry point.

A package registers a function by name in its pyproject.toml:

    [project.entry-points."adalora.importance"]
    my-score = "my_package:score"

`AdaLoraConfig(importance="my-score")` then uses it. Nothing is imported before a config asks for the name.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Literal, TypeAlias

Group: TypeAlias = Literal["importance", "schedules"]


def names(group: Group) -> list[str]:
    """What is registered, by name."""
    return sorted({found.name for found in entry_points(group=f"adalora.{group}")})


def load(group: Group, name: str) -> Callable[..., Any] | None:
    """The function registered as `name`; None if there is none."""
    for found in entry_points(group=f"adalora.{group}", name=name):
        function: Callable[..., Any] = found.load()
        return function
    return None
