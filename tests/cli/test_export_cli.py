"""The commands as a user types them."""

import json
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import adalora.cli
from adalora.cli import compress, export
from adalora.errors import AdapterFileError

TARGETS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model with a tokenizer, and an adapter on it."""
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "base")
    inner = Tokenizer(
        models.WordLevel({"<pad>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, 64)}}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>").save_pretrained(root / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            LlamaForCausalLM.from_pretrained(root / "base"),
            peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, rank_pattern={"q_proj": 2}),
        )
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3)
    model.peft_config["default"].base_model_name_or_path = str(root / "base")
    model.save_pretrained(root / "adapter")
    rows = [{"text": " ".join(f"w{(i * k) % 60 + 2}" for k in range(1, 9))} for i in range(12)]
    (root / "data.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    return root


@pytest.fixture
def run(monkeypatch):
    """Run one command; returns its exit code and what it printed."""
    import typer

    app = typer.Typer()
    export.register(app)
    compress.register(app)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return call


def good(result):
    if result.exception:
        raise result.exception
    return result.output


def test_export_then_verify(folder, tmp_path, run):
    text = good(run("export", folder / "adapter", tmp_path / "out"))
    assert "portable" in text
    assert "error ‖ΔW written − ΔW‖ / ‖ΔW‖" in text
    results = json.loads(good(run("verify", tmp_path / "out", "--base", folder / "base", "--json")))
    assert {r["status"] for r in results["stacks"]} == {"exact"}
    assert len(results["stacks"]) == 15
    assert results["forward"]["difference"] < 1e-5
    table = good(run("verify", folder / "adapter", "--base", folder / "base", "--no-forward"))
    assert "SGLang" in table
    assert "refused" in table
    assert "wrong by" in table


@pytest.mark.parametrize("format", ["ragged", "gguf-ragged", "merged", "mlx", "peft-adalora"])
def test_every_format(folder, tmp_path, run, format):
    report = json.loads(good(run("export", folder / "adapter", tmp_path / "out", "--format", format, "--json")))
    assert report["format"] == format
    assert report["error"] is None or report["error"] < 1e-6
    assert (tmp_path / "out/README.md").is_file()


def test_options_reach_the_export(folder, tmp_path, run):
    (tmp_path / "scores.json").write_text('{"accuracy": 0.9}')
    (tmp_path / "history.jsonl").write_text('{"event": "metric", "split": "eval", "values": {"f1": 0.7}}\n')
    options = ("--dtype", "bfloat16", "--rank-multiple", "8", "--budget", "0.5", "--no-mlx", "--json")
    for scores, words in (("scores.json", "| accuracy | 0.9 |"), ("history.jsonl", "| eval f1 | 0.7 |")):
        out = tmp_path / scores.split(".")[0]
        report = json.loads(good(run("export", folder / "adapter", out, "--scores", tmp_path / scores, *options)))
        assert report["parameters_after"] <= 0.5 * report["parameters_before"]
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["r"] == 8
        assert words in (out / "README.md").read_text()


def test_inspect(folder, run):
    text = good(run("inspect", folder / "adapter"))
    assert "model.layers.0.mlp.up_proj" in text
    assert "95 % of the energy" in text
    report = json.loads(good(run("inspect", folder / "adapter", "--json")))
    assert len(report["modules"]) == 2 * len(TARGETS)
    assert report["budgets"]["0.9"] < report["parameters"]


def test_compress_with_and_without_data(folder, tmp_path, run):
    text = good(run("compress", folder / "adapter", tmp_path / "e", "--budget", "0.5"))
    assert "rank by energy" in text
    assert "error of ΔW" in text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = ("--data", folder / "data.jsonl", "--batch-size", "4", "--json")
        report = json.loads(good(run("compress", folder / "adapter", tmp_path / "d", *data)))
    assert report["criterion"] == "sensitivity"
    assert report["parameters_after"] <= 0.5 * report["parameters_before"]
    assert report["score"]["before"] > 0
    assert report["score"]["after"] > 0
    assert {m["rank_before"] for m in report["modules"].values()} == {2, 4}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("export", "{tmp}/none", "{tmp}/out"), "no adapter at"),
        (("export", "{root}/base", "{tmp}/out"), "no adapter_config.json"),
        (("export", "{root}/adapter", "{tmp}/out", "--format", "onnx"), "unknown format"),
        (("export", "{root}/adapter", "{root}/base"), "not empty"),
        (("export", "{root}/adapter", "{tmp}/out", "--base", "{tmp}/nowhere"), "cannot be read"),
        (("verify", "{tmp}/none"), "no adapter at"),
        (("inspect", "{tmp}/none"), "no adapter at"),
        (("compress", "{root}/adapter", "{tmp}/out", "--budget", "0"), "budget 0"),
        (("compress", "{root}/adapter", "{tmp}/out", "--format", "x"), "unknown format"),
    ],
)
def test_errors_are_one_line_and_write_nothing(folder, tmp_path, run, arguments, words):
    result = run(*(a.format(tmp=tmp_path, root=folder) for a in arguments))
    assert isinstance(result.exception, AdapterFileError)
    assert words in str(result.exception)
    assert "\n" not in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_main_turns_an_error_into_one_line_and_code_2(tmp_path):
    code = "import sys; sys.argv = ['adalora', 'export', 'none', 'out']; from adalora.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == ["error: no adapter at none"]
    assert adalora.cli.app is not None
