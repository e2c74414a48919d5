"""Layers that leave an adapter and come back, and where their parameters go in the optimizer."""

import torch

from adalora.lora.layers.triplets import find_triplets
from adalora.lora.ranks.compaction import resize
from helpers.three_layers import lora, run


def params(model):
    return [p for p in model.parameters() if p.requires_grad]


def there_and_back(model, optimizer):
    handles = find_triplets(model, "default")
    before = [h.rank for h in handles]
    assert resize(handles, [before[0], 0, before[2]], optimizer, model=model)
    assert handles[1].removed
    assert resize(handles, before, optimizer, model=model)
    assert [h.rank for h in handles] == before
    assert not resize(handles, before, optimizer, model=model)
    return handles


def test_without_an_optimizer():
    model = lora()
    there_and_back(model, None)
    assert len(run(model, torch.optim.SGD(params(model), lr=0.1), steps=2, seed=0)) == 2


def test_the_group_of_its_like_in_the_models_order():
    model = lora()
    wanted = params(model)
    other = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [other]}, {"params": params(model)}], lr=1e-2)
    there_and_back(model, optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, len(wanted)]
    assert all(mine is theirs for mine, theirs in zip(optimizer.param_groups[1]["params"], wanted))


def test_an_order_of_the_users_own_stays():
    model = lora()
    optimizer = torch.optim.AdamW(params(model)[::-1], lr=1e-2)
    handles = there_and_back(model, optimizer)
    held = optimizer.param_groups[0]["params"]
    assert {id(p) for p in held[-2:]} == {id(p) for p, _ in handles[1].factors.values()}
    assert len(held) == len(params(model))


def test_an_optimizer_that_trains_something_else_gets_nothing():
    model = lora()
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    there_and_back(model, optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]


def test_a_layer_that_comes_back_is_in_the_mode_of_the_model():
    """The dropout of a layer that had left heard nothing of `train()` and `eval()`."""
    model = lora()
    handles = find_triplets(model, "default")
    before = [h.rank for h in handles]
    for leaves, returns in ((True, False), (False, True)):
        model.train(leaves)
        resize(handles, [before[0], 0, before[2]], None, model=model)
        model.train(returns)
        resize(handles, before, None, model=model)
        assert {module.training for module in model.modules()} == {returns}
