"""Every shell line of README and docs is run, on small stand-ins that have the names of the page.

A line that cannot be run here is listed with the reason and the options that it may have; a line that is neither run
nor listed fails. Where a recipe or suite of the package is named, a small file of that name lies in the working folder,
which is what the command line takes first.
"""

import json
import re
import shutil
import warnings

import peft
import pytest
import torch
import transformers as hf
import typer
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from adalora.cli import commands as all_commands
from adalora.compare.files import load_suite
from adalora.tasks.recipe.fields import Recipe
from adalora.tasks.recipe.files import find_recipe
from helpers.docs_blocks import ROOT, blocks, commands, pages

LANGUAGES = {"python", "bash", "yaml", "toml", "dockerfile"}
SERVER = "a server that is not installed here; tests/export/test_stacks.py computes what it computes"
# First words of a line -> why it is not run, and its options.
NOT_RUN = {
    "make": ("it would install and train; tests/test_habits.py looks at the Makefile", set()),
    "pip install": ("installs from the index", {"--no-deps"}),
    "adalora compare small": ("an hour; it is planned below, --processes runs in tests/compare", {"--processes"}),
    "adalora compare core": ("hours; it is planned below", {"--processes"}),
    "adalora compare full": ("days; it is planned below", {"--processes"}),
    "torchrun": ("tests/tasks/runs/test_launchers.py runs it", {"--standalone", "--nproc-per-node", "-m"}),
    "accelerate launch": ("tests/tasks/runs/test_launchers.py runs it", {"--multi_gpu", "--num_processes", "-m"}),
    "vllm serve": (SERVER, {"--enable-lora", "--max-lora-rank", "--lora-modules"}),
    "python -m sglang.launch_server": (
        SERVER,
        {"-m", "--model-path", "--enable-lora", "--lora-paths", "--max-lora-rank"},
    ),
    "text-generation-launcher": (SERVER, {"--model-id", "--lora-adapters"}),
    "lorax-launcher": (SERVER, {"--model-id", "--adapter-id", "--adapter-source"}),
    "llama-server": ("tests/export/test_real_stacks.py loads such a file into llama.cpp", {"-m", "--lora"}),
    "ollama create": (SERVER, {"-f"}),
    "lmdeploy serve api_server": (SERVER, {"--backend", "--adapters"}),
    "olive convert-adapters": (SERVER, {"--adapter_path", "--output_path"}),
    "python -m onnxruntime_genai.models.builder": (SERVER, {"-m", "-o", "-p", "-e", "--extra_options"}),
    "mlx_lm.server": ("tests/export/test_real_stacks.py loads such a folder", {"--model", "--adapter-path"}),
}
ANSWERS = ["classification", "base", "rows.jsonl", "text", "label", "8"]  # to `adalora init`
MOODS = {"good": "positive", "nice": "positive", "bad": "negative", "awful": "negative"}
WORDS = [*MOODS, "flight", "bag", "the", "was", "my", "lost", "is", "again"]
PAGES = [page for page in pages() if commands(page)]


def listed(words):
    """The entry of `NOT_RUN` for a line."""
    return next((start for start in NOT_RUN if words[: len(start.split())] == start.split()), None)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows(count):
    first = [list(MOODS)[n % 4] for n in range(count)]
    return [
        {"text": f"{word} {WORDS[4 + n % 8]} {WORDS[4 + n % 5]}", "label": MOODS[word]} for n, word in enumerate(first)
    ]


def encoder(folder):
    (folder / "vocab.txt").parent.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    hf.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = hf.BertConfig(
        vocab_size=5 + len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    hf.BertModel(config).save_pretrained(folder)


def decoder(folder):
    config = hf.LlamaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, **{w: n for n, w in enumerate(WORDS, 2)}}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)


