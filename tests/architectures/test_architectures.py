"""Every family of models: attach, ten steps, mask, compact, save, load in stock PEFT, equal."""

import copy
import json

import pytest
import torch
from families import FAMILIES, mixtral
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch.nn.functional import mse_loss

import adalora
from adalora import errors

OUTPUTS = ("logits", "logits_per_image", "sample")


def main_output(model, inputs):
    found = model(**inputs)
    return found if torch.is_tensor(found) else next(found[name] for name in OUTPUTS if name in found)


@torch.no_grad()
def evaluated(model, inputs):
    model.eval()
    return main_output(model, inputs)


def loaded(base, folder, inputs):
    """What stock PEFT makes of the saved adapter."""
    return evaluated(PeftModel.from_pretrained(copy.deepcopy(base), folder), inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_trains_shrinks_and_loads_in_stock_peft(name, tmp_path):
    family = FAMILIES[name]()
    base = family.build()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=3, lora_alpha=4, **family.lora))
    controller = adalora.attach(model, target_rank=2, total_steps=10)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    inputs = family.inputs()
    untrained = evaluated(base, inputs)
    goal = torch.randn_like(untrained)
    for step in range(10):
        model.train()
        mse_loss(main_output(model, inputs), goal).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 3:  # while the budget shrinks: pruned triplets are masked, not yet removed
            assert controller.target_budget <= controller.live < sum(h.rank for h in controller.handles)
            model.save_pretrained(tmp_path / "masked")
            torch.testing.assert_close(
                loaded(base, tmp_path / "masked", inputs), evaluated(model, inputs), rtol=0, atol=1e-5
            )
    controller.finalize()
    assert controller.live == controller.target_budget == 2 * len(controller.handles)
    assert sum(h.rank for h in controller.handles if not h.removed) == controller.live

    model.save_pretrained(tmp_path / "final")
    ours = evaluated(model, inputs)
    assert (ours - untrained).abs().max() > 1e-4
    torch.testing.assert_close(loaded(base, tmp_path / "final", inputs), ours, rtol=0, atol=1e-5)
    written = json.loads((tmp_path / "final" / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA"
    with safe_open(tmp_path / "final" / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert not [n for n in names if "lambda" in n]
    if "modules_to_save" in family.lora or family.lora.get("task_type") == "SEQ_CLS":
        assert [n for n in names if "classifier" in n and "lora" not in n]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_heads_and_nothing_else_beside_lora_trains(name):
    family = FAMILIES[name]()
    model = get_peft_model(family.build(), LoraConfig(r=3, **family.lora))
    adalora.attach(model, target_rank=2, total_steps=10)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert all("modules_to_save" in n for n in trained)
    has_head = "modules_to_save" in family.lora or family.lora.get("task_type") == "SEQ_CLS"
    assert bool(trained) == has_head
    before = {n: p.detach().clone() for n, p in trained.items()}
    output = main_output(model, family.inputs())
    mse_loss(output, torch.randn_like(output)).backward()
    torch.optim.SGD(trained.values(), lr=1.0).step() if trained else None
    assert [n for n, p in trained.items() if torch.equal(before[n], p)] == []


def test_fused_experts_are_refused():
    """One factor of PEFT's layer is shared among the experts: there are no triplets to price."""
    lora = LoraConfig(r=3, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    model = get_peft_model(mixtral().build(), lora)
    with pytest.raises(errors.AttachError, match="target_parameters"):
        adalora.attach(model, target_rank=2, total_steps=10)
