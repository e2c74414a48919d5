"""Ranks and alphas in the LoraConfig."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from adalora.lora.layers.patterns import write_patterns
from adalora.lora.layers.triplets import find_triplets


def lora(**settings):
    base = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("first", "second", "third", "left_out")})
    settings = {"target_modules": ["first", "second", "third"], **settings}
    return get_peft_model(base, LoraConfig(r=3, lora_alpha=6, **settings))


def test_an_adapter_without_any_triplet_keeps_its_config():
    """PEFT refuses one that targets nothing."""
    model = lora()
    before = copy.deepcopy(model.peft_config["default"])
    write_patterns(model, find_triplets(model, "default"), ranks=[0, 0, 0])
    assert model.peft_config["default"] == before


def test_modules_without_a_triplet_join_those_that_are_excluded():
    model = lora(target_modules="all-linear", exclude_modules=["left_out"])
    handles = find_triplets(model, "default")
    assert len(handles) == 3
    write_patterns(model, handles, ranks=[2, 0, 1])
    written = copy.deepcopy(model.peft_config["default"])
    base = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("first", "second", "third", "left_out")})
    again = find_triplets(get_peft_model(base, written), "default")
    assert {h.name: h.rank for h in again} == {"first": 2, "third": 1}
    assert all(h.lora_scale == torch.tensor(2.0) for h in again)
