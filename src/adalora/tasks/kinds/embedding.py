"""One vector per text, near to that of the text which belongs to it: search, retrieval."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, EvalPrediction

from adalora.tasks.kinds.base import IGNORED, Task
from adalora.tasks.kinds.sequence import with_pad_token
from adalora.tasks.recipe.options import Embedding

CHUNK = 1024  # queries whose scores are in memory at a time


class EmbeddingTask(Task):
    """Pairs of texts that belong together; the passages of the other pairs in a batch are the wrong ones.

    A batch holds each pair's two texts one behind the other, so that the encoder runs once and stays as it is. Its
    labels are the token ids: they tell the padding, and which passages are the same.
    """

    auto_class = AutoModel
    peft_type = "FEATURE_EXTRACTION"
    groups_by_length = False
    main_metric = "mrr"

    @property
    def options(self) -> Embedding:
        """The recipe's task part."""
        assert isinstance(self.recipe.task, Embedding)
        return self.recipe.task

    def processor(self, name: str, **loading: Any) -> Any:
        """The tokenizer, able to pad."""
        return with_pad_token(super().processor(name, **loading))

    def features(self, table: Any, processor: Any) -> Any:
        """Token ids of both texts."""
        limit = self.recipe.training.max_length

        def ids(prefix: str, texts: list[str]) -> Any:
            return processor([prefix + text for text in texts], truncation=True, max_length=limit)["input_ids"]

        def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
            options = self.options
            return {"query": ids(options.prefix, rows["text"]), "passage": ids(options.pair_prefix, rows["text_pair"])}

        return self.map_rows(table, encode)

    def collator(self, processor: Any) -> Any:
        """Query, passage, query, passage …, padded to the longest; labels are [pairs, tokens, 2]."""
        return partial(collate, processor=processor)

    def arguments(self) -> dict[str, Any]:
        """The collator needs columns that the model does not know."""
        return {"remove_unused_columns": False}

    def loss(self) -> Callable[..., Tensor]:
        """Cross-entropy of each query's own passage among all of the batch."""
        return partial(contrastive_loss, pooling=self.options.pooling, temperature=self.options.temperature)

    def metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        """Each query's own passage among all passages of the split."""
        return retrieval

    def reduce_outputs(self) -> Callable[[Any, Any], Any]:
        """Vectors in place of every token's state."""
        return lambda outputs, labels: embed(_states(outputs), labels, pooling=self.options.pooling)


def collate(rows: list[dict[str, Any]], *, processor: Any) -> dict[str, Tensor]:
    """A batch of pairs. Tokens are the labels' second axis, the one that the Trainer pads to put batches together."""
    texts = [{"input_ids": row[side]} for row in rows for side in ("query", "passage")]
    batch = dict(processor.pad(texts, return_tensors="pt"))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    return {**batch, "labels": labels.view(len(rows), 2, -1).transpose(1, 2).contiguous()}


def _states(outputs: Any) -> Tensor:
    states: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
    return states


def embed(states: Tensor, labels: Tensor, *, pooling: str) -> Tensor:
    """Vectors of length 1, fp32.

    Args:
        states: Of every token, [2 · pairs, tokens, width].
        labels: Token ids with -100 where there is padding, [pairs, tokens, 2].
        pooling: "mean" of a text's tokens, or "cls", its first one.

    Returns:
        [pairs, 2, width].
    """
    present = (labels != IGNORED).transpose(1, 2).flatten(0, 1).unsqueeze(-1)
    states = states.float()
    vectors = states[:, 0] if pooling == "cls" else (states * present).sum(dim=1) / present.sum(dim=1)
    return F.normalize(vectors, dim=-1).view(len(labels), 2, -1)


def contrastive_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Any = None, *, pooling: str, temperature: float
) -> Tensor:
    """InfoNCE with the batch's other passages; one that is the query's own passage once more is no wrong answer.

    Args:
        outputs: Of the encoder.
        labels: [pairs, tokens, 2].
        num_items_in_batch: Labels of all micro-batches and processes of a step, of which this is a part.
        pooling: As in `embed`.
        temperature: Divides the cosines.
    """
    vectors = embed(outputs["last_hidden_state"], labels, pooling=pooling)
    scores = vectors[:, 0] @ vectors[:, 1].T / temperature
    passages = labels[..., 1]
    same = (passages[:, None] == passages[None]).all(dim=-1)
    same.fill_diagonal_(False)
    own = torch.arange(len(labels), device=scores.device)
    part = 1.0 if num_items_in_batch is None else (labels != IGNORED).sum() / num_items_in_batch
    return F.cross_entropy(scores.masked_fill(same, -torch.inf), own) * part


def retrieval(prediction: EvalPrediction) -> dict[str, float]:
    """Recall at 1 and 10 and the mean reciprocal rank; passages that are the same share a rank."""
    vectors = np.asarray(prediction.predictions, dtype=np.float32)
    queries, passages = vectors[:, 0], vectors[:, 1]
    own = (queries * passages).sum(axis=1) + 1e-6  # beyond rounding: an equal passage is not a better one
    better = [
        (queries[start : start + CHUNK] @ passages.T > own[start : start + CHUNK, None]).sum(axis=1)
        for start in range(0, len(queries), CHUNK)
    ]
    rank = 1 + np.concatenate(better)
    return {
        "mrr": float((1 / rank).mean()),
        "recall_at_1": float((rank <= 1).mean()),
        "recall_at_10": float((rank <= 10).mean()),
    }
