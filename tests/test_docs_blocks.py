"""The Python of README and guides runs; their shell lines name commands, options and recipes that exist.

Blocks of the other pages run beside what they are about: `docs/training.md` in `tests/integrations`,
`docs/reading-the-report.md` in `tests/report`. Those of `docs/serving.md` need other servers; `tests/export` runs the
ones that a CPU can.
"""

import re
import shlex

import datasets
import pytest
import tokenizers
import torch
import transformers as hf
import trl
import typer
from peft import LoraConfig, get_peft_model
from typer.main import get_command

import adalora
from adalora.tasks.recipe_files import catalogue
from docs_blocks import ROOT, run, sections

PAGES = ("docs/index.md", "docs/choosing-a-budget.md", "docs/migrating.md")
RUN_ELSEWHERE = {"docs/training.md", "docs/reading-the-report.md", "docs/serving.md"}
DOCS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
WORDS = {word: number for number, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", "cat", "dog", "sat", "ran"))}


def bert():
    config = hf.BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    return hf.BertForSequenceClassification(config)


def llama():
    config = hf.LlamaConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    return hf.LlamaForCausalLM(config)


def rows(count):
    inputs = torch.randint(0, 100, (count, 10))
    return [{"input_ids": row, "labels": int(row[0] > 50)} for row in inputs]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_blocks_of(page, tmp_path):
    inputs = torch.randint(0, 100, (4, 10))
    names = {
        "base": bert(),
        "fresh_base": bert,
        "dataset": rows(16),
        "batches": [{"input_ids": inputs, "labels": (inputs[:, 0] > 50).long()}] * 20,
        "folder": str(tmp_path),
    }
    for title, blocks in sections(page).items():
        for block in blocks:
            run(block, names, where=f"{page}: {title}")
    if page == "docs/index.md":
        assert names["controller"].finished
        assert names["served"].peft_config["default"].peft_type == "LORA"
        assert names["trainer"].state.global_step == 20
    else:
        assert names["controller" if "controller" in names else "model"] is not None


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")  # TRL's
def test_blocks_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (own, trainer, supervised) = sections("README.md")["The one line"]
    names = {"base": bert()}
    run(own, names, where="README.md")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert list(adalora.controllers(names["model"])) == ["default"]

    common = {"max_steps": 6, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = hf.TrainingArguments(output_dir="trained", **common)
    lora = LoraConfig(r=12, target_modules="all-linear", task_type="SEQ_CLS")
    names = {"adalora": adalora, "Trainer": hf.Trainer, "args": arguments, "rows": rows(16)}
    names["model"] = get_peft_model(bert(), lora)
    run(trainer, names, where="README.md")
    names["trainer"].train()
    (controller,) = adalora.controllers(names["model"]).values()
    assert controller.finished
    assert controller.live == 8 * len(controller.handles)

    names = {"adalora": adalora, "LoraConfig": LoraConfig, "SFTTrainer": SupervisedTrainer, "base": llama()}
    names["args"] = trl.SFTConfig(output_dir="tuned", max_length=16, bf16=False, **common)
    names["rows"] = datasets.Dataset.from_dict({"text": ["cat sat dog ran"] * 8})
    run(supervised, names, where="README.md")
    names["trainer"].train()
    (controller,) = adalora.controllers(names["trainer"].model).values()
    assert controller.finished
    assert controller.live == 8 * len(controller.handles)


class SupervisedTrainer(trl.SFTTrainer):
    """TRL's, with a tokenizer at hand: by itself it asks the hub for the model's."""

    def __init__(self, **fields):
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="<unk>"))
        words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        super().__init__(processing_class=hf.PreTrainedTokenizerFast(tokenizer_object=words, **special), **fields)


def test_every_page_with_python_is_run_somewhere():
    assert {page for page in DOCS if sections(page)} <= {*PAGES, *RUN_ELSEWHERE}


def commands():
    """Every command of the real command line, by name."""
    from adalora.cli import commands as all_of_them

    app = typer.Typer()
    all_of_them.register(app)
    return get_command(app).commands


@pytest.mark.parametrize("page", ["README.md", *DOCS])
def test_shell_lines(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    known = commands()
    for block in re.findall(r"```(?:bash|shell)?\n(.*?)```", text, re.DOTALL):
        for line in re.findall(r"^adalora (.+)$", block, re.MULTILINE):
            name, *words = shlex.split(line, comments=True)
            assert name in known, line
            options = {option for parameter in known[name].params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= options, line
            if name == "train" and not words[0].endswith((".yaml", "NAME")):
                assert words[0] in {entry.name for entry in catalogue()}, line
