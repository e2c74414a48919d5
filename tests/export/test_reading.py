import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from adalora.errors import AdapterFileError
from adalora.export import read_adapter
from adalora.export.reading import match_pattern, rank_and_scale

from .conftest import RAGGED, llama, save_files, save_lora, save_ragged

NAME = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{NAME}"


def pair(r=2, d_out=6, d_in=4):
    return {f"{KEY}.lora_A.weight": torch.randn(r, d_in), f"{KEY}.lora_B.weight": torch.randn(d_out, r)}


def config(**changes):
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **changes}


def deltas(model):
    return {
        name.removeprefix("base_model.model."): m.get_delta_weight("default").detach()
        for name, m in model.named_modules()
        if hasattr(m, "get_delta_weight") and "default" in m.scaling
    }


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}]
)
def test_delta_is_what_peft_computes(tmp_path, settings):
    live = save_lora(tmp_path / "a", **settings)
    adapter = read_adapter(tmp_path / "a")
    wanted = deltas(live)
    assert set(adapter.factors) == set(wanted)
    for name, f in adapter.factors.items():
        assert torch.allclose(f.delta(), wanted[name], atol=1e-6)


def test_a_finished_adaptive_run(tmp_path):
    live = save_ragged(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    assert adapter.ranks == {n: r for n, r in RAGGED.items() if r}
    for name, delta in deltas(live).items():
        assert torch.allclose(adapter.factors[name].delta(), delta, atol=1e-6)


def test_embeddings_and_convolutions(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(11, 6)
            self.one, self.two = nn.Conv1d(6, 5, 3), nn.Conv2d(2, 4, (3, 2))

    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["words", "one", "two"]))
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert {n: f.kind for n, f in adapter.factors.items()} == {
        "words": "embedding",
        "one": "conv",
        "two": "conv",
    }
    for name, delta in deltas(model).items():
        got = adapter.factors[name].delta()
        got = got.T if name == "words" else got.reshape(delta.shape)
        assert torch.allclose(got, delta, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_B"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"r": 3}, "rank 2, adapter_config.json says 3"),
        ({"r": "2"}, "whole number"),
        ({"r": 0}, "whole number"),
        ({"lora_alpha": "x"}, "finite number"),
        ({"lora_alpha": float("inf")}, "finite number"),
        ({"rank_pattern": [1]}, "must be an object"),
        ({"rank_pattern": {"(": 2}}, "no regular expression"),
        ({"rank_pattern": {"(a+)+b": 2}}, "repeats a group"),
    ],
)
def test_configs_without_a_plain_meaning_are_refused(tmp_path, changes, words):
    save_files(tmp_path / "a", config(**changes), pair())
    with pytest.raises(AdapterFileError, match=words) as caught:
        read_adapter(tmp_path / "a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "no lora_A and lora_B"),
        ({f"{KEY}.lora_A.weight": torch.ones(2, 4)}, "lora_A and lora_B are wanted"),
        ({**pair(), f"{KEY}.lora_E": torch.ones(2, 1)}, "AdaLoRA"),
        ({**pair(), f"{KEY}.lora_magnitude_vector.weight": torch.ones(6)}, "no plain form"),
        (
            {f"{KEY}.lora_A.weight": torch.ones(2, 4), f"{KEY}.lora_B.weight": torch.ones(6, 3)},
            "share a rank",
        ),
        (
            {f"{KEY}.lora_A.weight": torch.ones(2, 4).long(), f"{KEY}.lora_B.weight": torch.ones(6, 2)},
            "float",
        ),
        (
            {f"{KEY}.lora_A.weight": torch.full((2, 4), torch.nan), f"{KEY}.lora_B.weight": torch.ones(6, 2)},
            "NaN",
        ),
        ({**pair(), f"{KEY}.lora_A.other.weight": torch.ones(2, 4)}, "twice"),
    ],
)
def test_files_that_do_not_hold_an_adapter_are_refused(tmp_path, tensors, words):
    save_files(tmp_path / "a", config(), tensors)
    with pytest.raises(AdapterFileError, match=words):
        read_adapter(tmp_path / "a")


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(AdapterFileError, match="no adapter at"):
        read_adapter(tmp_path / "none")
    with pytest.raises(AdapterFileError, match=r"no adapter_config\.json"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config()))
    with pytest.raises(AdapterFileError, match=r"no adapter_model\.safetensors"):
        read_adapter(tmp_path)


def test_a_pickle_is_never_read_and_its_conversion_works(tmp_path, monkeypatch):
    save_lora(tmp_path / "a")
    tensors = load_file(str(tmp_path / "a/adapter_model.safetensors"))
    (tmp_path / "a/adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "a/adapter_model.bin")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
        with pytest.raises(AdapterFileError, match="pickle") as caught:
            read_adapter(tmp_path / "a")
    code = str(caught.value).split('python -c "')[1].rstrip('"')
    monkeypatch.chdir(tmp_path / "a")
    exec(code, {})
    assert len(read_adapter(tmp_path / "a").factors) == len(tensors) // 2


def test_patterns_match_as_in_peft():
    from peft.utils.other import get_pattern_key

    patterns = {"^model\\.layers\\.0\\.q_proj": 1, "q_proj": 2, "layers\\.1\\.v_proj": 3, "mlp.*": 4}
    for name in (
        "model.layers.0.q_proj",
        "model.layers.1.q_proj",
        "a.layers.1.v_proj",
        "x.mlp.up",
        "xq_proj",
        "k_proj",
    ):
        key = get_pattern_key(patterns.keys(), name)
        assert match_pattern(patterns, name) == patterns.get(key)
    assert rank_and_scale({"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}}, "a.q_proj") == (2, 4.0)


def test_names_with_an_adapter_name_or_without_prefix(tmp_path):
    tensors = {
        f"{NAME}.lora_A.default.weight": torch.ones(2, 4),
        f"{NAME}.lora_B.default.weight": torch.ones(6, 2),
    }
    save_files(tmp_path / "a", config(), tensors)
    assert list(read_adapter(tmp_path / "a").factors) == [NAME]


def test_a_trained_head_is_kept_apart(tmp_path):
    live = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    live.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert list(adapter.extras) == ["base_model.model.lm_head.weight"]
    assert adapter.leaves == ["q_proj"]
