"""Engines that are not supported are refused at once; those that are not installed are told by what they carry."""

import types

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainingArguments

import adalora
from adalora.errors import AdaLoraWarning, ConfigError
from adalora.integrations.accelerate import register
from adalora.lora.processes.engines import refuse_launcher

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


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", REFUSED),
        ("ACCELERATE_USE_FSDP", "--use_fsdp of accelerate launch is not supported for recipes: .*--multi_gpu"),
        ("ACCELERATE_USE_MEGATRON_LM", "--use_megatron_lm of accelerate launch is not supported for recipes"),
    ],
)
def test_launchers_that_cut_a_recipes_model(variable, message, monkeypatch):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError, match=message):
        refuse_launcher()
    monkeypatch.setenv(variable, "false")
    refuse_launcher()


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


NO_FSDP1 = r"FSDP1 .* is not supported: .*fully_shard"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distributed_type": DistributedType.MEGATRON_LM}, "Megatron-LM is not supported: .*fully_shard"),
        (
            {
                "distributed_type": DistributedType.FSDP,
                "state": types.SimpleNamespace(fsdp_plugin=types.SimpleNamespace(fsdp_version=1)),
            },
            NO_FSDP1,
        ),
    ],
)
def test_other_engines_of_accelerate(fields, message):
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=10)
    with pytest.raises(ConfigError, match=message):
        register(types.SimpleNamespace(**fields), controller)


@pytest.mark.filterwarnings("ignore:.*FSDP1.*:FutureWarning", "ignore:.*FSDP1.*:UserWarning")
def test_the_trainers_fsdp1(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, fsdp=True, fsdp_config={"version": 1})
    with pytest.raises(ConfigError, match=NO_FSDP1):
        adalora.AdaLoraCallback(target_rank=2).on_init_end(arguments, None, None, model=lora())


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("keeps_parameters", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_fsdp1_around_the_model(group, keeps_parameters):
    """Before `attach` it is refused there, afterwards at the first step: no weight has moved."""

    def around(model):
        if not keeps_parameters:
            model.requires_grad_(True)  # one flat parameter is trained as a whole or not at all
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=keeps_parameters)

    wrapped = around(lora())
    with pytest.raises(ConfigError, match=NO_FSDP1):
        adalora.attach(wrapped, target_rank=2, total_steps=10)

    model, another = lora(), lora()
    other = adalora.attach(another, target_rank=2, total_steps=10)  # is not in its hands
    controller = adalora.attach(model, target_rank=2, total_steps=10)
    wrapped = around(model)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    wrapped(torch.ones(2, 4)).sum().backward()
    before = [p.detach().clone() for p in wrapped.parameters()]
    with pytest.raises(ConfigError, match=NO_FSDP1):
        optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, wrapped.parameters()))
    another(torch.ones(2, 4)).sum().backward()
    torch.optim.SGD([p for p in another.parameters() if p.requires_grad], lr=0.1).step()
    assert [controller.step, other.step] == [0, 1]
    with pytest.warns(AdaLoraWarning, match="training ended after 1 of 10 steps"):
        other.finalize()
