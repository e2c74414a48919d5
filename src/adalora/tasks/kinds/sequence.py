"""Tasks with one answer per text or pair of texts: labels, several labels, a number."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean
from typing import Any

import numpy as np
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, EvalPrediction

from adalora.errors import DataError
from adalora.tasks.data.rows import STREAM_SAMPLE, Splits
from adalora.tasks.kinds.base import Task, find_labels, label_head, label_number
from adalora.tasks.recipe.fields import Recipe
from adalora.tasks.recipe.options import MultiLabel, Regression


class SequenceTask(Task):
    """Labels, features and metrics of one recipe.

    Attributes:
        labels: In the order of the model's outputs; empty for regression.
    """

    auto_class = AutoModelForSequenceClassification
    peft_type = "SEQ_CLS"

    def __init__(self, recipe: Recipe, splits: Splits) -> None:
        super().__init__(recipe, splits)
        self.options = recipe.task
        self.labels: list[str] = []
        self.main_metric = "pearson"
        if isinstance(self.options, MultiLabel):
            self.labels = find_labels(recipe, splits, role="labels", parts=self._split_labels)
            self.main_metric = "micro_f1"
        elif not isinstance(self.options, Regression):
            self.labels = find_labels(recipe, splits, role="label")
            self.main_metric = "accuracy"

    def processor(self, name: str, **loading: Any) -> Any:
        """The tokenizer; decoders that never pad get their end token for it."""
        return with_pad_token(super().processor(name, **loading))

    def head(self, processor: Any) -> dict[str, Any]:
        """One output per label, or one number."""
        pad = {"pad_token_id": processor.pad_token_id}
        if isinstance(self.options, Regression):
            return {"num_labels": 1, "problem_type": "regression", **pad}
        multi = isinstance(self.options, MultiLabel)
        kind = "multi_label_classification" if multi else "single_label_classification"
        return label_head(self.labels, problem_type=kind, **pad)

    def first_answer(self) -> float | None:
        """The mean of the training rows' numbers."""
        wanted = isinstance(self.options, Regression) and self.options.start_at_mean
        return mean_label(self.splits.train) if wanted else None

    def features(self, table: Any, processor: Any) -> Any:
        """Rows as token ids and labels; padding is left to the collator."""
        limit = self.recipe.training.max_length
        role = "labels" if isinstance(self.options, MultiLabel) else "label"

        def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
            pairs = [rows["text_pair"]] if "text_pair" in rows else []
            encoded = dict(processor(rows["text"], *pairs, truncation=True, max_length=limit))
            encoded["labels"] = [self._target(value) for value in rows[role]]
            return encoded

        return self.map_rows(table, encode)

    def collator(self, processor: Any) -> Any:
        """Pads to the longest row of a batch."""
        return DataCollatorWithPadding(processor)

    def metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        """Metrics from scores and labels, by scikit-learn and scipy."""
        if isinstance(self.options, Regression):
            return correlations
        if isinstance(self.options, MultiLabel):
            threshold = self.options.threshold
            return lambda prediction: _multi_label(prediction, threshold=threshold)
        return class_metrics

    def _split_labels(self, value: Any) -> list[str]:
        assert isinstance(self.options, MultiLabel)
        parts = value.split(self.options.separator) if isinstance(value, str) else list(value or [])
        return [str(part).strip() for part in parts if str(part).strip()]

    def _target(self, value: Any) -> Any:
        if isinstance(self.options, Regression):
            return number(value)
        if not isinstance(self.options, MultiLabel):
            return label_number(value, self.labels)
        row = [0.0] * len(self.labels)
        parts = self._split_labels(value) if isinstance(value, str) else list(value or [])
        for label in parts:
            row[label_number(label, self.labels)] = 1.0
        return row


def with_pad_token(tokenizer: Any) -> Any:
    """A tokenizer that can pad: decoders without a pad token use their end token."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def number(value: Any) -> float:
    """A regression label.

    Raises:
        DataError: It is not a finite number.
    """
    try:
        made = float(value)
    except (TypeError, ValueError):
        made = math.nan
    if not math.isfinite(made):
        raise DataError(f"label {value!r}: regression needs a finite number in every row; drop or mend such rows")
    return made


def mean_label(train: Any) -> float:
    """Mean of the training rows' numbers; of a stream, that of its first rows."""
    labels = train["label"] if hasattr(train, "__len__") else (row["label"] for row in train.take(STREAM_SAMPLE))
    return fmean(number(value) for value in labels)


def class_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, macro-F1, Matthews correlation, and the accuracy of always naming the commonest class."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    truth, guess = prediction.label_ids, np.argmax(prediction.predictions, axis=-1)
    majority = float(np.bincount(np.asarray(truth)).max() / len(np.asarray(truth)))
    return {
        "accuracy": float(accuracy_score(truth, guess)),
        "macro_f1": float(f1_score(truth, guess, average="macro")),
        "matthews": float(matthews_corrcoef(truth, guess)),
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


def correlations(prediction: EvalPrediction) -> dict[str, float]:
    """Pearson's and Spearman's correlation, their mean, and the mean squared error."""
    from scipy.stats import pearsonr, spearmanr

    truth, guess = np.asarray(prediction.label_ids), np.asarray(prediction.predictions).squeeze(-1)
    pearson, spearman = float(pearsonr(truth, guess).statistic), float(spearmanr(truth, guess).statistic)
    return {
        "pearson": pearson,
        "spearman": spearman,
        "correlation": (pearson + spearman) / 2,
        "mse": float(np.mean((truth - guess) ** 2)),
    }
