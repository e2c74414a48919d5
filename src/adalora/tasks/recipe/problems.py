"""Words for what is wrong with a recipe: the field, the value, what is allowed."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError


def suggest(name: str, known: Iterable[str], what: str) -> str:
    """`unknown; did you mean …?`, or the list of what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"unknown; did you mean {close[0]!r}?"
    return f"unknown; {what}: {', '.join(names)}"


def describe(error: ValidationError, root: type[BaseModel]) -> str:
    """All problems of one validation, one line each: field path, value, what is allowed."""
    lines = [_line(problem, root) for problem in error.errors(include_url=False)]
    return "; ".join(dict.fromkeys(lines)) if len(lines) < 3 else "\n  ".join(["", *dict.fromkeys(lines)])


def _line(problem: Any, root: type[BaseModel]) -> str:
    location, owner = _walk(problem["loc"], root)
    path = ".".join(location)
    kind, value = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        known = owner.model_fields if owner is not None else []
        return f"{path}: {suggest(location[-1], known, 'fields here')}"
    if kind == "missing":
        return f"{path}: missing; add it"
    message = problem["msg"].removeprefix("Value error, ")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        context = problem.get("ctx", {})
        allowed = context.get("expected_tags", "")
        return f"{path}.name={context.get('tag')!r}: allowed: {allowed}" if allowed else f"{path}.name: missing; add it"
    if kind == "value_error":
        return message if not path or message.startswith((path, "AdaLoraConfig")) else f"{path}: {message}"
    return f"{path}={value!r}: {message[0].lower()}{message[1:]}"


def _walk(parts: tuple[int | str, ...], root: type[BaseModel]) -> tuple[list[str], type[BaseModel] | None]:
    """Drop the steps that pydantic adds for unions; find the class that the last step is a field of."""
    path: list[str] = []
    owner: type[BaseModel] | None = root
    candidates: list[type[BaseModel]] = [root]
    for part in parts:
        tag = next((c for c in candidates if _tag(c) == part), None) if len(candidates) > 1 else None
        if tag is not None:
            candidates = [tag]
            continue
        if isinstance(part, str) and not part.isidentifier() and path and "[" in part:
            continue
        if isinstance(part, str) and part in ("int", "float", "str", "bool") and candidates != [root]:
            continue
        owner = candidates[0] if candidates else None
        path.append(str(part))
        field = next((c.model_fields[str(part)] for c in candidates if str(part) in c.model_fields), None)
        candidates = list(_models(field.annotation)) if field is not None else []
    return path, owner


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("name")
    arguments = typing.get_args(field.annotation) if field is not None else ()
    return arguments[0] if len(arguments) == 1 and isinstance(arguments[0], str) else None


def _models(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        for argument in typing.get_args(annotation):
            yield from _models(argument)
