"""What a checkpoint remembers of the base weights under a layer."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from adalora.lora.layers.fingerprint import base_fingerprint, base_shape, note_base
from adalora.lora.layers.triplets import find_triplets


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


def test_packed_weights_count_as_they_were_when_attached():
    """bitsandbytes packs 4-bit weights anew for a CPU; weights in floating point are looked at every time."""
    packed, plain = handle(torch.ones(3, 4)), handle(torch.ones(3, 4))
    base = packed.layer.get_base_layer()
    base.weight = nn.Parameter(torch.arange(6, dtype=torch.uint8)[:, None], requires_grad=False)
    assert base_shape(packed) == [6, 1]
    for h in (packed, plain):
        note_base(h)
    noted = [base_fingerprint(h) for h in (packed, plain)]
    base.weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.uint8), requires_grad=False)
    plain.layer.get_base_layer().weight.data = torch.zeros(4, 4)
    assert base_fingerprint(packed) == noted[0]
    assert base_fingerprint(plain) != noted[1]
    assert [base_shape(h) for h in (packed, plain)] == [[6, 1], [4, 4]]
