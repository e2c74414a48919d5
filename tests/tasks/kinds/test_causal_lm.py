import math
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adalora.errors import DataError, RecipeError
from adalora.tasks.data.rows import load_splits
from adalora.tasks.kinds.causal_lm import CausalLMTask, join

from ..tiny import WORDS, make_recipe, run, word_tokenizer, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    word_tokenizer([*WORDS, "user", "assistant", "system", ":"], chat=True).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=28, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.5, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def features(model, tmp_path, rows, *, task, columns, **training):
    recipe = make_recipe(
        tmp_path,
        model,
        task={"name": "causal-lm", **task},
        data={"files": write_rows(tmp_path / "rows.jsonl", rows), "columns": columns},
        training=training,
    )
    splits = load_splits(recipe)
    made = CausalLMTask(recipe, splits)
    tokenizer = made.processor(str(model))
    return tokenizer, made.features(splits.train, tokenizer)


def counted(tokenizer, row):
    return " ".join(tokenizer.convert_ids_to_tokens([label for label in row["labels"] if label != -100]))


def read(tokenizer, row):
    return " ".join(tokenizer.convert_ids_to_tokens(row["input_ids"]))


def test_plain_text_counts_everything(model, tmp_path):
    tokenizer, rows = features(model, tmp_path, [{"t": "w1 w2"}], task={}, columns={"text": "t"})
    assert counted(tokenizer, rows[0]) == read(tokenizer, rows[0]) == "w1 w2 </s>"


@pytest.mark.parametrize(("loss_on", "expected"), [("completion", "w3 </s>"), ("all", "w1 w2 : w3 </s>")])
def test_loss_on_completions(model, tmp_path, loss_on, expected):
    tokenizer, rows = features(
        model,
        tmp_path,
        [{"p": "w1 w2", "completion": "w3"}],
        task={"loss_on": loss_on, "separator": " : "},
        columns={"prompt": "p", "completion": "completion"},
    )
    assert read(tokenizer, rows[0]) == "w1 w2 : w3 </s>"
    assert counted(tokenizer, rows[0]) == expected


def test_template_makes_the_prompt(model, tmp_path):
    tokenizer, rows = features(
        model,
        tmp_path,
        [{"a": "w1", "b": "w2", "answer": "w3"}],
        task={"template": "w9 {b} {a} : "},
        columns={"completion": "answer"},
    )
    assert read(tokenizer, rows[0]) == "w9 w2 w1 : w3 </s>"


def test_columns_that_the_recipe_does_not_name_are_not_another_form(model, tmp_path):
    """A template may fill in a column called `text`, and data may have one beside prompt and completion."""
    row = {"text": "w1", "p": "w2", "answer": "w3"}
    for task, columns in (
        ({"template": "w9 {text} : "}, {"completion": "answer"}),
        ({"separator": " : "}, {"prompt": "p", "completion": "answer"}),
    ):
        tokenizer, rows = features(model, tmp_path, [row], task=task, columns=columns)
        assert counted(tokenizer, rows[0]) == "w3 </s>"


def test_an_empty_cell_of_a_template_is_an_empty_text(model, tmp_path):
    lines = [{"a": "w1", "b": None, "answer": "w3"}, {"a": "w1", "b": "w2", "answer": "w3"}]
    task, columns = {"template": "{a} {b} : "}, {"completion": "answer"}
    tokenizer, rows = features(model, tmp_path, lines, task=task, columns=columns)
    assert [read(tokenizer, row) for row in rows] == ["w1 : w3 </s>", "w1 w2 : w3 </s>"]
    lines[1]["answer"] = None
    with pytest.raises(DataError, match="column 'answer' is empty in 1 of 2 rows of train, beside 'w1'"):
        features(model, tmp_path, lines, task=task, columns=columns)


