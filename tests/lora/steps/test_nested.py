"""Nested training: what is left out, when, and that it leaves no trace."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import adalora
from adalora.lora.layers.forward import DROPPED

STEPS = 60


def lora(**settings):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    return get_peft_model(network, LoraConfig(r=6, target_modules=["0", "2"], **settings))


def train(model, steps=STEPS, after_step=lambda: None):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        (model(torch.randn(16, 8, generator=generator)) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step()


def live_of(controller):
    """Triplets that the coming step trains, module by module."""
    parts = []
    for h in controller.handles:
        parts.append(h.layer.__dict__.get(DROPPED, {}).get(h.adapter, torch.ones(h.rank, dtype=torch.bool)))
    return torch.cat(parts)


def test_draws_are_nested_in_the_order_of_worth():
    """Every draw is a beginning of one order: score per parameter at the last allocation."""
    model = lora()
    controller = adalora.attach(model, target_rank=4, total_steps=STEPS, nested=True)
    seen = []
    train(model, after_step=lambda: seen.append(live_of(controller)))
    start, final = seen[: controller.schedule.decrease_end], seen[controller.schedule.decrease_end : -1]
    assert all(bool(live.all()) for live in start)
    scores = controller.history.last("allocation")["triplet_scores"]
    worth = torch.cat([torch.tensor(s) / h.parameters_per_triplet for s, h in zip(scores, controller.handles)])
    order = worth.argsort(descending=True)
    for live in final:
        count = int(live.sum())
        assert count >= 1
        assert bool(live[order[:count]].all())
    counts = [int(live.sum()) for live in final]
    assert len(set(counts)) >= 4
    assert 0.3 < sum(c == len(worth) for c in counts) / len(counts) < 0.8


def test_what_is_left_out_gets_no_gradient():
    model = lora()
    controller = adalora.attach(model, target_rank=4, total_steps=STEPS, nested=True)
    checked = []

    def check():
        live = live_of(controller)
        if controller.step <= controller.schedule.decrease_end or bool(live.all()):
            return
        model(torch.randn(4, 8)).square().sum().backward()
        for h, part in zip(controller.handles, torch.split(live, [h.rank for h in controller.handles])):
            for gradient in (h.as_P(h.P_parameter.grad).T, h.as_Q(h.Q_parameter.grad)):
                assert bool(gradient[part].any()) == bool(part.any())
                assert not gradient[~part].any()
        model.zero_grad()
        checked.append(live)

    train(model, after_step=check)
    assert checked


def test_evaluation_and_files_use_all_triplets(tmp_path):
    """Only the training mode leaves anything out; afterwards nothing does."""
    model = lora()
    controller = adalora.attach(model, target_rank=4, total_steps=STEPS, nested=True)
    x, differs = torch.randn(4, 8), []

    def look():
        merged = copy.deepcopy(model.eval()).merge_and_unload()
        assert (model(x) - merged(x)).abs().max() < 1e-5
        model.train()
        differs.append(bool((model(x) - merged(x)).abs().max() > 1e-4))

    train(model, after_step=look)
    assert any(differs)
    assert not any(differs[: controller.schedule.decrease_end])
    controller.finalize()
    assert bool(live_of(controller).all())
    assert (model.train()(x) - model.eval()(x)).abs().max() == 0


def test_two_runs_draw_the_same():
    runs = []
    for _ in range(2):
        model = lora()
        adalora.attach(model, target_rank=4, total_steps=STEPS, nested=True, seed=3)
        train(model)
        runs.append(model(torch.ones(1, 8)).detach())
    assert torch.equal(*runs)


def test_refusals():
    network = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8))
    model = get_peft_model(network, LoraConfig(r=4, target_modules=["0", "1"]))
    with pytest.raises(adalora.AdaLoraError, match="nested=True takes Linear layers; 0 is another"):
        adalora.attach(model, target_rank=2, total_steps=10, nested=True)
    with pytest.raises(adalora.AdaLoraError, match="nested=True needs compact=True"):
        adalora.AdaLoraConfig(nested=True, compact=False)
    with pytest.raises(adalora.AdaLoraError, match="nested has no effect"):
        adalora.AdaLoraConfig(nested=True, schedule="constant")


def resumed(state):
    """A new run that goes on from a state."""
    model = lora()
    controller = adalora.attach(model, target_rank=4, total_steps=STEPS, nested=True)
    controller.load_state_dict(state)
    return controller


def test_a_resumed_run_goes_on_nested():
    model, states, seen = lora(), {}, {}
    controller = adalora.attach(model, target_rank=4, total_steps=STEPS, nested=True)

    def keep():
        seen[controller.step] = live_of(controller)
        if controller.step % 10 == 0:
            states[controller.step] = copy.deepcopy(controller.state_dict())

    train(model, after_step=keep)
    final = [step for step in states if step > controller.schedule.decrease_end]
    assert any(not bool(seen[step].all()) for step in seen)
    for step in final:
        assert torch.equal(live_of(resumed(states[step])), seen[step])
    # Going back in the same process leaves nothing of the later draws behind.
    controller.load_state_dict(states[10])
    assert bool(live_of(controller).all())
    assert sum(h.rank for h in controller.handles) == 12


def test_a_resumed_run_never_goes_on_un_nested():
    """Without the scores of what was kept the order is lost: refused, and nothing is changed."""
    model = lora()
    controller = adalora.attach(model, target_rank=4, total_steps=STEPS, nested=True)
    train(model, steps=STEPS - 10)
    state = copy.deepcopy(controller.state_dict())
    scores = next(r for r in reversed(state["history"]) if "triplet_scores" in r)
    whole = scores["triplet_scores"]
    for damaged in (None, [part[:-1] for part in whole]):
        scores["triplet_scores"] = damaged
        if damaged is None:
            del scores["triplet_scores"]
        fresh = lora()
        other = adalora.attach(fresh, target_rank=4, total_steps=STEPS, nested=True)
        before = {name: value.clone() for name, value in fresh.state_dict().items()}
        with pytest.raises(adalora.AdaLoraError, match="nested=True cannot go on from step 50"):
            other.load_state_dict(state)
        assert other.step == 0
        assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
