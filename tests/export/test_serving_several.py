"""Several exported adapters in one PEFT model: side by side, mixed, swapped, and in one batch."""

import peft
import pytest
import torch
from packaging.version import parse
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from transformers.integrations.peft import MIN_PEFT_VERSION

from adalora.export import export_adapter

from .conftest import llama, load_peft, logits, randomise, save_lora, save_ragged, tokens


@pytest.fixture
def three(tmp_path):
    """Three adapters of different ranks and targets, exported; folder by name."""
    save_ragged(tmp_path / "1")
    save_lora(tmp_path / "2", r=6, lora_alpha=3)
    live = save_lora(tmp_path / "3", r=2)
    randomise(live, seed=9).save_pretrained(tmp_path / "3")
    for name, format in (("1", "portable"), ("2", "ragged"), ("3", "portable")):
        export_adapter(tmp_path / name, tmp_path / f"out{name}", format=format)
    return {name: tmp_path / f"out{name}" for name in "123"}


def together(three):
    model = PeftModel.from_pretrained(llama(), str(three["1"]), adapter_name="1")
    for name in "23":
        model.load_adapter(str(three[name]), adapter_name=name)
    return model.eval()


def test_side_by_side(three):
    model = together(three)
    for name, folder in three.items():
        model.set_adapter(name)
        assert torch.allclose(logits(model), logits(load_peft(folder)), atol=1e-6)


def test_mixed_in_one_batch(three):
    model = together(three)
    x = tokens()[:1].repeat(4, 1)
    names = ["1", "2", "3", "__base__"]
    with torch.no_grad():
        got = model(input_ids=x, adapter_names=names).logits
        for i, name in enumerate(names):
            alone = llama() if name == "__base__" else load_peft(three[name])
            assert torch.allclose(got[i], alone(x[:1]).logits[0], atol=1e-5)


@pytest.mark.parametrize("how", ["cat", "linear", "svd"])
def test_weighted_sum(three, how):
    model = together(three)
    names, weights = (["1", "3"], [0.7, 0.3])  # both portable: one rank, as `linear` wants
    options = {"svd_rank": 32} if how == "svd" else {}
    model.add_weighted_adapter(names, weights, adapter_name="mix", combination_type=how, **options)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    wanted = sum(w * layer.get_delta_weight(n) for n, w in zip(names, weights))
    if how == "linear":  # PEFT's linear mixes A and B, not ΔW; what it gives is finite and of that rank
        assert layer.get_delta_weight("mix").isfinite().all()
    else:
        assert torch.allclose(layer.get_delta_weight("mix"), wanted, atol=1e-5)


def test_hotswap(three):
    model = PeftModel.from_pretrained(llama(), str(three["1"]), adapter_name="default").eval()
    before = logits(model)
    hotswap_adapter(model, str(three["3"]), adapter_name="default", torch_device="cpu")
    assert torch.allclose(logits(model), logits(load_peft(three["3"])), atol=1e-6)
    assert not torch.allclose(logits(model), before, atol=1e-3)


@pytest.mark.skipif(
    parse(peft.__version__) < parse(MIN_PEFT_VERSION), reason=f"this transformers wants PEFT {MIN_PEFT_VERSION}"
)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_transformers_loads_them_by_name(three):
    model = llama()
    for name, folder in three.items():
        model.load_adapter(str(folder), adapter_name=name)
    for name, folder in three.items():
        model.set_adapter(name)
        assert torch.allclose(logits(model), logits(load_peft(folder)), atol=1e-6)
