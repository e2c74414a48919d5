"""What a recipe's `task:` part may say: one class per task, told apart by `name`.

`ROLES` of each class lists the columns the task reads: the role's name, and whether it must be there.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """Base of all task options: immutable, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ROLES: ClassVar[dict[str, bool]] = {}


class Classification(Options):
    """One of several labels for a text, or for a pair of texts where `text_pair` is named.

    Attributes:
        labels: The labels in the order of the model's outputs; by default those of the training rows.
    """

    ROLES = {"text": True, "text_pair": False, "label": True}

    name: Literal["classification"]
    labels: list[str] | None = None


class SentencePair(Options):
    """One of several labels for two texts (inference, paraphrase, reranking).

    Attributes:
        labels: The labels in the order of the model's outputs; by default those of the training rows.
    """

    ROLES = {"text": True, "text_pair": True, "label": True}

    name: Literal["sentence-pair"]
    labels: list[str] | None = None


class MultiLabel(Options):
    """Any number of labels for a text; the `labels` column holds a list, or text joined by `separator`.

    Attributes:
        labels: The labels in the order of the model's outputs; by default those of the training rows.
        separator: Between labels where the column is text.
        threshold: A label is given where its probability is above this.
    """

    ROLES = {"text": True, "text_pair": False, "labels": True}

    name: Literal["multi-label"]
    labels: list[str] | None = None
    separator: str = ","
    threshold: float = Field(default=0.5, gt=0, lt=1)


class Regression(Options):
    """A number for a text or a pair of texts."""

    ROLES = {"text": True, "text_pair": False, "label": True}

    name: Literal["regression"]


TaskOptions: TypeAlias = Annotated[
    Classification | SentencePair | MultiLabel | Regression,
    Field(discriminator="name"),
]

TASKS: tuple[type[Options], ...] = (Classification, SentencePair, MultiLabel, Regression)


def task_names() -> list[str]:
    """Names that `task:` may have."""
    return [cls.model_fields["name"].annotation.__args__[0] for cls in TASKS]  # type: ignore[union-attr]
