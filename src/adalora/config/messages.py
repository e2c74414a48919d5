"""What a wrong setting is answered with, and how an amount is read."""

from __future__ import annotations

import difflib
import re
from typing import Any

from pydantic import ValidationError

AMOUNT = re.compile(r"(?P<number>\d+(\.\d*)?|\.\d+)\s*(?P<prefix>[kKMG]?)(?P<binary>i?)(?P<bytes>B?)")


def read_amount(text: str, *, of_bytes: bool) -> int:
    """`"0.3M"` -> 300000, `"1.2MB"` -> 1200000, `"1MiB"` -> 1048576."""
    found = AMOUNT.fullmatch(text.strip())
    if found is None or (not of_bytes and (found["binary"] or found["bytes"])):
        example = '"1.2MB" or 1_200_000' if of_bytes else '"0.3M" or 300_000'
        raise ValueError(f"is a number or a text such as {example}")
    base = 1024 if found["binary"] else 1000
    factor: int = base ** " KMG".index((found["prefix"] or " ").upper())
    return round(float(found["number"]) * factor)


def unknown_field(name: str, known: list[str]) -> str:
    """The answer to a field that does not exist, with the name that was probably meant."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(known)}"
    return f"AdaLoraConfig has no field {name!r}: {hint}"


def describe(error: ValidationError) -> str:
    """One part per wrong field: field, value, what is allowed. A union's branches are joined by "or"."""
    wrong: dict[str, tuple[Any, list[str]]] = {}
    for problem in error.errors():
        field = str(problem["loc"][0]) if problem["loc"] else ""
        wrong.setdefault(field, (problem["input"], []))[1].append(problem["msg"].removeprefix("Value error, "))
    return "; ".join(
        f"{field}={value!r}: {' or '.join(messages)}" if field else messages[0]
        for field, (value, messages) in wrong.items()
    )
