"""Chats as token ids: which of them the assistant says."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from typing import Any

from adalora.errors import RecipeError

Message = dict[str, str]
Piece = tuple[list[int], bool]  # token ids, and whether they count in the loss


def chat_text(messages: list[Message], tokenizer: Any, *, open_turn: bool = False) -> str:
    """A chat in the words of the tokenizer's template; `open_turn` ends with the opening of the assistant's turn."""
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn))


def chat_ids(messages: list[Message], tokenizer: Any, *, open_turn: bool = False) -> list[int]:
    """Token ids of a chat."""
    text = chat_text(messages, tokenizer, open_turn=open_turn)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def chat_pieces(messages: list[Message], tokenizer: Any) -> list[Piece]:
    """Cut a chat into what the assistant says, with what ends its turn, which counts, and the rest.

    The cuts are made in the text of the whole chat, which is what the model will read, and then looked up among its
    tokens.

    Raises:
        RecipeError: The template, or a tokenizer in Python, does not show where a turn begins or ends.
    """
    whole = chat_text(messages, tokenizer)
    turns = [_turn(whole, messages, number, tokenizer) for number, said in enumerate(messages) if _spoken(said)]
    cuts = [0, *(cut for turn in turns for cut in turn), len(whole)]
    ids, places = _looked_up(whole, cuts, tokenizer)
    return [
        (ids[begin:end], bool(number % 2))  # rest, turn, rest, turn, ...
        for number, (begin, end) in enumerate(itertools.pairwise(places))
    ]


def _spoken(message: Message) -> bool:
    return message["role"] == "assistant"


def _turn(whole: str, messages: list[Message], number: int, tokenizer: Any) -> tuple[int, int]:
    """Where the assistant's turn lies in the text.

    A template may write a turn differently once later ones have come: Qwen3's puts an empty thought before the last
    turn only. Then what the assistant said is looked for behind the turn's opening, and what the template writes
    behind it when it is the last turn belongs to it.
    """
    opening = chat_text(messages[:number], tokenizer, open_turn=True)
    closed = chat_text(messages[: number + 1], tokenizer)
    if whole.startswith(opening):
        if whole.startswith(closed):
            return len(opening), len(closed)
        said = messages[number]["content"].strip()
        behind = whole.find(said, len(opening)) + len(said)
        ending = closed[closed.rfind(said) + len(said) :]
        # Phi-3's template ends a chat, and only that, with the end token.
        for end in (ending, ending.removesuffix(tokenizer.eos_token or "")):
            if said and behind >= len(opening) + len(said) and whole.startswith(end, behind):
                return len(opening), behind + len(end)
    raise RecipeError(
        f"the tokenizer's chat template does not show where turn {number + 1} begins and ends, so the assistant's "
        "tokens cannot be told apart: set task.loss_on=all, or one exchange per row"
    )


def _looked_up(text: str, cuts: list[int], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of the text, and for each cut the number of the first token that begins at or after it."""
    fast = getattr(tokenizer, "is_fast", False)
    encoded = tokenizer(text, add_special_tokens=False, **({"return_offsets_mapping": True} if fast else {}))
    ids = list(encoded["input_ids"])
    if fast:
        starts = [begin for begin, _ in encoded["offset_mapping"]]
        return ids, [bisect_left(starts, cut) for cut in cuts]
    # A tokenizer in Python does not say where a token begins; the tokens of the text before the cut do.
    before = [list(tokenizer(text[:cut], add_special_tokens=False)["input_ids"]) for cut in cuts]
    if any(ids[: len(start)] != start for start in before):
        raise RecipeError(
            "the tokenizer joins what the assistant says with what stands around it, so its tokens cannot be told "
            "apart: set task.loss_on=all, or use the model's fast tokenizer"
        )
    return ids, [len(start) for start in before]
