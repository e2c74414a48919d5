"""The span of a text that answers a question (SQuAD v1.1 and v2)."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, Trainer

from adalora.errors import DataError
from adalora.tasks.kinds.base import Task, predict_metrics
from adalora.tasks.kinds.spans import Candidate, Window, best_answers, squad_scores, tune_threshold
from adalora.tasks.recipe.options import QuestionAnswering

DEFAULT_LENGTH = 384
CONTEXT = 1  # the second of the two texts


class QuestionAnsweringTask(Task):
    """Questions over contexts; a context too long for one window is read in several that overlap."""

    auto_class = AutoModelForQuestionAnswering
    peft_type = "QUESTION_ANS"
    label_names = ("start_positions", "end_positions")
    main_metric = "loss"
    needs = ("torchmetrics",)

    @property
    def options(self) -> QuestionAnswering:
        """The recipe's task part."""
        assert isinstance(self.recipe.task, QuestionAnswering)
        return self.recipe.task

    def processor(self, name: str, **loading: Any) -> Any:
        """A tokenizer that knows which characters a token stands for."""
        tokenizer = super().processor(name, **loading)
        if not tokenizer.is_fast:
            raise DataError(f"question answering needs a fast tokenizer, which {name!r} does not have")
        return tokenizer

    def features(self, table: Any, processor: Any) -> Any:
        """One window per row, with the answer's first and last token, or the first token for none."""

        def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
            windows = self._windows(rows, processor)
            owners, offsets = windows.pop("overflow_to_sample_mapping"), windows.pop("offset_mapping")
            places = [
                _answer_tokens(rows["answers"][owner], windows.sequence_ids(number), offsets[number])
                for number, owner in enumerate(owners)
            ]
            starts, ends = zip(*places)
            return {**windows, "start_positions": list(starts), "end_positions": list(ends)}

        return self.map_rows(table, encode)

    def collator(self, processor: Any) -> Any:
        """Pads to the longest window of a batch."""
        return DataCollatorWithPadding(processor)

    def evaluate(self, trainer: Trainer, table: Any, processor: Any) -> dict[str, float]:
        """Exact match and F1 with SQuAD's normalisation; with `no_answer` both kinds of question also apart."""
        threshold = self.options.no_answer_threshold
        if threshold == "tune":
            rows = self.splits.validation
            if rows is None:
                raise DataError("task.no_answer_threshold=tune needs a validation split: data.validation_fraction=0.1")
            candidates, _ = self._candidates(trainer, rows, processor)
            threshold = tune_threshold(candidates, list(rows["answers"]))
        candidates, scores = self._candidates(trainer, table, processor)
        answers = [candidate.answer(threshold if self.options.no_answer else None) for candidate in candidates]
        scores = {**squad_scores(answers, list(table["answers"])), **scores}
        return {**scores, "no_answer_threshold": threshold} if self.options.no_answer else scores

    def _candidates(self, trainer: Trainer, table: Any, processor: Any) -> tuple[list[Candidate], dict[str, float]]:
        outputs, scores = predict_metrics(trainer, self.features(table, processor))
        columns = {name: list(table[name]) for name in ("question", "context")}
        encoded = self._windows(columns, processor)
        windows = [
            Window(
                row=owner,
                offsets=[
                    tuple(span) if part == CONTEXT else None
                    for part, span in zip(encoded.sequence_ids(number), encoded["offset_mapping"][number])
                ],
                start=outputs[0][number],
                end=outputs[1][number],
            )
            for number, owner in enumerate(encoded["overflow_to_sample_mapping"])
        ]
        found = best_answers(
            windows, columns["context"], candidates=self.options.candidates, longest=self.options.max_answer_tokens
        )
        return found, scores

    def _windows(self, rows: dict[str, list[Any]], processor: Any) -> Any:
        length = self.recipe.training.max_length or min(DEFAULT_LENGTH, processor.model_max_length)
        return processor(
            [question.strip() for question in rows["question"]],
            rows["context"],
            truncation="only_second",
            max_length=length,
            stride=min(self.options.stride, length // 2),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )


def _answer_tokens(answers: Any, parts: list[int | None], offsets: list[tuple[int, int]]) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0) where it is not whole in this window, or there is none."""
    if not answers["text"]:
        return 0, 0
    begin = answers["answer_start"][0]
    end = begin + len(answers["text"][0])
    context = [token for token, part in enumerate(parts) if part == CONTEXT]
    if not context or offsets[context[0]][0] > begin or offsets[context[-1]][1] < end:
        return 0, 0
    first = max(token for token in context if offsets[token][0] <= begin)
    last = min(token for token in context if offsets[token][1] >= end)
    return first, last
