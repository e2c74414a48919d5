import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import adalora
from adalora.errors import AdapterFileError
from adalora.export import adapter_from_loralib, export_adapter, inspect_adapter, read_adapter

from .conftest import llama, load_peft, logits, randomise, save_files, tokens

NAME = "model.layers.0.self_attn.q_proj"


def save_adalora(folder, *, prune):
    """A PEFT AdaLoRA adapter, pruned by PEFT itself or not; returns the model as PEFT loads the file."""
    settings = peft.AdaLoraConfig(
        init_r=6, target_r=3, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"],
        total_step=12, tinit=1, tfinal=2, deltaT=1,
    )  # fmt: skip
    model = peft.get_peft_model(llama(), settings)
    randomise(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, 12 if prune else 1):
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT about its own empty matrices
        model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("format", ["portable", "ragged"])
def test_peft_adalora_becomes_plain_lora_exactly(tmp_path, prune, format):
    save_adalora(tmp_path / "a", prune=prune)
    wanted = logits(load_peft(tmp_path / "a"))
    report = export_adapter(tmp_path / "a", tmp_path / "out", format=format)
    assert report.error < 1e-6
    got = logits(load_peft(tmp_path / "out"))
    assert (got - wanted).abs().max() < 2e-6
    assert (wanted - logits(llama())).abs().max() > 1e-2
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert sum(report.ranks.values()) <= (9 * 3 if prune else 9 * 6)


def change(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_null_total_step_does_not_matter(tmp_path):
    save_adalora(tmp_path / "a", prune=False)
    wanted = read_adapter(tmp_path / "a")
    change(tmp_path / "a", total_step=None)
    with pytest.raises(ValueError, match="total_step"):
        load_peft(tmp_path / "a")  # what stock PEFT says
    got = read_adapter(tmp_path / "a")
    assert torch.equal(got.factors[NAME].delta(), wanted.factors[NAME].delta())


def test_full_size_files_with_a_boolean_pattern_are_cut(tmp_path):
    save_adalora(tmp_path / "a", prune=False)
    full = read_adapter(tmp_path / "a").factors[NAME]
    mask = [True, False, True, False, False, True]
    change(tmp_path / "a", rank_pattern={f"{NAME}.lora_E": [[m] for m in mask]})
    cut = read_adapter(tmp_path / "a").factors[NAME]
    keep = torch.tensor(mask)
    assert cut.rank == 3
    assert torch.allclose(cut.delta(), (full.left * full.values)[:, keep] @ full.right[keep], atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank_pattern": {f"{NAME}.lora_E": [True, False]}}, "keeps 1 of 2 triplets"),
        ({"rank_pattern": {f"{NAME}.lora_E": 3}}, "list of booleans"),
        ({"rank_pattern": [1]}, "object or null"),
        ({"init_r": 0}, "init_r"),
        ({"lora_alpha": "8"}, "lora_alpha"),
    ],
)
def test_wrong_adalora_configs_are_named(tmp_path, changes, words):
    save_adalora(tmp_path / "a", prune=False)
    change(tmp_path / "a", **changes)
    with pytest.raises(AdapterFileError, match=words):
        read_adapter(tmp_path / "a")


def test_masked_triplets_with_zero_singular_value_vanish(tmp_path):
    A, B, E = torch.randn(4, 8), torch.randn(6, 4), torch.tensor([[0.5], [0.0], [0.25], [0.0]])
    key = f"base_model.model.{NAME}"
    config = {
        "peft_type": "ADALORA",
        "init_r": 4,
        "lora_alpha": 2,
        "rank_pattern": None,
        "target_modules": ["q_proj"],
    }
    save_files(tmp_path / "a", config, {f"{key}.lora_A": A, f"{key}.lora_B": B, f"{key}.lora_E": E})
    f = read_adapter(tmp_path / "a").factors[NAME]
    assert f.rank == 2
    assert torch.allclose(f.delta(), B @ (A * E) * 2 / (4 + 1e-5), atol=1e-6)


def loralib_state(*, ranknum=True, r=3):
    state = {
        f"deberta.{NAME}.weight": torch.randn(6, 8),
        f"deberta.{NAME}.bias": torch.randn(6),
        f"deberta.{NAME}.lora_A": torch.randn(r, 8),
        f"deberta.{NAME}.lora_B": torch.randn(6, r),
        f"deberta.{NAME}.lora_E": torch.randn(r, 1),
        "classifier.weight": torch.randn(2, 6),
    }
    if ranknum:
        state[f"deberta.{NAME}.ranknum"] = torch.tensor([float(r + 2)])
    return state


@pytest.mark.parametrize("ranknum", [True, False])
def test_the_released_loralib(tmp_path, ranknum):
    state = loralib_state(ranknum=ranknum)
    save_file(state, str(tmp_path / "state.safetensors"))
    report = export_adapter(tmp_path / "state.safetensors", tmp_path / "out", format="ragged", alpha=16)
    assert report.error < 1e-6
    part = {k.split(".lora_")[-1][0]: v for k, v in state.items() if ".lora_" in k}
    # loralib's SVDLinear: W + B (A·E) scaling / (ranknum + 1e-5), scaling = alpha
    wanted = part["B"] @ (part["A"] * part["E"]) * 16 / ((5 if ranknum else 3) + 1e-5)
    got = read_adapter(tmp_path / "out").factors[f"deberta.{NAME}"].delta()
    assert torch.allclose(got.float(), wanted, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"]
    assert set(load_file(str(tmp_path / "out/adapter_model.safetensors"))) >= {"base_model.model.classifier.weight"}


def test_plain_loralib_and_bad_state_dicts(tmp_path):
    A, B = torch.randn(2, 8), torch.randn(6, 2)
    adapter = adapter_from_loralib({"x.q.lora_A": A, "x.q.lora_B": B}, alpha=4)
    assert torch.allclose(adapter.factors["x.q"].delta(), B @ A * 2, atol=1e-6)
    with pytest.raises(AdapterFileError, match="no lora_A"):
        adapter_from_loralib({"x.weight": A}, alpha=4)
    with pytest.raises(AdapterFileError, match="lora_A and lora_B are wanted"):
        adapter_from_loralib({"x.lora_A": A}, alpha=4)
    with pytest.raises(AdapterFileError, match="alpha"):
        adapter_from_loralib({"x.q.lora_A": A, "x.q.lora_B": B}, alpha=0)
    torch.save({"x.q.lora_A": A}, tmp_path / "state.bin")
    with pytest.raises(AdapterFileError, match="pickle"):
        inspect_adapter(tmp_path / "state.bin", alpha=4)
    with pytest.raises(AdapterFileError, match="no state dict"):
        inspect_adapter(tmp_path / "none.safetensors", alpha=4)


def test_an_imported_adapter_trains_further_with_attach(tmp_path):
    save_adalora(tmp_path / "a", prune=True)
    export_adapter(tmp_path / "a", tmp_path / "plain", format="ragged")
    model = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "plain"), is_trainable=True)
    before = logits(model.eval())
    total = sum(read_adapter(tmp_path / "plain").ranks.values())
    adalora.attach(model.train(), target_rank=2, total_steps=6)
    assert torch.allclose(logits(model.eval()), before, atol=1e-5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for _ in range(6):
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "further")
    assert not torch.allclose(logits(model.eval()), before, atol=1e-4)
    assert torch.allclose(logits(load_peft(tmp_path / "further")), logits(model), atol=1e-5)
    assert sum(read_adapter(tmp_path / "further").ranks.values()) <= total
