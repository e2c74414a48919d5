"""Whole parameters and moments for a moment, in a process group of one; two processes run in tests/integrations."""

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from adalora.lora.layers.triplets import find_triplets
from adalora.lora.processes.sharding import Shards
from helpers.three_layers import lora, run


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def sharded(group):
    """One layer of three is sharded; its optimizer has made two steps, and other parameters stay whole."""
    if Version(torch.__version__) < Version("2.7"):
        pytest.skip("FSDP2 of torch 2.6 runs on GPUs alone")
    model = lora()
    handles = find_triplets(model, "default")
    shards = Shards(handles)
    fully_shard(model.base_model.model[2])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run(model, optimizer, steps=2, seed=0)
    return handles, shards, optimizer


@torch.no_grad()
def test_layers_that_are_not_sharded_are_left_alone(sharded):
    handles, shards, _ = sharded
    with shards.whole():
        assert [bool(h.whole) for h in handles] == [False, True, False]
        assert type(handles[1].P_parameter) is nn.Parameter
        handles[1].P_parameter.fill_(2.0)
    assert isinstance(handles[1].P_parameter, DTensor)
    assert bool((handles[1].P_parameter.to_local() == 2).all())


@torch.no_grad()
def test_a_gradient_where_there_was_none(sharded):
    """The orthogonality term reaches parameters that the loss does not."""
    handles, shards, _ = sharded
    assert handles[1].P_parameter.grad is None
    with shards.whole():
        handles[1].P_parameter.grad = torch.full_like(handles[1].P_parameter, 3.0)
    assert bool((handles[1].P_parameter.grad.to_local() == 3).all())


@torch.no_grad()
def test_moments_are_whole_and_written_back(sharded):
    handles, shards, optimizer = sharded
    with shards.whole():
        view = shards.of(optimizer)
        ordinary, whole = handles[0].P_parameter, handles[1].P_parameter
        assert view.state[ordinary] is optimizer.state[ordinary]
        state = view.state[whole]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert len(state) == 3
        assert type(state["exp_avg"]) is torch.Tensor
        state["exp_avg"] = torch.full_like(state["exp_avg"], 5.0)
        state["step"] = torch.tensor(7.0)
        del state["exp_avg_sq"]
    kept = optimizer.state[handles[1].P_parameter]
    assert bool((kept["exp_avg"].to_local() == 5).all())
    assert float(kept["step"]) == 7
    assert "exp_avg_sq" not in kept
