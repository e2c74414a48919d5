"""Tiny random models, tokenizers and runs for the tests of tasks."""

import io
import json

from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from adalora.tasks.recipe.fields import Recipe
from adalora.tasks.runs.runner import run_recipe

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
WORDS = [f"w{n}" for n in range(20)]
CHAT = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def word_tokenizer(words, *, end=False, chat=False):
    """Whole words as tokens; with `end`, every text gets an end token."""
    vocabulary = {word: n for n, word in enumerate([*SPECIAL, *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if end:
        inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 3)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_recipe(folder, model, **changes):
    fields = {
        "model": str(model),
        "lora": {"r": 3, "lora_alpha": 8, "target_modules": "all-linear"},
        "adalora": {"target_rank": 2},
        "output": str(folder / "run"),
    }
    return Recipe.parse({**fields, **changes})


def run(recipe):
    return run_recipe(recipe, console=Console(file=io.StringIO()))
