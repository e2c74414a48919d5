"""A label for each word: names, parts of speech."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification, EvalPrediction

from adalora.errors import DataError
from adalora.tasks.data.rows import Splits
from adalora.tasks.kinds.base import IGNORED, Task, find_labels, label_head, label_number
from adalora.tasks.recipe.fields import Recipe


class TokenClassificationTask(Task):
    """Words and their labels. Labels that start with B- and I- are scored as whole entities."""

    auto_class = AutoModelForTokenClassification
    peft_type = "TOKEN_CLS"
    needs = ("seqeval",)

    def __init__(self, recipe: Recipe, splits: Splits) -> None:
        super().__init__(recipe, splits)
        for table in splits:
            if table is not None and hasattr(table, "__len__"):
                self._refuse_text(table[:1])
        self.labels = find_labels(recipe, splits, role="tags")
        self.entities = any(label.startswith(("B-", "I-")) for label in self.labels)
        self.main_metric = "f1" if self.entities else "accuracy"

    def processor(self, name: str, **loading: Any) -> Any:
        """A tokenizer that takes words; byte-level ones need a space before each."""
        tokenizer = super().processor(name, add_prefix_space=True, **loading)
        if not tokenizer.is_fast:
            raise DataError(f"token classification needs a fast tokenizer, which {name!r} does not have")
        return tokenizer

    def head(self, processor: Any) -> dict[str, Any]:
        """One output per label."""
        return label_head(self.labels)

    def features(self, table: Any, processor: Any) -> Any:
        """Token ids, and each word's label at its first token."""
        limit = self.recipe.training.max_length

        def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
            self._refuse_text(rows)
            encoded = processor(rows["tokens"], is_split_into_words=True, truncation=True, max_length=limit)
            labels = [
                self._align(encoded.word_ids(row), tags, words)
                for row, (tags, words) in enumerate(zip(rows["tags"], rows["tokens"]))
            ]
            return {**encoded, "labels": labels}

        return self.map_rows(table, encode)

    def collator(self, processor: Any) -> Any:
        """Pads tokens and labels to the longest row of a batch."""
        return DataCollatorForTokenClassification(processor)

    def metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        """Entity precision, recall and F1 by seqeval, or accuracy and macro-F1 by scikit-learn."""
        return self._measure

    def _refuse_text(self, rows: dict[str, list[Any]]) -> None:
        for role in ("tokens", "tags"):
            for cell in rows[role][:1]:  # a column is of one kind
                if not isinstance(cell, list):
                    raise DataError(
                        f"column {self.recipe.column(role)!r} has {cell!r} where a list of words or tags must stand: "
                        '{"tokens": ["my", "bag"], "tags": ["O", "B-THING"]}, in JSON lines or Parquet'
                    )

    def _align(self, word_ids: list[int | None], tags: list[Any], words: list[str]) -> list[int]:
        if len(tags) != len(words):
            raise DataError(f"{len(words)} tokens but {len(tags)} tags in the row that begins {words[:5]}")
        previous: int | None = None
        labels = []  # neither special tokens nor all but the first token of a word count
        for word in word_ids:
            labels.append(IGNORED if word is None or word == previous else label_number(tags[word], self.labels))
            previous = word
        return labels

    def _measure(self, prediction: EvalPrediction) -> dict[str, float]:
        from sklearn.metrics import accuracy_score, f1_score

        truth, guess = np.asarray(prediction.label_ids), np.argmax(prediction.predictions, axis=-1)
        counted = truth != IGNORED
        scores = {"accuracy": float(accuracy_score(truth[counted], guess[counted]))}
        if not self.entities:
            return {**scores, "macro_f1": float(f1_score(truth[counted], guess[counted], average="macro"))}
        from seqeval.metrics import f1_score as entity_f1
        from seqeval.metrics import precision_score, recall_score

        names = np.array(self.labels)
        expected = [names[row[keep]].tolist() for row, keep in zip(truth, counted)]
        found = [names[row[keep]].tolist() for row, keep in zip(guess, counted)]
        return {
            "f1": float(entity_f1(expected, found, zero_division=0)),
            "precision": float(precision_score(expected, found, zero_division=0)),
            "recall": float(recall_score(expected, found, zero_division=0)),
            **scores,
        }
