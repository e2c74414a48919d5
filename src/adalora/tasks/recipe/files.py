"""Recipes as YAML files: reading, overriding, variants, and the catalogue that comes with the package.

A recipe's name is its path below `adalora/recipes/` without the ending, e.g. `airline-sentiment` or
`paper/mnli`. A file may hold `variants:`, each a set of fields that replaces some of the file's own;
`paper/mnli:r2` is the variant `r2`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from adalora.errors import RecipeError
from adalora.tasks.recipe.fields import Recipe
from adalora.tasks.recipe.problems import suggest

# Fields that stand for an object when written as one text, so that `--set data.limit...` can reach into them.
_NAMED_PARTS = ("model", "task", "data")


class CatalogueEntry(NamedTuple):
    """One line of `adalora recipes`."""

    name: str
    task: str
    model: str
    description: str


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-3` is a number and a key that comes twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse duplicate keys, of which plain YAML silently keeps the last."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} comes twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def catalogue_folder() -> Path:
    """Folder of the recipes that come with the package."""
    return Path(str(resources.files("adalora"))) / "recipes"


def catalogue() -> list[CatalogueEntry]:
    """Every recipe that comes with the package, variants included, by name."""
    entries = []
    for path in sorted(catalogue_folder().rglob("*.yaml")):
        if path.parent.name == "suites":  # comparisons of recipes
            continue
        fields = read_yaml(path)
        name = path.relative_to(catalogue_folder()).with_suffix("").as_posix()
        for variant in [None, *fields.get("variants", {})]:
            merged = _with_variant(fields, variant, where=name)
            entries.append(
                CatalogueEntry(
                    name if variant is None else f"{name}:{variant}",
                    _part_name(merged.get("task")),
                    _part_name(merged.get("model")),
                    merged.get("description", ""),
                )
            )
    return entries


def load_recipe(source: str | Path, *, overrides: Iterable[str] = ()) -> Recipe:
    """Read one recipe.

    Args:
        source: A YAML file, or the name of a recipe of the catalogue; `:VARIANT` may follow.
        overrides: `a.b=value` texts; the value is read as YAML.

    Raises:
        RecipeError: No such file, not YAML, or a field is wrong.
    """
    path, variant = find_recipe(source)
    fields = _with_variant(read_yaml(path), variant, where=path.name)
    fields.setdefault("name", path.stem if variant is None else f"{path.stem}-{variant}")
    for text in overrides:
        apply_override(fields, text)
    return Recipe.parse(fields, where=path.name)


def find_recipe(source: str | Path) -> tuple[Path, str | None]:
    """The file and variant that a name or path stands for.

    Raises:
        RecipeError: There is none; names like it are given.
    """
    text = str(source)
    if Path(text).is_file():
        return Path(text), None
    stem, _, variant = text.rpartition(":") if ":" in text else (text, "", "")
    for candidate in (Path(stem), catalogue_folder() / f"{stem}.yaml"):
        if candidate.is_file():
            return candidate, variant or None
    if stem.endswith((".yaml", ".yml")):
        raise RecipeError(f"no recipe file {stem!r} here ({Path.cwd()})")
    names = [entry.name for entry in catalogue()]
    raise RecipeError(f"recipe {text!r}: {suggest(text, names, 'recipes')}")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        RecipeError: Not readable, not YAML (with the line), or not a mapping.
    """
    try:
        # The loader derives from SafeLoader: no object of any class is made.
        fields = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise RecipeError(f"{path}{line}: not YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(fields, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of fields such as model:, task:, data:")
    return fields


def apply_override(fields: dict[str, Any], text: str) -> None:
    """Set one field, in place, from `a.b=value`.

    Raises:
        RecipeError: The text is not of that form, or a part on the way holds a plain value.
    """
    path, equals, value = text.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise RecipeError(f"--set {text!r}: write it as part.field=value, e.g. --set training.learning_rate=1e-3")
    try:
        parsed = yaml.load(value, Loader=_Loader) if value.strip() else None
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {text!r}: the value is not YAML") from error
    target = fields
    for name in names[:-1]:
        inner = target.get(name)
        if isinstance(inner, str) and name in _NAMED_PARTS and target is fields:
            inner = {"name": inner}
        if inner is not None and not isinstance(inner, dict):
            raise RecipeError(f"--set {text!r}: {name}={inner!r} has no fields")
        target[name] = {} if inner is None else inner
        target = target[name]
    target[names[-1]] = parsed


def dump_recipe(recipe: Recipe) -> str:
    """YAML of the resolved recipe, every default spelled out."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True, width=100)


def _with_variant(fields: dict[str, Any], variant: str | None, *, where: str) -> dict[str, Any]:
    fields = copy.deepcopy(fields)
    variants = fields.pop("variants", {})
    if variant is None:
        return fields
    if variant not in variants:
        raise RecipeError(f"{where}: variant {variant!r}: {suggest(variant, variants, 'variants')}")
    changes = variants[variant]
    if "published" in changes:  # one result, not a mixture of two
        fields.pop("published", None)
    return _merge(fields, changes)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`; mappings are merged, everything else is replaced."""
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(base.get(name), dict):
            _merge(base[name], value)
        else:
            base[name] = value
    return base


def _part_name(part: Any) -> str:
    return str(part.get("name", "") if isinstance(part, dict) else part or "")
