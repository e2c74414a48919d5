"""Compaction: a model goes on exactly as if it had always been small."""

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import adalora
from adalora.errors import CompactionError
from adalora.lora.compaction import compact
from adalora.lora.triplets import find_triplets, write_patterns

RANK = 6
KEPT = {"0": [0, 2, 5], "2": [], "4": [1, 3]}
OPTIMIZERS = {
    "adamw_single": partial(torch.optim.AdamW, lr=1e-2, foreach=False),
    "adamw_foreach": partial(torch.optim.AdamW, lr=1e-2, foreach=True),
    "adamw_fused": partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "adamw_amsgrad": partial(torch.optim.AdamW, lr=1e-2, amsgrad=True),
    "sgd_momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "sgd": partial(torch.optim.SGD, lr=1e-2),
}


def base():
    """Three Linear layers, always the same."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4))


def lora(**settings):
    """A LoRA model on `base()` with scale 2 in every layer."""
    torch.manual_seed(2)
    config = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["0", "2", "4"], **settings}
    return get_peft_model(base(), LoraConfig(**config))


def run(model, optimizer, *, steps, seed):
    """Train on random data; returns the losses."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        x, y = torch.randn(16, 8, generator=generator), torch.randn(16, 4, generator=generator)
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def prune(handles):
    """Mask all but `KEPT`."""
    for h in handles:
        h.mask = torch.zeros(RANK, dtype=torch.bool)
        h.mask[KEPT[h.name]] = True
        with torch.no_grad():
            h.P_or[:, ~h.mask] = 0


def small_twin(handles, optimizer, make):
    """A model built with the final ranks by stock PEFT, with copies of the kept weights and moments."""
    twin = lora(
        r=3,
        lora_alpha=6,
        rank_pattern={"4": 2},
        alpha_pattern={"4": 4},
        target_modules=["0", "4"],
    )
    twin_optimizer = make([p for p in twin.parameters() if p.requires_grad])
    of_name = {h.name: h for h in find_triplets(twin, "default")}
    for h in handles:
        if not KEPT[h.name]:
            continue
        pairs = [(h.P_parameter, of_name[h.name].P_parameter, 1), (h.Q_parameter, of_name[h.name].Q_parameter, 0)]
        for old, new, dim in pairs:
            index = torch.tensor(KEPT[h.name])
            new.data.copy_(old.data.index_select(dim, index))
            if old in optimizer.state:
                twin_optimizer.state[new] = {
                    key: value.index_select(dim, index).clone()
                    if value is not None and value.dim()
                    else copy.deepcopy(value)
                    for key, value in optimizer.state[old].items()
                }
    return twin, twin_optimizer


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_training_goes_on_bit_exactly_like_a_small_model(name):
    """Losses, weights and moments after the cut equal those of a model that never was large."""
    make = OPTIMIZERS[name]
    model = lora()
    handles = find_triplets(model, "default")
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    run(model, optimizer, steps=5, seed=0)
    prune(handles)
    twin, twin_optimizer = small_twin(handles, optimizer, make)
    compact(handles, optimizer)
    assert [h.rank for h in handles] == [3, 0, 2]
    assert run(model, optimizer, steps=6, seed=1) == run(twin, twin_optimizer, steps=6, seed=1)
    of_name = {h.name: h for h in find_triplets(twin, "default")}
    for h in handles:
        if h.removed:
            continue
        for mine, other in (
            (h.P_parameter, of_name[h.name].P_parameter),
            (h.Q_parameter, of_name[h.name].Q_parameter),
        ):
            assert torch.equal(mine, other)
            for key, value in twin_optimizer.state[other].items():
                if value is not None:
                    assert torch.equal(torch.as_tensor(optimizer.state[mine][key]), torch.as_tensor(value)), key


def test_identity_and_gradients_survive():
    """A parameter stays the same object; a gradient not yet used is cut with it."""
    model = lora()
    handles = find_triplets(model, "default")
    before = {h.name: h.P_parameter for h in handles}
    model(torch.randn(3, 8)).sum().backward()
    gradient = handles[0].P_parameter.grad.clone()
    prune(handles)
    compact(handles, None)
    assert handles[0].P_parameter is before["0"]
    assert torch.equal(handles[0].P_parameter.grad, gradient[:, KEPT["0"]])


def test_modules_without_triplets_hold_nothing():
    """No adapter parameter in the layer, none in the optimizer, and the pruned module still computes its base."""
    model = lora()
    handles = find_triplets(model, "default")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run(model, optimizer, steps=3, seed=0)
    prune(handles)
    gone = {id(handles[1].P_parameter), id(handles[1].Q_parameter)}
    compact(handles, optimizer)
    write_patterns(model, handles)
    layer = handles[1].layer
    assert handles[1].removed
    assert [n for n, _ in layer.named_parameters() if "lora" in n] == []
    assert not [k for k in model.state_dict() if ".2." in k and "lora" in k]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert not gone & {id(p) for p in held}
    assert not gone & {id(p) for p in optimizer.state}
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    x = torch.randn(5, 12)
    assert torch.equal(layer(x), layer.get_base_layer()(x))
    restored = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(restored)
    assert len(run(model, optimizer, steps=2, seed=1)) == 2


class Odd(torch.optim.SGD):
    """Keeps a history of gradient norms, which has no triplets."""

    def step(self, closure=None):
        """As SGD."""
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["norms"] = torch.ones(7)


def test_foreign_optimizer_state_is_refused_and_nothing_changes():
    """State of a shape that nobody knows; the message has the cure."""
    model = lora()
    handles = find_triplets(model, "default")
    optimizer = Odd([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run(model, optimizer, steps=3, seed=0)
    prune(handles)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CompactionError, match=r"Odd keeps 'norms' of shape .* compact=False"):
        compact(handles, optimizer)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert len(run(model, optimizer, steps=2, seed=1)) == 2


def test_foreign_optimizer_trains_masked():
    """With compact=False the pruned triplets stay in memory, and do not grow again at the target budget."""
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=30, compact=False)
    optimizer = torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run(model, optimizer, steps=30, seed=0)
    controller.finalize()
    assert controller.live == controller.target_budget == 6
    assert sum(h.rank for h in controller.handles) == 3 * RANK
    for h in controller.handles:
        assert not h.P_or[:, ~h.mask].any()
