"""Suites as YAML files: finding, extending and checking them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic

from adalora.compare.suite import Suite
from adalora.errors import RecipeError
from adalora.tasks.recipe.files import catalogue_folder, read_yaml
from adalora.tasks.recipe.problems import describe, suggest

OWN = ("name", "description", "output")  # what a suite never takes from the one that it extends


def load_suite(source: str | Path, *, output: str | None = None) -> Suite:
    """Read a suite and check every recipe that it names.

    Args:
        source: A YAML file, or the name of a suite that comes with the package (`core`, `smoke`). What it leaves out
            is as in the suite that its `extends` names, but for name, description and output.
        output: Folder in place of the suite's.

    Raises:
        RecipeError: No such file, not YAML, or a field is wrong.
    """
    path = find_suite(source)
    fields = read_suite(path)
    fields.setdefault("name", path.stem)
    fields.setdefault("output", f"runs/compare-{fields['name']}")
    if output is not None:
        fields["output"] = output
    try:
        suite = Suite.model_validate(fields)
    except pydantic.ValidationError as error:
        raise RecipeError(f"{path.name}: {describe(error, Suite)}") from error
    for task in suite.tasks:
        suite.recipe(task)
    return suite


def read_suite(path: Path, *, through: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A suite's fields, with those that it leaves out from the suite that it extends.

    Raises:
        RecipeError: No such file, or not YAML.
    """
    fields = read_yaml(path)
    base = fields.pop("extends", None)
    if base is None:
        return fields
    through = (*through, path.resolve())
    beside = path.parent / str(base)
    try:
        found = find_suite(beside if beside.is_file() else str(base))
        if found.resolve() in through:
            raise RecipeError(f"extends={base!r} leads back to a suite that is being read")
        inherited = read_suite(found, through=through)
    except RecipeError as error:
        raise RecipeError(f"{path.name}: extends: {error}") from error
    return {name: value for name, value in inherited.items() if name not in OWN} | fields


def find_suite(source: str | Path) -> Path:
    """The file that a name or path stands for.

    Raises:
        RecipeError: There is none.
    """
    path = Path(source)
    if path.is_file():
        return path
    folder = catalogue_folder() / "suites"
    if (folder / f"{source}.yaml").is_file():
        return folder / f"{source}.yaml"
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    raise RecipeError(f"suite {str(source)!r}: {suggest(str(source), known, 'suites')}; or give a YAML file")
