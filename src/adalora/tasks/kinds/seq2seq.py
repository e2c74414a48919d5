"""Text to text with an encoder-decoder: summaries, translations."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, Trainer

from adalora.tasks.kinds.base import predict_metrics
from adalora.tasks.kinds.generation import GenerativeTask, rouge
from adalora.tasks.recipe.options import Seq2Seq


class Seq2SeqTask(GenerativeTask):
    """Source and target. A row may have several targets: it is trained on the first and scored on the best."""

    auto_class = AutoModelForSeq2SeqLM
    peft_type = "SEQ_2_SEQ_LM"
    main_metric = "loss"
    needs = ("rouge_score",)

    @property
    def options(self) -> Seq2Seq:
        """The recipe's task part."""
        assert isinstance(self.recipe.task, Seq2Seq)
        return self.recipe.task

    def features(self, table: Any, processor: Any) -> Any:
        """Token ids of source and target."""

        def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
            targets = [target if isinstance(target, str) else target[0] for target in rows["target"]]
            encoded = self._encode_sources(rows["source"], processor)
            wanted = processor(text_target=targets, truncation=True, max_length=self.options.max_target_length)
            return {**encoded, "labels": wanted["input_ids"]}

        return self.map_rows(table, encode)

    def collator(self, processor: Any) -> Any:
        """Pads both sides to the longest row of a batch."""
        return DataCollatorForSeq2Seq(processor)

    def evaluate(self, trainer: Trainer, table: Any, processor: Any) -> dict[str, float]:
        """Likelihood of the targets, and ROUGE of generated texts."""
        scores = predict_metrics(trainer, self.features(table, processor))[1]
        if self.options.generation is None:
            return scores
        sources = list(table["source"])

        def inputs(rows: list[int]) -> Any:
            encoded = self._encode_sources([sources[row] for row in rows], processor)
            return processor.pad(encoded, return_tensors="pt")

        texts = self.generate(trainer, processor, len(sources), inputs=inputs, options=self.options.generation)
        return {**rouge(texts, list(table["target"])), **scores}

    def _encode_sources(self, sources: list[str], processor: Any) -> dict[str, Any]:
        texts = [self.options.prefix + source for source in sources]
        return dict(processor(texts, truncation=True, max_length=self.recipe.training.max_length))
