"""The size of the update is that of the weights PEFT would merge."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from adalora.lora.layers.triplets import find_triplets
from adalora.lora.measures.update_size import update_ratio


def model(start_at_zero):
    base = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 4))
    config = LoraConfig(r=3, target_modules=["0", "1", "2"], init_lora_weights=start_at_zero)
    return get_peft_model(base, config)


def test_median_of_the_layers():
    handles = find_triplets(model(start_at_zero=False), "default")
    layers = [h.layer for h in handles]
    expected = [
        layer.get_delta_weight("default").detach().norm() / layer.get_base_layer().weight.norm() for layer in layers
    ]
    assert update_ratio(handles) == pytest.approx(float(torch.stack(expected).median()), rel=1e-5)


def test_zero_at_the_start():
    assert update_ratio(find_triplets(model(start_at_zero=True), "default")) == 0


def test_weights_that_are_no_floats_are_left_out():
    handles = find_triplets(model(start_at_zero=False), "default")
    for h in handles:
        h.layer.get_base_layer().weight = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    assert update_ratio(handles) is None
