"""DeepSpeed is looked for by what its objects carry; it is not installed here."""

import types

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch import nn

import adalora
from adalora.errors import ConfigError
from adalora.integrations.accelerate import register

REFUSED = r"DeepSpeed is not supported: its engine steps .* FSDP2"


def lora():
    return get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=3, target_modules=["0"]))


def test_parameters_partitioned_by_zero_3():
    model = lora()
    next(model.parameters()).ds_id = 0
    with pytest.raises(ConfigError, match=REFUSED):
        adalora.attach(model, target_rank=2, total_steps=10)


def test_an_engine():
    engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
    with pytest.raises(ConfigError, match=REFUSED):
        adalora.attach(engine, target_rank=2, total_steps=10)


def test_a_process_of_accelerates_launcher(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=REFUSED):
        adalora.attach(lora(), target_rank=2, total_steps=10)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    assert adalora.attach(lora(), target_rank=2, total_steps=10).live == 3


def test_an_accelerator():
    model = lora()  # the controller does not keep it alive
    controller = adalora.attach(model, target_rank=2, total_steps=10)
    engine = types.SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(ConfigError, match=REFUSED):
        register(engine, controller)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    register(accelerator, controller)
    assert accelerator.prepare(optimizer) is not None
