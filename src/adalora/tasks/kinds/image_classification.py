"""A label for an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AutoImageProcessor, AutoModelForImageClassification, DefaultDataCollator, EvalPrediction

from adalora.tasks.data.rows import Splits
from adalora.tasks.kinds.base import Task, find_labels, label_head, label_number
from adalora.tasks.kinds.sequence import class_metrics
from adalora.tasks.recipe.fields import Recipe


class ImageClassificationTask(Task):
    """Images, given as files or as a data set's own images, and their labels."""

    auto_class = AutoModelForImageClassification
    groups_by_length = False
    needs = ("PIL",)
    main_metric = "accuracy"

    def __init__(self, recipe: Recipe, splits: Splits) -> None:
        super().__init__(recipe, splits)
        self.labels = find_labels(recipe, splits, role="label")

    def processor(self, name: str, **loading: Any) -> Any:
        """Resizes and normalises as the model's makers did."""
        loading.pop("gguf_file", None)
        loader: Any = AutoImageProcessor
        return loader.from_pretrained(name, **loading)

    def head(self, processor: Any) -> dict[str, Any]:
        """One output per label."""
        return label_head(self.labels)

    def features(self, table: Any, processor: Any) -> Any:
        """Pixels and labels, made when a row is asked for: they would not fit into memory at once."""

        def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
            images = [open_image(image) for image in rows["image"]]
            labels = [label_number(value, self.labels) for value in rows["label"]]
            return {**processor(images, return_tensors="pt"), "labels": labels}

        return self.map_rows(table, encode) if self.recipe.data.streaming else table.with_transform(encode)

    def collator(self, processor: Any) -> Any:
        """Stacks images, which all have the same size."""
        return DefaultDataCollator()

    def metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        """As for texts."""
        return class_metrics

    def arguments(self) -> dict[str, Any]:
        """The raw columns are needed until a row is asked for."""
        return {"remove_unused_columns": False}


def open_image(image: Any) -> Any:
    """An RGB image from a path or from an image that is open already."""
    from PIL import Image

    return (Image.open(image) if isinstance(image, str) else image).convert("RGB")