def test_only_the_assistants_turns_count(model, tmp_path):
    chat = [
        {"role": "system", "content": "w1"},
        {"role": "user", "content": "w2"},
        {"role": "assistant", "content": "w3"},
        {"role": "user", "content": "w4"},
        {"role": "assistant", "content": "w5"},
    ]
    tokenizer, rows = features(model, tmp_path, [{"messages": chat}], task={}, columns={"messages": "messages"})
    assert counted(tokenizer, rows[0]) == "w3 </s> w5 </s>"
    assert read(tokenizer, rows[0]).startswith("system : w1 </s> user : w2 </s> assistant : w3")


def test_prompt_and_completion_as_a_chat(model, tmp_path):
    tokenizer, rows = features(
        model,
        tmp_path,
        [{"prompt": "w1", "completion": "w2"}],
        task={"chat": True},
        columns={"prompt": "prompt", "completion": "completion"},
    )
    assert read(tokenizer, rows[0]) == "user : w1 </s> assistant : w2 </s>"
    assert counted(tokenizer, rows[0]) == "w2 </s>"


def test_a_long_row_loses_the_prompts_beginning_first():
    assert join([([1, 2, 3], False), ([4, 5], True)], limit=4) == ([2, 3, 4, 5], [-100, -100, 4, 5])
    assert join([([1], False), ([4, 5, 6], True)], limit=2) == ([4, 5], [4, 5])
    assert join([([1, 2, 3], True)], limit=2) == ([1, 2], [1, 2])


@pytest.mark.parametrize("columns", [{}, {"prompt": "p"}, {"text": "t", "messages": "m"}])
def test_the_form_of_rows_must_be_named(tmp_path, model, columns):
    with pytest.raises(RecipeError, match="causal-lm must name text or"):
        make_recipe(tmp_path, model, task="causal-lm", data={"files": "x.jsonl", "columns": columns})


def test_a_run_learns_and_generates(model, tmp_path):
    rows = [{"prompt": f"w{n % 7} w{n % 3}", "completion": "w1 w2 w3"} for n in range(60)]
    recipe = make_recipe(
        tmp_path,
        model,
        task={"name": "causal-lm", "separator": " : ", "generation": {"max_new_tokens": 5}},
        data={
            "files": write_rows(tmp_path / "rows.jsonl", rows),
            "test_fraction": 0.1,
            "columns": {"prompt": "prompt", "completion": "completion"},
        },
        training={"max_steps": 60, "batch_size": 8, "learning_rate": 3e-2},
    )
    metrics = run(recipe).metrics
    assert metrics["nll"] < 1
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["nll"]))
    assert metrics["rouge1"] > 0.5


def test_streaming_and_gradient_checkpointing(model, tmp_path):
    rows = [{"text": f"w{n % 7} w1 w2 w3"} for n in range(40)]
    recipe = make_recipe(
        tmp_path,
        model,
        task="causal-lm",
        data={
            "files": {split: write_rows(tmp_path / f"{split}.jsonl", rows) for split in ("train", "test")},
            "columns": {"text": "text"},
            "streaming": True,
            "limit": {"test": 10},
        },
        training={"max_steps": 20, "batch_size": 4, "learning_rate": 3e-2, "gradient_checkpointing": True},
    )
    result = run(recipe)
    assert result.metrics["nll"] < math.log(28)
    assert result.metrics["steps"] == 20


def test_the_cure_for_a_template_that_hides_turns(model, tmp_path):
    """With the loss on everything nobody has to know where turns begin."""
    chat = [{"role": role, "content": f"w{n}"} for n, role in enumerate(["user", "assistant", "user", "assistant"])]
    rows = {"task": {"loss_on": "all"}, "columns": {"messages": "messages"}}
    hides = shutil.copytree(model, tmp_path / "model")
    template = "{{ messages | length }} {% for m in messages %}{{ m.content }} {% endfor %}"
    (hides / "chat_template.jinja").write_text(template)
    with pytest.raises(RecipeError, match=r"task\.loss_on=all"):
        features(hides, tmp_path, [{"messages": chat}], **{**rows, "task": {}})
    tokenizer, made = features(hides, tmp_path, [{"messages": chat}], **rows)
    assert counted(tokenizer, made[0]) == read(tokenizer, made[0])
    assert read(tokenizer, made[0]).endswith("w0 w1 w2 w3")
