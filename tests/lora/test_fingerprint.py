"""What a checkpoint remembers of the base weights under a layer."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from adalora.lora.fingerprint import base_fingerprint
from adalora.lora.triplets import find_triplets


def handle(weight):
    layer = nn.Linear(4, 3)
    layer.weight.data.copy_(weight)
    (found,) = find_triplets(get_peft_model(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"])), "default")
    return found


def test_values_shape_and_type_count():
    one, same, other = handle(torch.ones(3, 4)), handle(torch.ones(3, 4)), handle(torch.zeros(3, 4))
    assert base_fingerprint(one) == base_fingerprint(same) != base_fingerprint(other)
    same.layer.get_base_layer().half()
    assert base_fingerprint(one) != base_fingerprint(same)


def test_weights_that_cannot_be_read():
    """Offloaded: shape and type alone; none at all, as in a quantised layer of its own kind: no claim."""
    one, other = handle(torch.ones(3, 4)), handle(torch.zeros(3, 4))
    for h in (one, other):
        h.layer.get_base_layer().to("meta")
    assert base_fingerprint(one) == base_fingerprint(other) != "none"
    del one.layer.get_base_layer().weight
    assert base_fingerprint(one) == "none"
