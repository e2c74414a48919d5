"""What the assistant says, in chats written by the templates that published models have."""

from importlib.resources import files

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adalora.errors import RecipeError
from adalora.tasks.kinds.causal_lm import join
from adalora.tasks.kinds.chats import chat_ids, chat_pieces

CHAT = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Two of what?"},
    {"role": "assistant", "content": "Of what you see: Two."},
]
# What stands behind each of the assistant's turns.
ENDINGS = {
    "qwen3": "<|im_end|>\n",
    "qwen2_5": "<|im_end|>\n",
    "llama3": "<|eot_id|>",
    "gemma3": "<end_of_turn>\n",
    "phi3": "<|end|>\n",
}


def byte_tokenizer(template):
    """One token a byte, as a published model's tokenizer cuts an unknown language."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.chat_template = template
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    return tokenizer


def published(name):
    pytest.importorskip("trl")
    return byte_tokenizer((files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8"))


def texts(pieces, tokenizer):
    return [(tokenizer.decode(ids), counted) for ids, counted in pieces if ids]


class Slow:
    """A tokenizer that does not say where its tokens begin."""

    is_fast = False
    eos_token = None

    def __init__(self, fast):
        self.fast = fast
        self.apply_chat_template = fast.apply_chat_template

    def __call__(self, text, **options):
        assert "return_offsets_mapping" not in options
        return self.fast(text, **options)


@pytest.mark.parametrize("name", ENDINGS)
def test_every_turn_of_the_assistant_counts_and_nothing_else(name):
    tokenizer = published(name)
    pieces = chat_pieces(CHAT, tokenizer)
    assert [token for ids, _ in pieces for token in ids] == chat_ids(CHAT, tokenizer)
    first, second = (text for text, counted in texts(pieces, tokenizer) if counted)
    assert first == "Two." + ENDINGS[name]
    assert second.removesuffix("</s>").endswith("Of what you see: Two." + ENDINGS[name])
    assert "How" not in second
    assert "user" not in second


def test_a_template_that_rewrites_the_last_turn_is_the_reason_for_looking_it_up():
    """Qwen3's thought stands before the last turn alone: beginnings of the chat are not beginnings of its text."""
    tokenizer = published("qwen3")
    whole, begun = (tokenizer.apply_chat_template(chat, tokenize=False) for chat in (CHAT, CHAT[:2]))
    assert not whole.startswith(begun)
    assert "<think>" in texts(chat_pieces(CHAT, tokenizer), tokenizer)[-1][0]


def test_a_tokenizer_in_python_gives_the_same():
    tokenizer = published("qwen3")
    assert chat_pieces(CHAT, Slow(tokenizer)) == chat_pieces(CHAT, tokenizer)


def test_a_tokenizer_in_python_that_joins_over_a_turns_edge_is_refused():
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}"
                               "{% if add_generation_prompt %}a{% endif %}")  # fmt: skip

    class Joining(Slow):
        def __call__(self, text, **options):
            return {"input_ids": [len(text)]}

    with pytest.raises(RecipeError, match=r"task\.loss_on=all"):
        chat_pieces(CHAT, Joining(tokenizer))


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }} turns {% for m in messages %}{{ m.content }}{% endfor %}",  # the opening changes
        "{% for m in messages %}{{ m.content if loop.last else '...' }}{% endfor %}",  # earlier turns are left out
    ],
)
def test_a_template_that_hides_turns_is_refused_with_a_way_on(template):
    tokenizer = byte_tokenizer(template)
    with pytest.raises(RecipeError, match=r"task\.loss_on=all"):
        chat_pieces(CHAT, tokenizer)
    assert chat_ids(CHAT, tokenizer)


def test_pieces_become_one_row():
    tokenizer = published("llama3")
    ids, labels = join(chat_pieces(CHAT, tokenizer), limit=None)
    assert ids == chat_ids(CHAT, tokenizer)
    assert tokenizer.decode([token for token in labels if token >= 0]).startswith("Two.<|eot_id|>Of what")