def adapter(folder, base, config):
    """An adapter with values, as training leaves it."""
    model = peft.get_peft_model(hf.LlamaForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.peft_config["default"].base_model_name_or_path = base.name
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Models, adapters, data, a recipe and a suite, under the names that the pages use."""
    folder = tmp_path_factory.mktemp("pages")
    encoder(folder / "base")
    decoder(folder / "BASE")
    write_lines(folder / "rows.jsonl", rows(80))
    for name in ("new.jsonl", "dev.jsonl"):
        write_lines(folder / name, rows(12))
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter(folder / "ADAPTER", folder / "BASE", peft.LoraConfig(**lora))
        old = {"init_r": 4, "target_r": 2, "total_step": 10, **{k: v for k, v in lora.items() if k != "r"}}
        adapter(folder / "OLD_ADAPTER", folder / "BASE", peft.AdaLoraConfig(**old))
    recipe = {
        "model": "base",
        "task": "classification",
        "data": {"files": "rows.jsonl", "validation_fraction": 0.2, "test_fraction": 0.2},
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "adalora": {"target_rank": 2},
        "training": {"max_steps": 12, "batch_size": 8, "learning_rate": 1e-2, "max_length": 16},
        "diagnostics": {"min_steps": 1000},
        "output": "runs/airline-sentiment",
    }
    (folder / "airline-sentiment").write_text(json.dumps(recipe))
    (folder / "my-recipe.yaml").write_text(json.dumps(recipe))
    suite = {"tasks": [{"recipe": "airline-sentiment"}], "methods": ["lora", "ours"], "learning_rates": [0.01]}
    (folder / "smoke").write_text(json.dumps({**suite, "seeds": [1, 2], "steps": 6, "budgets": [2]}))
    return folder


@pytest.fixture
def here(stand_ins, tmp_path, monkeypatch):
    """A working folder with the stand-ins in it."""
    monkeypatch.chdir(shutil.copytree(stand_ins, tmp_path / "here"))
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path / "here"


@pytest.fixture(scope="module")
def adalora():
    """Run one `adalora` line in this process; returns what it printed."""
    app = typer.Typer()
    all_commands.register(app)

    def call(*words):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = CliRunner().invoke(app, list(words), input="\n".join(ANSWERS) + "\n")
        if done.exit_code != 0:
            raise AssertionError(f"adalora {' '.join(words)}: {done.output}") from done.exception
        return done.output

    return call


def prepare(page, here, adalora):
    """What a page takes for done: earlier runs, under the names it gives them."""
    if page in ("docs/choosing-a-budget.md", "docs/reading-the-report.md"):
        adalora("train", "airline-sentiment")
    if page == "docs/reading-the-report.md":
        for name in ("demo", "seed0", "seed1"):
            shutil.copytree(here / "runs" / "airline-sentiment", here / "runs" / name)
    if page == "docs/serving.md":
        shutil.copytree(here / "ADAPTER", here / "runs" / "demo" / "adapter")


@pytest.mark.parametrize("page", PAGES)
def test_every_line_runs_or_is_listed(page, here, adalora):
    prepare(page, here, adalora)
    for words in commands(page):
        start = listed(words)
        if start is not None:
            options = {word.split("=")[0] for word in words if word.startswith("-")}
            assert options <= NOT_RUN[start][1], words
        else:
            assert words[0] == "adalora", f"{page}: neither run nor listed: {' '.join(words)}"
            adalora(*words[1:])
    written = {
        "docs/budget-curve.md": ["runs/airline-sentiment/curve.json", "out/adapter_model.safetensors"],
        "docs/comparing.md": ["runs/compare-smoke/report.html"],
        "docs/index.md": ["runs/demo/report.html", "recipe.yaml", "served/adapter_model.safetensors"],
        "docs/migrating.md": ["served/adapter_model.safetensors"],
        "docs/reading-the-report.md": ["runs/demo/report.html", "both.html", "data"],
        "docs/serving.md": ["gguf/adapter.gguf", "served/mlx", "better/adapter_model.safetensors"],
    }
    for file in written.get(page, []):
        assert (here / file).exists(), file


def test_what_is_listed_is_on_a_page_and_stays_true():
    lines = [words for page in PAGES for words in commands(page)]
    assert set(NOT_RUN) == {listed(words) for words in lines} - {None}
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1).split()
    extras = (ROOT / "pyproject.toml").read_text()
    for words in lines:
        if words[0] == "make":
            assert set(words[1:]) <= set(targets)
        for extra in re.findall(r"^(?:adalora|\.)\[(\w+)\]$", words[-1]):
            assert re.search(rf"^{extra} = \[", extras, re.MULTILINE)
        if words[:2] == ["pip", "install"] and words[2].startswith("./"):
            assert (ROOT / words[2] / "pyproject.toml").is_file()


@pytest.mark.parametrize("suite", ["smoke", "small", "core", "full"])
def test_the_real_suites_are_planned(suite, tmp_path, monkeypatch, adalora):
    monkeypatch.chdir(tmp_path)
    assert "cells to run" in adalora("compare", suite, "--dry-run")


def test_the_names_mean_what_comes_with_the_package(tmp_path, monkeypatch):
    """The stand-ins hide them only in their own folder."""
    monkeypatch.chdir(tmp_path)
    assert find_recipe("airline-sentiment")[0].parent.name == "recipes"


def test_other_blocks(here):
    found = [(page, language, text) for page in pages() for _, language, text in blocks(page)]
    recipe: dict[str, object] = {}
    assert {language for _, language, _ in found} <= LANGUAGES  # a block without one would be overlooked
    for page, language, text in found:
        if page == "docs/recipes.md" and language == "yaml":
            recipe = {**recipe, **yaml.safe_load(text)}  # the first is whole, the others are parts of it
            Recipe.parse(recipe, where=page)
        elif language == "yaml":
            (here / "suite.yaml").write_text(text)
            assert load_suite(here / "suite.yaml").tasks, page
    (model_file,) = (text for _, language, text in found if language == "dockerfile")
    assert "ADAPTER ./gguf/adapter.gguf" in model_file  # what `adalora export` on that page has written
