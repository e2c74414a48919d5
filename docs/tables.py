"""Writes the tables of `recipe-fields.md`, `commands.md` and `comparing.md`: python docs/tables.py.

Fields come from the pydantic models and their docstrings, commands from typer. A test says when a page is behind.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from adalora.cli import commands
from adalora.compare.files import read_suite
from adalora.config import AdaLoraConfig
from adalora.report.thresholds import DiagnosticThresholds
from adalora.tasks.recipe.fields import DataPart, ModelPart, Published, Recipe, TrainingPart
from adalora.tasks.recipe.files import catalogue_folder
from adalora.tasks.recipe.options import TASKS, Generation, task_names

DOCS = Path(__file__).parent
PARTS: dict[str, type[BaseModel]] = {
    "The recipe": Recipe,
    "`model:`": ModelPart,
    "`data:`": DataPart,
    "`training:`": TrainingPart,
    "`published:`": Published,
    **{f"`task: {name}`": cls for name, cls in zip(task_names(), TASKS)},
    "`task.generation:`": Generation,
    "`adalora:`": AdaLoraConfig,
    "`diagnostics:`": DiagnosticThresholds,
}
PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null", Any: "any value"}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def fields_page() -> str:
    """Every field of every part of a recipe."""
    return "\n\n".join(part for title, model in PARTS.items() for part in _model(title, model))


def commands_page() -> str:
    """Every argument and option of every command."""
    return "\n\n".join(part for name, called in registered().items() for part in _command(name, called))


def registered() -> dict[str, Callable[..., Any]]:
    """Command -> the function behind it."""
    app = typer.Typer()
    commands.register(app)
    return {found.name: found.callback for found in app.registered_commands if found.name and found.callback}


def _model(title: str, model: type[BaseModel]) -> Iterator[str]:
    told = described(model)
    yield f"## {title}"
    yield " ".join((inspect.getdoc(model) or "").split("\n\nAttributes:")[0].split())
    rows = []
    for name, field in model.model_fields.items():
        if name != "name" or model not in TASKS:  # the task's own name is its title
            default = "`runs/NAME`" if (model, name) == (Recipe, "output") else _default(field)  # set while parsing
            rows.append([f"`{name}`", _value(field), default, told[name]])
    if rows:
        yield table(["field", "value", "default", "what it says"], rows)
    else:
        yield "It has no fields of its own."


def described(model: type[BaseModel]) -> dict[str, str]:
    """The field's lines in the docstring's `Attributes:`."""
    lines = (inspect.getdoc(model) or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    name = ""
    for line in lines.splitlines():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name, found[start[1]] = start[1], start[2]
        elif line.startswith("        ") and name:
            found[name] += " " + line.strip()
        elif line.strip():
            break
    return found


def _value(field: FieldInfo) -> str:
    words = _kind(field.annotation)
    bounds = [f"{word} {getattr(m, key)}" for m in field.metadata for key, word in BOUNDS.items() if hasattr(m, key)]
    return f"{words}, {' and '.join(bounds)}" if bounds else words


def _kind(annotation: Any) -> str:
    """A type in words."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(inside[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin in (typing.Union, types.UnionType):
        if all(isinstance(part, type) and issubclass(part, BaseModel) for part in inside):
            return "a task, [below](#task-classification)"
        return " or ".join(dict.fromkeys(_kind(part) for part in inside))
    if origin in (list, tuple):
        return f"list of {_kind(inside[0])}"
    if origin is dict:
        return f"mapping of {_kind(inside[0])} to {_kind(inside[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"fields of [{annotation.__name__}](#{_anchor(annotation)})"
    return PLAIN[annotation]


def _anchor(model: type[BaseModel]) -> str:
    title = next(title for title, found in PARTS.items() if found is model)
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "all defaults"
    words = {None: "none", True: "true", False: "false", "": "empty"}
    value = list(value) if isinstance(value, tuple) else value
    plain = words.get(value, str(value)) if isinstance(value, str | bool | type(None)) else str(value)
    return plain if value is None or value == "" else f"`{plain}`"


def _command(name: str, called: Callable[..., Any]) -> Iterator[str]:
    yield f"## `adalora {name}`"
    yield " ".join((inspect.getdoc(called) or "").split())
    rows = list(parameters(called))
    yield table(["argument or option", "default", "what it does"], rows) if rows else "It takes no options."


def parameters(called: Callable[..., Any]) -> Iterator[list[str]]:
    """Name, default and help of each argument and option."""
    hints = typing.get_type_hints(called, include_extras=True)
    for name, parameter in inspect.signature(called).parameters.items():
        kind, info = typing.get_args(hints[name])
        several = list in (typing.get_origin(kind), *(typing.get_origin(part) for part in typing.get_args(kind)))
        told = info.help.rstrip(".") + (". May be repeated." if several and "repeat" not in info.help else ".")
        yield [_names(name, kind, info), _told(parameter.default), told]


def _names(name: str, kind: Any, info: Any) -> str:
    if isinstance(info, typer.models.ArgumentInfo):
        return f"`{name.upper()}`"
    given = [each for each in (info.default, *info.param_decls) if isinstance(each, str)]  # inside Annotated: all names
    spelt = [part for each in given or [f"--{name.replace('_', '-')}"] for part in each.split("/")]
    value = "" if kind is bool else f" {_metavar(kind)}"
    return ", ".join(f"`{option}{value}`" for option in spelt)


def _metavar(kind: Any) -> str:
    """What an option wants, as typer's own help has it."""
    inside = [part for part in typing.get_args(kind) if part is not type(None)]
    if inside:
        return _metavar(inside[0])
    return {str: "TEXT", float: "NUMBER", int: "N", Path: "PATH"}[kind]


def _told(default: Any) -> str:
    if default is inspect.Parameter.empty:
        return "must be given"
    words = {None: "none", True: "on", False: "off"}
    return words[default] if isinstance(default, bool | type(None)) else f"`{default}`"


def suites_table() -> str:
    """Every suite of the package."""
    rows = []
    for file in sorted((catalogue_folder() / "suites").glob("*.yaml")):
        suite = read_suite(file)
        named = [
            [part if isinstance(part, str) else part["name"] for part in suite[key]] for key in ("tasks", "methods")
        ]
        told = re.sub(r"^Experiment (\d): ", "", suite["description"])
        rows.append([f"`{file.stem}`", told[0].upper() + told[1:], *(", ".join(names) for names in named)])
    return table(["suite", "what it asks", "tasks", "methods"], rows)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


PAGES = {"recipe-fields.md": fields_page, "commands.md": commands_page, "comparing.md": suites_table}
START, END = "<!-- written by docs/tables.py -->", "<!-- end of what docs/tables.py has written -->"


def updated(page: Path) -> str:
    """The page with its tables made anew."""
    before, rest = page.read_text(encoding="utf-8").split(START)
    return f"{before}{START}\n\n{PAGES[page.name]()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    for name in PAGES:
        (DOCS / name).write_text(updated(DOCS / name), encoding="utf-8")
