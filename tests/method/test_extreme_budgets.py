"""Budgets, schedules and lengths of a run at their ends, with either parametrization.

Elsewhere: a target rank of 0 for some modules in `tests/lora/ranks/test_budget.py`.
"""

import itertools

import pytest
import torch
from kinds import BOTH, STEPS, attach

import adalora
from adalora import plugins
from adalora.errors import AdaLoraWarning, ConfigError
from helpers.toys import adamw, lora, train


@BOTH
def test_target_equal_to_the_initial_rank(kind):
    model = lora()
    controller = attach(model, kind, target_rank=6)
    train(model, adamw(model), STEPS)
    controller.finalize()
    assert set(controller.ranks.values()) == {6}


@BOTH
def test_a_budget_of_one(kind):
    """One triplet in the whole model; six modules lose their adapter, and the model still trains and saves."""
    model = lora()
    controller = attach(model, kind, target_rank=None, total_rank=1)
    optimizer = adamw(model)
    train(model, optimizer, STEPS)
    assert sorted(controller.ranks.values()) == [0] * 6 + [1]
    train(model, optimizer, 2)
    controller.finalize()
    assert len([n for n, _ in model.named_parameters() if "lora_" in n]) == 2


@BOTH
@pytest.mark.parametrize("unit", [{}, {"budget_cost": "parameters"}])
def test_all_scores_tied(kind, unit):
    """A learning rate and data that move nothing: every score is 0, exactly b are kept, the same ones every time."""
    masks = []
    for _ in range(2):
        model = lora()
        controller = attach(model, kind, orthogonality="off", **unit)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        for _ in range(STEPS):
            (model(torch.zeros(2, 8)) * 0).sum().backward()
            optimizer.step()
        if not unit:
            assert controller.live == 14
        masks.append(controller.ranks)
    assert masks[0] == masks[1]


@BOTH
def test_shorter_and_longer_than_told(kind):
    model = lora()
    controller = attach(model, kind, total_steps=200)
    train(model, adamw(model), 30)
    with pytest.warns(AdaLoraWarning, match="training ended after 30 of 200 steps"):
        controller.finalize()
    assert controller.live == 14
    model = lora()
    controller = attach(model, kind, total_steps=20)
    train(model, adamw(model), 35)
    controller.finalize()
    assert (controller.step, controller.live) == (35, 14)


def test_total_steps_are_fixed_by_the_first_step():
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=STEPS)
    controller.set_total_steps(STEPS + 10)
    controller.set_total_steps(STEPS)
    train(model, adamw(model), 1)
    controller.set_total_steps(STEPS)
    with pytest.raises(ConfigError, match=r"total_steps=50 comes after 1 steps of a run of 40"):
        controller.set_total_steps(50)
    assert len(controller.history.of("start")) == 3


def test_without_a_handover_the_last_allocation_does_not_see_its_own_step():
    """As in PEFT: scores end with the step before the final phase, with and without warm-up in them."""
    for handover, expected in ((False, 21), (True, 16)):
        model = lora()
        controller = adalora.attach(model, target_rank=2, total_steps=STEPS, handover=handover)
        train(model, adamw(model), controller.schedule.decrease_end + 1)
        assert controller.schedule.decrease_end == 21
        assert controller._scorer.observed == expected


@pytest.mark.parametrize("revival", [True, False])
def test_a_rising_schedule_brings_triplets_back_only_where_they_may_revive(revival, monkeypatch):
    """A registered curve falls, rises, and falls again."""
    curve = lambda done: 0.2 if 0.2 < done < 0.5 else 0.8  # noqa: E731
    monkeypatch.setattr("adalora.plugins.names", lambda group: ["wave"])
    monkeypatch.setattr("adalora.plugins.load", lambda group, name: curve)
    model = lora()
    controller = adalora.attach(
        model, target_rank=2, total_steps=60, schedule="wave", revival=revival, allocation_interval=1
    )
    optimizer, live = adamw(model), []
    for step in range(60):
        train(model, optimizer, 1, start=step)
        live.append(controller.live)
    rises = [after > before for before, after in itertools.pairwise(live)]
    assert any(rises) == revival
    assert live[-1] == controller.target_budget == 14
    assert sum(record["revived"] for record in controller.history.of("allocation")) > 0 or not revival


@pytest.mark.parametrize("revival", [True, False])
def test_revivals_are_counted_and_can_be_forbidden(revival):
    """With noisy scores some pruned triplet comes back, if it may."""
    model = lora()
    controller = adalora.attach(
        model, target_rank=2, total_steps=60, revival=revival, importance="random", allocation_interval=1
    )
    train(model, adamw(model), 60)
    revived = sum(record["revived"] for record in controller.history.of("allocation"))
    assert (revived > 0) == revival
    assert controller.live == 14


@pytest.mark.parametrize("cost", ["rank", "parameters"])
def test_a_rising_schedule_revives_nothing_where_that_is_forbidden(cost, monkeypatch):
    """A registered schedule may give back what it took; without revival the budget stays unspent."""
    monkeypatch.setattr(plugins, "names", lambda group: ["dip"] if group == "schedules" else [])
    monkeypatch.setattr(plugins, "load", lambda group, name: lambda done: 0.9 if done > 0.6 else 0.2)
    lives = {}
    for revival in (True, False):
        model = lora()
        controller = adalora.attach(
            model, target_rank=2, total_steps=60, schedule="dip", revival=revival, budget_cost=cost, compact=False
        )
        train(model, adamw(model), 60)
        records = controller.history.of("allocation")
        lives[revival] = [record["live"] for record in records]
        assert any(record["revived"] for record in records) == revival
    assert max(lives[True][-3:-1]) > max(lives[True][:3])
    assert lives[False] == sorted(lives[False], reverse=True)
