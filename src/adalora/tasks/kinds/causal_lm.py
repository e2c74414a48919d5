"""Causal language models: plain text, prompt and completion, chats."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer

from adalora.errors import RecipeError
from adalora.tasks.data.rows import columns_of
from adalora.tasks.kinds.base import IGNORED, predict_metrics
from adalora.tasks.kinds.chats import Message, Piece, chat_ids, chat_pieces
from adalora.tasks.kinds.generation import GenerativeTask, rouge
from adalora.tasks.kinds.sequence import with_pad_token
from adalora.tasks.recipe.options import CausalLM


class CausalLMTask(GenerativeTask):
    """Next-token prediction; the loss is on completions, or on everything."""

    auto_class = AutoModelForCausalLM
    peft_type = "CAUSAL_LM"
    main_metric = "loss"
    loss_per_token = True
    decoder_only = True
    needs = ("rouge_score",)

    @property
    def options(self) -> CausalLM:
        """The recipe's task part."""
        assert isinstance(self.recipe.task, CausalLM)
        return self.recipe.task

    def processor(self, name: str, **loading: Any) -> Any:
        """The tokenizer, able to pad and, where the recipe needs it, to write chats."""
        tokenizer = with_pad_token(super().processor(name, **loading))
        if (self.options.chat or "messages" in self.recipe.data.columns) and not tokenizer.chat_template:
            raise RecipeError(f"the tokenizer of {name!r} has no chat template; use prompt and completion columns")
        return tokenizer

    def features(self, table: Any, processor: Any) -> Any:
        """Token ids, and labels that leave out what does not count in the loss."""

        def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            keys = list(rows)
            parts = [self._pieces(dict(zip(keys, values)), processor) for values in zip(*rows.values())]
            encoded = [join(pieces, limit=self.recipe.training.max_length) for pieces in parts]
            return {
                "input_ids": [ids for ids, _ in encoded],
                "attention_mask": [[1] * len(ids) for ids, _ in encoded],
                "labels": [labels for _, labels in encoded],
            }

        return self.map_rows(table, encode)

    def collator(self, processor: Any) -> Any:
        """Pads tokens and labels to the longest row of a batch."""
        return DataCollatorForSeq2Seq(processor)

    def evaluate(self, trainer: Trainer, table: Any, processor: Any) -> dict[str, float]:
        """Likelihood, and where the recipe wants it ROUGE of generated completions."""
        scores = predict_metrics(trainer, self.features(table, processor))[1]
        names = columns_of(table)
        if self.options.generation is None or "text" in self.recipe.roles:
            return scores
        rows = [dict(zip(names, values)) for values in zip(*(table[name] for name in names))]
        side, processor.padding_side = processor.padding_side, "left"

        def inputs(numbers: list[int]) -> Any:
            prompts = [{"input_ids": self._prompt_ids(rows[number], processor)} for number in numbers]
            return processor.pad(prompts, return_tensors="pt")

        texts = self.generate(trainer, processor, len(rows), inputs=inputs, options=self.options.generation)
        processor.padding_side = side
        return {**rouge(texts, [self._answer(row) for row in rows]), **scores}

    def _pieces(self, row: dict[str, Any], tokenizer: Any) -> list[Piece]:
        everything = self.options.loss_on == "all"
        if "text" in self.recipe.roles:
            return [([*prompt_ids(row["text"], tokenizer), tokenizer.eos_token_id], True)]
        if self._chats():
            messages = self._messages(row)
            return [(chat_ids(messages, tokenizer), True)] if everything else chat_pieces(messages, tokenizer)
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        return [(self._prompt_ids(row, tokenizer), everything), ([*answer, tokenizer.eos_token_id], True)]

    def _prompt_ids(self, row: dict[str, Any], tokenizer: Any) -> list[int]:
        if self._chats():
            return chat_ids(self._messages(row)[:-1], tokenizer, open_turn=True)
        return prompt_ids(self._prompt(row) + self.options.separator, tokenizer)

    def _prompt(self, row: dict[str, Any]) -> str:
        template = self.options.template
        if template is None:
            return str(row["prompt"])
        return template.format_map({name: "" if cell is None else cell for name, cell in row.items()})

    def _chats(self) -> bool:
        return self.options.chat or "messages" in self.recipe.roles

    def _messages(self, row: dict[str, Any]) -> list[Message]:
        if "messages" in self.recipe.roles:
            return list(row["messages"])
        return [
            {"role": "user", "content": self._prompt(row)},
            {"role": "assistant", "content": str(row["completion"])},
        ]

    def _answer(self, row: dict[str, Any]) -> str:
        return self._messages(row)[-1]["content"] if "messages" in self.recipe.roles else str(row["completion"])


def prompt_ids(text: str, tokenizer: Any) -> list[int]:
    """Token ids with what the tokenizer puts in front of a text, without what it puts behind."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def join(pieces: list[Piece], *, limit: int | None) -> tuple[list[int], list[int]]:
    """Token ids and labels of one row.

    A row that is too long loses the beginning of its prompt before it loses its end.
    """
    excess = sum(len(ids) for ids, _ in pieces) - limit if limit is not None else 0
    if excess > 0 and not pieces[0][1]:
        pieces = [(pieces[0][0][min(excess, len(pieces[0][0])) :], False), *pieces[1:]]
    ids = [token for piece, _ in pieces for token in piece][:limit]
    labels = [token if counted else IGNORED for piece, counted in pieces for token in piece][:limit]
    return ids, labels
