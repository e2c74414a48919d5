"""Answers from a saved adapter, with stock PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from adalora.errors import AdapterFileError
from adalora.export.files import WEIGHTS_NAME
from adalora.tasks.recipe.files import load_recipe

PREDICTS = ("classification",)


def load_saved(run: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a finished run: the base model with the saved adapter in stock PEFT.

    Raises:
        AdapterFileError: The folder holds no finished run.
    """
    adapter = run / "adapter"
    # Without the safetensors file PEFT would read a pickle.
    if not all((adapter / name).is_file() for name in ("labels.json", WEIGHTS_NAME)):
        raise AdapterFileError(f"{run} holds no trained adapter; train one first: adalora demo --out {run}")
    labels = {int(k): v for k, v in json.loads((adapter / "labels.json").read_text(encoding="utf-8")).items()}
    recipe = load_recipe(run / "recipe.yaml")
    if recipe.task.name not in PREDICTS:
        raise AdapterFileError(f"{run} was trained for {recipe.task.name}; answers here are for {', '.join(PREDICTS)}")
    base = AutoModelForSequenceClassification.from_pretrained(
        recipe.model.resolve(),
        num_labels=len(labels),
        id2label=labels,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
    )
    return PeftModel.from_pretrained(base, adapter).eval(), AutoTokenizer.from_pretrained(adapter)


@torch.inference_mode()
def predict(run: Path, text: str) -> dict[str, float]:
    """Probability of each label for one text, highest first."""
    model, tokenizer = load_saved(run)
    scores = model(**tokenizer(text, return_tensors="pt", truncation=True)).logits[0].softmax(dim=-1)
    pairs = {model.config.id2label[n]: float(p) for n, p in enumerate(scores)}
    return dict(sorted(pairs.items(), key=lambda pair: -pair[1]))
