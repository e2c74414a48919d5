"""Rows of a JSONL or CSV file as batches, with a loss and a score for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adalora.errors import AdapterFileError, DataError

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Measure:
    """Data that a model can be measured on.

    Attributes:
        batches: Tokenised rows with `labels`.
        loss: loss(model, batch) -> scalar.
        score: score(model) -> number over all batches.
        score_name: `accuracy`, or `loss` where there is no class.
    """

    batches: list[Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    score: Callable[[nn.Module], float]
    score_name: str


def read_rows(path: str | os.PathLike[str], *, text: str = "text", label: str | None = "label") -> list[dict[str, Any]]:
    """Read the text (and label, where there is such a column) of a JSONL or CSV file.

    Args:
        path: `.jsonl` or `.csv`.
        text: Column with the text.
        label: Column with the class or number; None for none.

    Raises:
        DataError: No such file, another type, no rows, or no text column; the message names the columns.
    """
    import pandas as pd

    file = Path(path)
    if not file.is_file():
        raise DataError(f"no data at {file}")
    if file.suffix not in (".jsonl", ".csv"):
        raise DataError(f"{file.name}: allowed are .jsonl and .csv")
    try:
        frame = pd.read_json(file, lines=True) if file.suffix == ".jsonl" else pd.read_csv(file)
    except ValueError as error:
        raise DataError(f"{file.name} cannot be read: {str(error)[:120]}") from error
    if text not in frame.columns:
        raise DataError(f"{file.name} has no column {text!r}; it has {', '.join(map(str, frame.columns))}")
    if frame.empty:
        raise DataError(f"{file.name} has no rows")
    keep = [text] + ([label] if label in frame.columns else [])
    frame = frame[keep].dropna()
    frame.columns = pd.Index(["text", "label"][: len(keep)])
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


def measure_file(
    path: str | os.PathLike[str],
    model: nn.Module,
    tokenizer: Any,
    *,
    text: str = "text",
    label: str | None = "label",
    batch_size: int = 8,
    max_length: int = 128,
    limit: int | None = 512,
) -> Measure:
    """Batches of a file for a model: classes where the model has a class head and the file labels, else text.

    Args:
        path: `.jsonl` or `.csv`.
        model: The base model.
        tokenizer: Its tokenizer.
        text: Column with the text.
        label: Column with the class: a number, or one of the config's label names.
        batch_size: Rows a batch.
        max_length: Tokens a row at most.
        limit: Rows used at most; None for all.

    Raises:
        DataError: See `read_rows`; or a label that the model does not have.
        AdapterFileError: The model needs labels and there are none.
    """
    rows = read_rows(path, text=text, label=label)[:limit]
    classes = type(model).__name__.endswith("ForSequenceClassification")
    if classes and "label" not in rows[0]:
        raise AdapterFileError(f"{type(model).__name__} needs a column of labels; name it with --label-column")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batches = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch = dict(
            tokenizer(
                [str(r["text"]) for r in part],
                truncation=True,
                max_length=max_length,
                padding=True,
                return_tensors="pt",
            )
        )
        if classes:
            batch["labels"] = _labels([r["label"] for r in part], model)
        else:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batches.append(batch)
    regression = classes and int(model.config.num_labels) == 1  # type: ignore[union-attr, arg-type]
    by_class = classes and not regression
    return Measure(
        batches, _loss, _accuracy(batches) if by_class else _mean(batches), "accuracy" if by_class else "loss"
    )


def _labels(values: list[Any], model: nn.Module) -> Tensor:
    config: Any = model.config
    if int(config.num_labels) == 1:
        return torch.tensor([float(v) for v in values])
    names = {str(k): int(v) for k, v in (config.label2id or {}).items()}
    numbers = []
    for value in values:
        plain = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
        number = names.get(plain, int(plain) if plain.isdigit() else -1)
        if not 0 <= number < int(config.num_labels):
            raise DataError(f"label {value!r}; the model has {config.num_labels} classes: {', '.join(names)}")
        numbers.append(number)
    return torch.tensor(numbers)


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    device = next(model.parameters()).device
    value: Tensor = model(**{k: v.to(device) for k, v in batch.items()}).loss
    return value


def _mean(batches: list[Batch]) -> Callable[[nn.Module], float]:
    def score(model: nn.Module) -> float:
        with torch.no_grad():
            return sum(float(_loss(model, batch)) for batch in batches) / len(batches)

    return score


def _accuracy(batches: list[Batch]) -> Callable[[nn.Module], float]:
    def score(model: nn.Module) -> float:
        right = rows = 0
        device = next(model.parameters()).device
        with torch.no_grad():
            for batch in batches:
                inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
                guess = model(**inputs).logits.argmax(dim=-1).cpu()
                right, rows = right + int((guess == batch["labels"]).sum()), rows + len(guess)
        return right / rows

    return score
