"""The Python of README and guides runs.

Blocks of the other pages run beside what they are about, see `RUN_ELSEWHERE`; shell lines in `test_docs_shell.py`.
"""

import datasets
import pytest
import tokenizers
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

import adalora
from helpers.docs_blocks import ROOT, pages, run, sections

trl = pytest.importorskip("trl")

PAGES = ("docs/index.md", "docs/choosing-a-budget.md", "docs/migrating.md")
RUN_ELSEWHERE = {
    "docs/training.md": "tests/integrations/test_training_docs.py",
    "docs/reading-the-report.md": "tests/report/test_reading_docs.py",
    "docs/serving.md": "tests/export/test_docs.py",
    "examples/plugin-package/README.md": "tests/examples/test_plugin_package.py",
}
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
    (own, trainer, supervised) = sections("README.md")["Use"]
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
    assert {page for page in pages() if sections(page)} == {"README.md", *PAGES, *RUN_ELSEWHERE}
    for page, test in RUN_ELSEWHERE.items():
        assert page.rpartition("/")[2] in (ROOT / test).read_text(encoding="utf-8")
