import json
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from adalora.errors import AdapterFileError
from adalora.export import FORMATS, export_adapter, read_adapter, verify_adapter
from helpers.oldest import loads_every_adapter

from .conftest import LAYERS, RAGGED, SUFFIXES, llama, load_peft, logits, randomise, save_lora, save_ragged

PEFT_FORMATS = [f for f in FORMATS if f not in ("merged", "mlx")]


@pytest.fixture
def run(tmp_path, base_folder):
    """A finished adaptive run on a base that lies beside it, and its outputs."""
    model = save_ragged(tmp_path / "run", base_folder)
    return tmp_path / "run", logits(model)


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("format", PEFT_FORMATS)
def test_every_layout_gives_the_same_outputs_in_peft(tmp_path, run, format):
    source, wanted = run
    report = export_adapter(source, tmp_path / "out", format=format)
    assert report.error < 1e-6
    assert max(report.errors.values()) < 1e-6
    assert (logits(load_peft(tmp_path / "out")) - wanted).abs().max() < 2e-6
    assert report.bytes == sum(f.stat().st_size for f in (tmp_path / "out").rglob("*") if f.is_file())


def test_merged_weights_give_the_same_outputs(tmp_path, run):
    source, wanted = run
    export_adapter(source, tmp_path / "out", format="merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(merged) - wanted).abs().max() < 2e-6
    assert (tmp_path / "out/README.md").is_file()


def test_portable_is_uniform_and_complete(tmp_path, run):
    export_adapter(run[0], tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert (config["r"], config["lora_alpha"]) == (16, 16)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert not config["use_rslora"]
    assert config["target_modules"] == sorted(s.split(".")[-1] for s in SUFFIXES)
    assert config["exclude_modules"] is None
    with safe_open(str(tmp_path / "out/adapter_model.safetensors"), "pt") as file:
        shapes = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
    assert len(shapes) == 2 * LAYERS * len(SUFFIXES)
    assert all(s[0 if "lora_A" in k else 1] == 16 for k, s in shapes.items())


def test_ragged_is_the_smallest(tmp_path, run):
    export_adapter(run[0], tmp_path / "out", format="ragged")
    config = config_of(tmp_path / "out")
    live = {n: r for n, r in RAGGED.items() if r}
    top = max(live.values())
    assert config["r"] == config["lora_alpha"] == top
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["rank_pattern"] == {"^" + n.replace(".", r"\."): r for n, r in live.items() if r != top}
    adapter = read_adapter(tmp_path / "out")
    assert adapter.ranks == live
    assert set(config["target_modules"]) == set(live)


def test_gguf_ragged_has_no_alpha_pattern(tmp_path, run):
    export_adapter(run[0], tmp_path / "out", format="gguf-ragged")
    config = config_of(tmp_path / "out")
    assert config["alpha_pattern"] == {}
    assert isinstance(config["lora_alpha"], int)


@pytest.mark.parametrize(
    ("rank", "multiple", "wanted"), [(16, None, 16), (17, None, 32), (17, 8, 24), (3, 8, 8), (9, 1, 9)]
)
def test_ranks_are_padded_to_the_next_allowed_size_only(tmp_path, rank, multiple, wanted):
    save_lora(tmp_path / "a", r=rank, target_modules=["gate_proj", "up_proj"])
    export_adapter(tmp_path / "a", tmp_path / "out", rank_multiple=multiple, mlx=False)
    assert config_of(tmp_path / "out")["r"] == wanted
    assert not (tmp_path / "out/mlx").exists()


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("bfloat16", 8e-3), ("float16", 1e-3)])
def test_dtype_is_stored_and_its_rounding_reported(tmp_path, dtype, error):
    save_lora(tmp_path / "a")
    report = export_adapter(tmp_path / "a", tmp_path / "out", dtype=dtype)
    assert report.error < error
    assert dtype == "float32" or report.error > 1e-5
    assert str(read_adapter(tmp_path / "out").dtype) == f"torch.{dtype}"
    again = export_adapter(tmp_path / "out", tmp_path / "again")
    assert str(read_adapter(tmp_path / "again").dtype) == f"torch.{dtype}"
    assert again.error < error


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path):
    model = save_lora(tmp_path / "a")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(1e6)
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterFileError, match="above the range"):
        export_adapter(tmp_path / "a", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_truncation_says_its_error(tmp_path, run):
    cut = export_adapter(run[0], tmp_path / "half", budget=0.5)
    assert cut.parameters_after <= 0.5 * cut.parameters_before
    assert 0.1 < cut.error < 1
    assert cut.error == pytest.approx((1 - cut.kept_energy) ** 0.5, rel=1e-4)
    kept = export_adapter(run[0], tmp_path / "most", energy=0.95)
    assert kept.kept_energy >= 0.95
    assert kept.error <= 0.05**0.5 + 1e-6
    assert f"{cut.error:.1e}" in (tmp_path / "half/README.md").read_text()


def test_without_clean_up_the_matrices_stay(tmp_path):
    save_lora(tmp_path / "a", lora_alpha=4)
    export_adapter(tmp_path / "a", tmp_path / "out", format="ragged", reorthonormalise=False)
    name = "model.layers.0.mlp.up_proj"
    before, after = (read_adapter(tmp_path / f).factors[name] for f in ("a", "out"))
    assert torch.equal(before.left, after.left)
    assert torch.equal(before.right, after.right)


def test_missing_fused_partners_are_added(tmp_path, base_folder):
    save_lora(tmp_path / "q", target_modules=["q_proj", "up_proj"])
    guessed = export_adapter(tmp_path / "q", tmp_path / "guessed")
    assert any("SGLang cannot load q_proj without v_proj" in note for note in guessed.notes)
    assert set(config_of(tmp_path / "guessed")["target_modules"]) == {"q_proj", "up_proj", "gate_proj"}
    known = export_adapter(tmp_path / "q", tmp_path / "known", base=str(base_folder))
    assert known.notes == ()
    assert set(config_of(tmp_path / "known")["target_modules"]) == {"q_proj", "v_proj", "up_proj", "gate_proj"}
    results = {r.stack: r.status for r in verify_adapter(tmp_path / "known", base=str(base_folder))}
    assert set(results.values()) == {"exact"}


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    return BertForSequenceClassification(config).eval()


def save_bert(folder, base):
    bert().save_pretrained(base)
    model = randomise(
        peft.get_peft_model(bert(), peft.LoraConfig(r=3, target_modules="all-linear", task_type="SEQ_CLS"))
    )
    model.base_model.model.classifier.modules_to_save["default"].weight.data.normal_()
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize("format", ["portable", "ragged", "gguf-ragged", "peft-adalora", "merged"])
def test_a_classifier_keeps_its_trained_head(tmp_path, format):
    live = save_bert(tmp_path / "a", tmp_path / "base")
    x = torch.randint(0, 40, (2, 7))
    with torch.no_grad():
        wanted = live(x).logits
        export_adapter(tmp_path / "a", tmp_path / "out", format=format)
        if format == "merged":
            got = BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()(x).logits
        else:
            got = load_peft(tmp_path / "out", bert())(x).logits
        change = (wanted - bert()(x).logits).abs().max()
    assert (got - wanted).abs().max() < 1e-5 * change


@loads_every_adapter
def test_servers_of_language_models_say_that_a_classifier_is_not_theirs(tmp_path):
    save_bert(tmp_path / "a", tmp_path / "base")
    results = {r.stack: r for r in verify_adapter(tmp_path / "a")}
    assert results["PEFT"].status == results["transformers"].status == "exact"
    assert results["vLLM ≥ 0.32"].status == "not served"
    assert "'query'" in results["SGLang"].reason or "no module" in results["SGLang"].reason


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_tied_embeddings_are_untied_when_merged(tmp_path):
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    live = randomise(
        peft.get_peft_model(
            llama(tie_word_embeddings=True), peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
        )
    ).eval()
    live.save_pretrained(tmp_path / "a")
    wanted = logits(live)
    export_adapter(tmp_path / "a", tmp_path / "out", format="merged", base=str(tmp_path / "base"))
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert not merged.config.tie_word_embeddings
    assert (logits(merged) - wanted).abs().max() < 2e-6


def test_the_card(tmp_path, run):
    export_adapter(run[0], tmp_path / "card", scores={"accuracy": 0.875, "f1": 0.5})
    text = (tmp_path / "card/README.md").read_text()
    _, front, body = text.split("---\n", 2)
    meta = yaml.safe_load(front)
    assert meta["base_model"] == "base"
    assert meta["library_name"] == "peft"
    assert {m["type"]: m["value"] for m in meta["model-index"][0]["results"][0]["metrics"]} == {
        "accuracy": 0.875,
        "f1": 0.5,
    }
    assert str(tmp_path) not in text
    assert "| accuracy | 0.875 |" in body
    assert "| model.layers.0.mlp.down_proj | 2 |" in body
    for words in (
        "PeftModel.from_pretrained",
        "vllm serve base",
        "sglang.launch_server",
        "llama-server",
        "mlx_lm.server",
    ):
        assert words in body


def test_the_card_cannot_be_used_to_inject_yaml(tmp_path):
    save_lora(tmp_path / "a")
    file = tmp_path / "a/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": 'x"\nevil: true\n---\n'}))
    export_adapter(tmp_path / "a", tmp_path / "out", format="ragged")
    front = (tmp_path / "out/README.md").read_text().split("---\n")[1]
    assert "evil" not in yaml.safe_load(front)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "onnx"}, "unknown format 'onnx'; allowed are portable"),
        ({"format": "merged"}, "needs the base model: add --base"),
        ({"base": "nowhere/at-all"}, "cannot be read"),
        ({"dtype": "int8"}, "dtype 'int8'; allowed are"),
        ({"rank_multiple": 0}, "rank multiple 0"),
    ],
)
def test_bad_requests_write_nothing(tmp_path, options, words):
    save_lora(tmp_path / "a")
    with pytest.raises(AdapterFileError, match=words) as caught:
        export_adapter(tmp_path / "a", tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a"]


def test_a_base_that_does_not_fit_is_named(tmp_path):
    save_lora(tmp_path / "a")
    llama(hidden_size=48).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterFileError, match=r"shape mismatch at model\.layers\.0\.\S+: the adapter's ΔW is \d+×\d+"):
        export_adapter(tmp_path / "a", tmp_path / "out", base=str(tmp_path / "other"))
    bert().save_pretrained(tmp_path / "bert")
    with pytest.raises(AdapterFileError, match="has no module"):
        verify_adapter(tmp_path / "a", base=str(tmp_path / "bert"))


