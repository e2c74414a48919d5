"""What every task does: load a model and its processor, turn rows into features, measure."""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from transformers import AutoTokenizer, EvalPrediction, Trainer

from adalora.errors import DataError, RecipeError
from adalora.tasks.data.gaps import refuse_gaps_of_stream
from adalora.tasks.data.rows import Splits, columns_of
from adalora.tasks.recipe.fields import Recipe

# Task name → "module:class" below `adalora.tasks.kinds`; modules are imported when their task is used.
REGISTRY = {
    "classification": "sequence:SequenceTask",
    "sentence-pair": "sequence:SequenceTask",
    "multi-label": "sequence:SequenceTask",
    "regression": "sequence:SequenceTask",
    "embedding": "embedding:EmbeddingTask",
    "question-answering": "question_answering:QuestionAnsweringTask",
    "token-classification": "token_classification:TokenClassificationTask",
    "seq2seq": "seq2seq:Seq2SeqTask",
    "causal-lm": "causal_lm:CausalLMTask",
    "image-classification": "image_classification:ImageClassificationTask",
    "speech-to-text": "speech:SpeechTask",
}
IGNORED = -100  # a label that neither the loss nor a metric counts: padding, prompts, special tokens
SHOWN = 10  # labels in a message
_TIMING = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class Task(ABC):
    """One recipe's task.

    Attributes:
        auto_class: The transformers class that loads the model with the right head.
        peft_type: PEFT's task type, or None where PEFT has none that fits.
        label_names: Columns of the features that are targets.
        groups_by_length: Features have `input_ids`, by whose length batches can be put together.
        loss_per_token: The loss is a mean over the tokens of all processes and micro-batches, where the model can.
        needs: Packages of the extra `metrics` that it imports at the end of a run.
        main_metric: The metric by which a best evaluation is picked.
    """

    auto_class: ClassVar[Any]
    peft_type: ClassVar[str | None] = None
    label_names: ClassVar[tuple[str, ...]] = ("labels",)
    groups_by_length: ClassVar[bool] = True
    loss_per_token: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()
    main_metric: str = "loss"

    def __init__(self, recipe: Recipe, splits: Splits) -> None:
        self.recipe = recipe
        self.splits = splits

    def processor(self, name: str, **loading: Any) -> Any:
        """Tokenizer, image processor or both."""
        return AutoTokenizer.from_pretrained(name, **loading)

    def head(self, processor: Any) -> dict[str, Any]:
        """Fields of the model's config that the task decides."""
        return {}

    @abstractmethod
    def features(self, table: Any, processor: Any) -> Any:
        """Rows as model inputs with targets; padding is left to the collator."""

    @abstractmethod
    def collator(self, processor: Any) -> Any:
        """Puts features of different lengths into one batch."""

    def first_answer(self) -> float | None:
        """What a new head answers before it is trained, by its bias; None leaves the bias at 0."""
        return None

    def loss(self) -> Callable[..., Any] | None:
        """The loss from outputs, labels and the number of labels in a step; None where the model has its own."""
        return None

    def metrics(self) -> Callable[[EvalPrediction], dict[str, float]] | None:
        """Metrics during training, from the model's outputs; None for the loss alone."""
        return None

    def reduce_outputs(self) -> Callable[[Any, Any], Any] | None:
        """Makes outputs small before they are gathered over all held-out rows."""
        return None

    def arguments(self) -> dict[str, Any]:
        """Training arguments that the task needs."""
        return {}

    def map_rows(self, table: Any, function: Callable[[dict[str, list[Any]]], dict[str, Any]]) -> Any:
        """Replace all columns by what a batched function makes of them; works row by row on streams.

        Raises:
            DataError: Later, while a stream is read: a row of it lacks a text or a label.
        """
        if hasattr(table, "__len__"):
            return table.map(function, batched=True, remove_columns=columns_of(table))

        def checked(rows: dict[str, list[Any]]) -> dict[str, Any]:
            refuse_gaps_of_stream(self.recipe, rows)
            return function(rows)

        return table.map(checked, batched=True, remove_columns=columns_of(table))

    def evaluate(self, trainer: Trainer, table: Any, processor: Any) -> dict[str, float]:
        """Metrics of the live model on held-out rows; on several processes all of them call it."""
        return predict_metrics(trainer, self.features(table, processor))[1]


def make_task(recipe: Recipe, splits: Splits) -> Task:
    """The task that a recipe names.

    Raises:
        RecipeError: A package that it needs at the end of the run is not installed.
    """
    module, _, name = REGISTRY[recipe.task.name].partition(":")
    chosen: type[Task] = getattr(importlib.import_module(f"adalora.tasks.kinds.{module}"), name)
    missing = [package for package in chosen.needs if importlib.util.find_spec(package) is None]
    if missing:
        raise RecipeError(f"task.name={recipe.task.name!r} needs {', '.join(missing)}: pip install 'adalora[metrics]'")
    return chosen(recipe, splits)


def predict_metrics(trainer: Trainer, features: Any) -> tuple[Any, dict[str, float]]:
    """Outputs and metrics of the live model; times are left out."""
    output = trainer.predict(features, metric_key_prefix="final")
    values = {key.removeprefix("final_"): float(value) for key, value in (output.metrics or {}).items()}
    return output.predictions, {key: value for key, value in values.items() if not key.endswith(_TIMING)}


def _as_list(cell: Any) -> list[Any]:
    return cell if isinstance(cell, list) else [cell]


def find_labels(
    recipe: Recipe, splits: Splits, *, role: str, parts: Callable[[Any], list[Any]] = _as_list
) -> list[str]:
    """Label names in the order of the model's outputs: the recipe's, the data set's, or all that occur.

    Args:
        recipe: May list them.
        splits: The rows.
        role: Column with the labels.
        parts: Labels in one cell.

    Raises:
        DataError: Rows are streamed, so that nobody can know; or held-out rows have a label that training has not.
    """
    if (given := getattr(recipe.task, "labels", None)) is not None:
        return list(given)
    feature = (splits.train.features or {}).get(role)
    feature = getattr(feature, "feature", feature)  # of a list
    if names := getattr(feature, "names", None):
        return list(names)
    if recipe.data.streaming:
        raise DataError("task.labels: streaming rows do not tell their labels; list them in the recipe")
    train, *held_out = [
        {label for cell in rows[role] for label in parts(cell)}
        for rows in (splits.train, splits.validation, splits.test)
        if rows is not None
    ]
    if None in train:
        raise DataError(f"column {recipe.column(role)!r}: a label of a row of train is missing; drop or mend it")
    labels = sorted({str(label) for label in train})
    for label in sorted(set().union(*held_out), key=str):  # now, not when training is over
        label_number(label, labels)
    return labels


def label_head(labels: list[str], **fields: Any) -> dict[str, Any]:
    """Config fields of a head with one output per label."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
        **fields,
    }


def label_number(value: Any, labels: list[str]) -> int:
    """The output that a label stands for; data sets on the hub have numbers already.

    Raises:
        DataError: It is not among the labels.
    """
    text = str(value)
    if text in labels:
        return labels.index(text)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(labels):
        return value
    shown = ", ".join(labels[:SHOWN]) + (", …" if len(labels) > SHOWN else "")
    raise DataError(
        f"label {value!r} is not among the {len(labels)} labels of training ({shown}): list all in task.labels, take "
        "more rows (data.limit.train), or mend the row"
    )
