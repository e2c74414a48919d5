"""The default configuration starts as fast as a LoRA of its target rank; PEFT's AdaLoRA does not."""

import pytest
import torch
from peft import AdaLoraConfig as PeftAdaLoraConfig
from peft import LoraConfig, get_peft_model
from torch import nn

import adalora

ALPHA, TARGET, INITIAL, RATE = 16, 8, 16, 1e-3
WIDTHS = [64, 256, 1024, 4096]


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, x):
        return self.linear(x)


def size_of_first_update(width, kind):
    """‖ΔW‖ (Frobenius) after one AdamW step on the same random regression."""
    torch.manual_seed(0)
    base = Layer(width)
    x = torch.randn(16, width)
    y = torch.randn(16, width)
    common = {"target_modules": ["linear"], "lora_alpha": ALPHA}
    if kind == "peft-adalora":
        settings = {"init_r": INITIAL, "target_r": TARGET, "total_step": 100, "tinit": 10, "tfinal": 40}
        model = get_peft_model(base, PeftAdaLoraConfig(**settings, **common))
    else:
        model = get_peft_model(base, LoraConfig(r=TARGET if kind == "lora" else INITIAL, **common))
    if kind == "ours":
        adalora.attach(model, target_rank=TARGET, total_steps=100)
    layer = model.base_model.model.linear
    before = layer.get_delta_weight("default").detach().clone()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATE, weight_decay=0.0)
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    return float((layer.get_delta_weight("default").detach() - before).norm())


@pytest.fixture(scope="module")
def sizes():
    return {(w, k): size_of_first_update(w, k) for w in WIDTHS for k in ("lora", "ours", "peft-adalora")}


@pytest.mark.parametrize("width", WIDTHS)
def test_first_update_is_within_twice_that_of_lora(sizes, width):
    ratio = sizes[width, "ours"] / sizes[width, "lora"]
    assert 0.5 < ratio < 2
    assert ratio == pytest.approx((TARGET / INITIAL) ** 0.5, rel=0.12)  # docs/comparing.md


@pytest.mark.parametrize("width", WIDTHS)
def test_peft_adalora_starts_more_than_twenty_times_slower(sizes, width):
    assert 0 < sizes[width, "peft-adalora"] < sizes[width, "lora"] / 20
