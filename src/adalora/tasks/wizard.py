"""A new recipe from a few answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from adalora.config import initial_rank
from adalora.errors import DataError, RecipeError
from adalora.tasks.data.rows import FORMATS, load_table_columns
from adalora.tasks.recipe.fields import Recipe
from adalora.tasks.recipe.options import TASKS, Options

# Roles of a causal language model that are used together; the first that the data have is taken.
CAUSAL_FORMS = (("messages",), ("prompt", "completion"), ("text",))


class Answers(NamedTuple):
    """What `adalora init` asks.

    Attributes:
        name: Of the recipe and its output folder.
        task: A task's name.
        model: Hub name, local folder or `package:…`.
        data: A local file, a built-in set or a hub name.
        columns: Role → column; empty where they have the same names.
        target_rank: Average rank at the end.
    """

    name: str
    task: str
    model: str
    data: str
    columns: dict[str, str]
    target_rank: int


def task_options(name: str) -> type[Options]:
    """The options class of a task."""
    return next(cls for cls in TASKS if name in cls.model_fields["name"].annotation.__args__)  # type: ignore[union-attr]


def is_file(data: str) -> bool:
    """Whether an answer means a local file rather than a name."""
    return Path(data).suffix in FORMATS


def guess_columns(task: str, columns: list[str]) -> dict[str, str | None]:
    """For each role that the task must have, the column that has its name, or None to be asked for."""
    roles = [role for role, needed in task_options(task).ROLES.items() if needed]
    if task == "causal-lm":
        roles = next((list(form) for form in CAUSAL_FORMS if set(form) <= set(columns)), ["prompt", "completion"])
    return {role: role if role in columns else None for role in roles}


def file_columns(path: str) -> list[str]:
    """Column names of a local file.

    Raises:
        DataError: There is no such file, or it cannot be read.
    """
    if not Path(path).is_file():
        raise DataError(f"no file {path!r} here ({Path.cwd()})")
    return load_table_columns(path)


def make_recipe(answers: Answers) -> dict[str, Any]:
    """A recipe's fields, valid, with what a beginner should see spelled out.

    Raises:
        RecipeError: An answer does not fit.
    """
    file = is_file(answers.data)
    data: dict[str, Any] = {"files": answers.data, "test_fraction": 0.1} if file else {"name": answers.data}
    columns = {
        role: column for role, column in answers.columns.items() if role != column or answers.task == "causal-lm"
    }
    if columns:
        data["columns"] = columns
    if answers.target_rank < 1:
        raise RecipeError(f"target_rank={answers.target_rank}: must be at least 1")
    fields: dict[str, Any] = {
        "name": answers.name,
        "description": f"{answers.task} with {answers.model}",
        "model": answers.model,
        "task": answers.task,
        "data": data,
        "lora": {
            "r": initial_rank(answers.target_rank),
            "lora_alpha": 2 * answers.target_rank,
            "target_modules": "all-linear",
        },
        "adalora": {"target_rank": answers.target_rank},
        "training": {"epochs": 3, "batch_size": 16, "learning_rate": 1e-3},
        "output": f"runs/{answers.name}",
    }
    Recipe.parse(fields, where="init")
    return fields


def to_yaml(fields: dict[str, Any]) -> str:
    """The text of the file."""
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=100)
