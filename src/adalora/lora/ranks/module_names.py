"""What the config says about modules by name, for the modules that a model has."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from adalora.errors import ConfigError

Value = TypeVar("Value")


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern (`*`, `?`, `[…]`) is the whole name or its last dotted parts."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def by_name(option: str, given: Mapping[str, Value], names: Sequence[str]) -> list[Value | None]:
    """The value of each name: that of the first pattern that matches it, None where none does.

    Args:
        option: Field of the config, for the message.
        given: Pattern -> value.
        names: Modules or groups of the model.

    Raises:
        ConfigError: A pattern matches nothing.
    """
    for pattern in given:
        if not any(matches(pattern, name) for name in names):
            ends = [part for name in names for part in (name, name.split(".")[-1])]
            close = difflib.get_close_matches(pattern, ends, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the model has {', '.join(map(repr, names[:8]))}"
            raise ConfigError(f"{option}: nothing matches {pattern!r}: {hint}")
    return [next((value for pattern, value in given.items() if matches(pattern, name)), None) for name in names]


def limits(option: str, given: int | Mapping[str, int] | None, names: Sequence[str]) -> list[int | None]:
    """`min_rank` or `max_rank` of each module; None where it has none."""
    return by_name(option, given, names) if isinstance(given, Mapping) else [given] * len(names)