def test_an_output_that_is_there_is_kept(tmp_path):
    save_lora(tmp_path / "a")
    export_adapter(tmp_path / "a", tmp_path / "out")
    before = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    with pytest.raises(AdapterFileError, match="not empty"):
        export_adapter(tmp_path / "a", tmp_path / "out", format="ragged")
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == before
    export_adapter(tmp_path / "a", tmp_path / "out", format="ragged", overwrite=True)
    assert not (Path(tmp_path) / "out/mlx").exists()
    assert config_of(tmp_path / "out")["r"] == 4


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()


@pytest.mark.parametrize("format", ["portable", "ragged", "merged"])
def test_transposed_linear_layers(tmp_path, format):
    """GPT-2's Conv1D stores its weight the other way round."""
    gpt2().save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        r=3, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    live = randomise(peft.get_peft_model(gpt2(), settings)).eval()
    live.save_pretrained(tmp_path / "a")
    wanted = logits(live)
    export_adapter(tmp_path / "a", tmp_path / "out", format=format, base=str(tmp_path / "base"))
    if format == "merged":
        got = logits(GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval())
    else:
        got = logits(load_peft(tmp_path / "out", gpt2()))
    assert (got - wanted).abs().max() < 1e-5 * (wanted - logits(gpt2())).abs().max()
