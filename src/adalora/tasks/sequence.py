"""Tasks with one answer per text or pair of texts: labels, several labels, a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, EvalPrediction

from adalora.errors import DataError
from adalora.tasks.data import Splits
from adalora.tasks.options import MultiLabel, Regression
from adalora.tasks.recipe import Recipe


class SequenceTask:
    """Labels, features and metrics of one recipe.

    Attributes:
        labels: In the order of the model's outputs; empty for regression.
    """

    def __init__(self, recipe: Recipe, splits: Splits) -> None:
        self.recipe = recipe
        self.options = recipe.task
        self.labels = [] if isinstance(self.options, Regression) else self._find_labels(splits)

    @property
    def main_metric(self) -> str:
        """The metric by which a best evaluation is picked."""
        if isinstance(self.options, Regression):
            return "pearson"
        return "micro_f1" if isinstance(self.options, MultiLabel) else "accuracy"

    def model(self, name: str, **loading: Any) -> Any:
        """Load the base model with a head of the right size."""
        if isinstance(self.options, Regression):
            head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
        else:
            multi = isinstance(self.options, MultiLabel)
            head = {
                "num_labels": len(self.labels),
                "id2label": dict(enumerate(self.labels)),
                "label2id": {label: number for number, label in enumerate(self.labels)},
                "problem_type": "multi_label_classification" if multi else "single_label_classification",
            }
        return AutoModelForSequenceClassification.from_pretrained(name, **head, **loading)

    def features(self, table: Any, tokenizer: Any) -> Any:
        """Rows as token ids and labels; padding is left to the collator."""
        number = {label: n for n, label in enumerate(self.labels)}
        limit = self.recipe.training.max_length

        def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
            pairs = [rows["text_pair"]] if "text_pair" in rows else []
            encoded = dict(tokenizer(rows["text"], *pairs, truncation=True, max_length=limit))
            encoded["labels"] = [self._target(value, number) for value in rows[self._label_role]]
            return encoded

        return table.map(encode, batched=True, remove_columns=table.column_names)

    def collator(self, tokenizer: Any) -> Any:
        """Pads to the longest row of a batch."""
        return DataCollatorWithPadding(tokenizer)

    def metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        """Metrics from scores and labels, by scikit-learn and scipy."""
        if isinstance(self.options, Regression):
            return _correlations
        if isinstance(self.options, MultiLabel):
            threshold = self.options.threshold
            return lambda prediction: _multi_label(prediction, threshold=threshold)
        return _classes

    @property
    def _label_role(self) -> str:
        return "labels" if isinstance(self.options, MultiLabel) else "label"

    def _split_labels(self, value: Any) -> list[str]:
        assert isinstance(self.options, MultiLabel)
        parts = value.split(self.options.separator) if isinstance(value, str) else list(value or [])
        return [str(part).strip() for part in parts if str(part).strip()]

    def _find_labels(self, splits: Splits) -> list[str]:
        if (given := getattr(self.options, "labels", None)) is not None:
            return list(given)
        if self.recipe.data.streaming:
            raise DataError("task.labels: streaming rows do not tell their labels; list them in the recipe")
        feature = splits.train.features[self._label_role]
        if names := getattr(feature, "names", None):
            return list(names)
        values = splits.train[self._label_role]
        if isinstance(self.options, MultiLabel):
            return sorted({label for value in values for label in self._split_labels(value)})
        return sorted({str(value) for value in values})

    def _target(self, value: Any, number: dict[str, int]) -> Any:
        if isinstance(self.options, Regression):
            return float(value)
        if isinstance(self.options, MultiLabel):
            row = [0.0] * len(number)
            for label in self._split_labels(value):
                row[self._index(label, number)] = 1.0
            return row
        if isinstance(value, int) and str(value) not in number:
            return value  # numbered already, as data sets on the hub are
        return self._index(str(value), number)

    def _index(self, label: str, number: dict[str, int]) -> int:
        if label not in number:
            raise DataError(f"label {label!r} is not among task.labels: {', '.join(number)}")
        return number[label]


def _classes(prediction: EvalPrediction) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, f1_score

    truth, guess = prediction.label_ids, np.argmax(prediction.predictions, axis=-1)
    majority = float(np.bincount(np.asarray(truth)).max() / len(np.asarray(truth)))
    return {
        "accuracy": float(accuracy_score(truth, guess)),
        "macro_f1": float(f1_score(truth, guess, average="macro")),
        "majority_accuracy": majority,
    }


def _multi_label(prediction: EvalPrediction, *, threshold: float) -> dict[str, float]:
    from scipy.special import expit
    from sklearn.metrics import accuracy_score, f1_score

    truth, guess = prediction.label_ids, expit(prediction.predictions) > threshold
    return {
        "micro_f1": float(f1_score(truth, guess, average="micro", zero_division=0)),
        "macro_f1": float(f1_score(truth, guess, average="macro", zero_division=0)),
        "exact_match": float(accuracy_score(truth, guess)),
    }


def _correlations(prediction: EvalPrediction) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    truth, guess = np.asarray(prediction.label_ids), np.asarray(prediction.predictions).squeeze(-1)
    return {
        "pearson": float(pearsonr(truth, guess).statistic),
        "spearman": float(spearmanr(truth, guess).statistic),
        "mse": float(np.mean((truth - guess) ** 2)),
    }
