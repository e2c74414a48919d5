"""Generating text for held-out rows, and scoring it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import EvalPrediction

from adalora.tasks.kinds.base import IGNORED, Task
from adalora.tasks.recipe.options import Generation

if TYPE_CHECKING:
    from transformers import Trainer

Reference = str | list[str]


class GenerativeTask(Task):
    """A task whose model is scored by the likelihood of tokens, and by texts that it generates."""

    # A decoder's score at one place is for the token at the next, and its texts begin with their prompt.
    decoder_only = False

    def metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        """Negative log-likelihood per counted token, and perplexity."""
        return likelihood

    def reduce_outputs(self) -> Callable[[Any, Any], Any]:
        """Sums of losses in place of a score per token and word."""
        return partial(token_losses, shift=self.decoder_only)

    def generate(
        self,
        trainer: Trainer,
        processor: Any,
        rows: int,
        *,
        inputs: Callable[[list[int]], Any],
        options: Generation,
        **more: Any,
    ) -> list[str]:
        """One text per row; see `generate_texts`."""
        return generate_texts(
            trainer.model,
            processor,
            rows,
            inputs=inputs,
            options=options,
            batch_size=trainer.args.per_device_eval_batch_size,
            strip_prompt=self.decoder_only,
            **more,
        )


@torch.inference_mode()
def generate_texts(
    model: Any,
    processor: Any,
    rows: int,
    *,
    inputs: Callable[[list[int]], Any],
    options: Generation,
    batch_size: int,
    strip_prompt: bool = False,
    **more: Any,
) -> list[str]:
    """Generate one text per row, the rows shared out over the processes of the run.

    Args:
        model: The live model; left in the mode that it was in.
        processor: Decodes token ids.
        rows: How many there are.
        inputs: Row numbers → what `model.generate` takes.
        options: Of the search.
        batch_size: Rows at a time.
        strip_prompt: The model repeats its input first, as decoders do.
        more: Further keywords of `model.generate`.

    Returns:
        Texts in the order of the rows, the same on every process.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    training = model.training
    model.eval()
    texts: list[str] = []
    with PartialState().split_between_processes(list(range(rows))) as mine:
        for start in range(0, len(mine), batch_size):
            batch = inputs(mine[start : start + batch_size]).to(model.device)
            output = model.generate(
                **batch,
                max_new_tokens=options.max_new_tokens,
                num_beams=options.num_beams,
                do_sample=False,
                **_search(options),
                **more,
            )
            if strip_prompt:
                output = output[:, batch["input_ids"].shape[1] :]
            texts += [text.strip() for text in processor.batch_decode(output, skip_special_tokens=True)]
    model.train(training)
    # Older versions of Accelerate give the last row to each process that would have none.
    return list(gather_object(texts))[:rows]


def _search(options: Generation) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if options.num_beams > 1:
        settings["length_penalty"] = options.length_penalty
    if options.no_repeat_ngram is not None:
        settings["no_repeat_ngram_size"] = options.no_repeat_ngram
    return settings


def rouge(texts: Sequence[str], references: Sequence[Reference]) -> dict[str, float]:
    """Mean ROUGE-1, -2, -L and -Lsum F1 (0 to 1), with stemming; of several references the best counts."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [
        scorer.score_multi([wanted] if isinstance(wanted, str) else list(wanted), text)
        for text, wanted in zip(texts, references)
    ]
    return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in names}


def token_losses(logits: Any, labels: torch.Tensor, *, shift: bool) -> torch.Tensor:
    """Per row the summed negative log-likelihood and the number of target tokens: (rows, 2), fp32."""
    scores = logits[0] if isinstance(logits, tuple) else logits
    if shift:
        scores, labels = scores[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(scores.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return torch.stack([losses.sum(dim=1), (labels != IGNORED).sum(dim=1).float()], dim=1)


def likelihood(prediction: EvalPrediction) -> dict[str, float]:
    """Negative log-likelihood per target token and its exponential, from `token_losses`."""
    total, tokens = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    nll = float(total / max(tokens, 1.0))
    return {"nll": nll, "perplexity": math.exp(min(nll, 700.0))}
