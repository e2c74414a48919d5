"""Checks of single recipe fields that need more than a type."""

from __future__ import annotations

import dataclasses
import importlib.util
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pydantic

from adalora.config.presets import PRESETS, with_preset
from adalora.errors import RecipeError
from adalora.tasks.recipe.options import CausalLM
from adalora.tasks.recipe.problems import suggest

SplitName: TypeAlias = Literal["train", "validation", "test"]
# Names under which sources keep each split, best first.
SPLIT_NAMES: dict[SplitName, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "dev", "valid", "val"),
    "test": ("test",),
}
PACKAGE_PREFIX = "package:"
# Set by the runner or meaningless in training.
_LORA_RESERVED = ("task_type", "peft_type", "base_model_name_or_path", "inference_mode", "auto_mapping", "revision")


def check_split_files(files: Iterable[str], splits: dict[SplitName, str | None]) -> None:
    """Every file of `data.files` must be read as some split.

    Args:
        files: Names that the files have there.
        splits: The recipe's `data.splits`.

    Raises:
        ValueError: A name is of no split, so that its rows would be left out unseen.
    """
    known = {name for names in SPLIT_NAMES.values() for name in names} | {name for name in splits.values() if name}
    for name in files:
        if name not in known:
            raise ValueError(f"data.files.{name}: {suggest(name, known, 'splits')}")


def check_stream(splitting: dict[str, float | str | None]) -> None:
    """A stream is never whole in memory, so that no rows can be taken out of it.

    Args:
        splitting: Field → value of what would take rows out.

    Raises:
        ValueError: One of them is given.
    """
    given = [name for name, value in splitting.items() if value]
    if given:
        what = ", ".join(f"data.{name}={splitting[name]!r}" for name in given)
        undo = " ".join(f"--set data.{name}={'null' if name == 'group_by' else 0}" for name in given)
        raise ValueError(
            f"{what}: no rows can be taken out of a stream (data.streaming=true): {undo}, and name held-out rows by "
            "themselves, as in data.files={train: train.jsonl, test: test.jsonl}"
        )


def check_causal_columns(task: CausalLM, named: set[str]) -> None:
    """A causal language model reads one of three forms of rows: the recipe must say which.

    Raises:
        ValueError: It names none of them, or a mixture.
    """
    forms = [{"completion"}] if task.template is not None else [{"text"}, {"prompt", "completion"}, {"messages"}]
    if named not in forms:
        allowed = " or ".join(" and ".join(sorted(form, reverse=True)) for form in forms)
        raise ValueError(
            f"data.columns of causal-lm must name {allowed}; it names {', '.join(sorted(named)) or 'none'}"
        )


def preset_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """What `preset` in the recipe's part `adalora` stands for, under the fields that are given beside it.

    Raises:
        ValueError: No such preset.
    """
    fields = dict(fields)
    name = fields.pop("preset", None)
    if name is None:
        return fields
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}: {suggest(str(name), PRESETS, 'presets')}")
    return with_preset(PRESETS[name], fields)


def resolve_model_name(name: str) -> str:
    """Turn `package:PACKAGE/FOLDER` into that folder, without importing the package.

    Raises:
        RecipeError: No such package, or no such folder in it.
    """
    if not name.startswith(PACKAGE_PREFIX):
        return name
    package, _, folder = name.removeprefix(PACKAGE_PREFIX).partition("/")
    if not package.isidentifier():
        raise RecipeError(f"model.name={name!r}: after 'package:' comes a top-level package, then '/' and a folder")
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise RecipeError(
            f"model.name={name!r}: the package {package!r} is not installed: pip install {package.replace('_', '-')}"
        )
    for root in spec.submodule_search_locations or []:
        if (path := Path(root) / folder).is_dir():
            return str(path)
    raise RecipeError(f"model.name={name!r}: the package {package!r} has no folder {folder!r}")


def check_lora_fields(value: dict[str, Any]) -> dict[str, Any]:
    """Check names, types and ranges of `peft.LoraConfig` fields.

    Raises:
        ValueError: The message names the field and what is allowed.
    """
    from peft import LoraConfig

    value = dict(value)
    known = {f.name for f in dataclasses.fields(LoraConfig)} - set(_LORA_RESERVED)
    hints = typing.get_type_hints(LoraConfig)
    for name, given in list(value.items()):
        if name in _LORA_RESERVED:
            raise ValueError(f"lora.{name} is set by adalora: leave it out")
        if name not in known:
            raise ValueError(f"lora.{name}: {suggest(name, known, 'fields of peft.LoraConfig')}")
        try:
            adapter = pydantic.TypeAdapter(hints[name])
        except pydantic.errors.PydanticSchemaGenerationError:
            continue  # a class of peft's own, which peft checks
        try:
            value[name] = adapter.validate_python(given)
        except pydantic.ValidationError as error:
            raise ValueError(f"lora.{name}={given!r}: {error.errors()[0]['msg'].lower()}") from error
    if value.get("r", 8) < 1:
        raise ValueError(f"lora.r={value['r']}: must be at least 1")
    if not 0 <= value.get("lora_dropout", 0.0) < 1:
        raise ValueError(f"lora.lora_dropout={value['lora_dropout']}: must be at least 0 and below 1")
    LoraConfig(**value)  # what peft itself refuses, such as contradictory fields
    return value
