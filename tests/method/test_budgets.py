"""Budgets in ranks, parameters and bytes; costs; groups; floors: on models that train."""

import re

import pytest
import torch
from toys import adamw, lora, train

import adalora
from adalora.errors import ConfigError
from adalora.lora.budget import group_name, make_budget
from adalora.lora.triplets import find_triplets

STEPS = 40
COSTS = {"query": 16, "up": 28, "down": 28, "head": 11}  # d_out + d_in
FULL = 6 * (2 * (16 + 28 + 28) + 11)


def cost_of(controller, *, extra=0):
    """Parameters of what is left."""
    return sum(rank * (COSTS[name.split(".")[-1]] + extra) for name, rank in controller.ranks.items())


def run(**settings):
    model = lora()
    controller = adalora.attach(model, total_steps=STEPS, **settings)
    train(model, adamw(model), STEPS)
    controller.finalize()
    return model, controller


@pytest.mark.parametrize(("given", "amount"), [({"total_parameters": 300}, 300), ({"total_parameters": "0.4k"}, 400)])
def test_parameters(given, amount, tmp_path):
    """The file has no more than was allowed, and what is left over would not have bought another large triplet."""
    model, controller = run(**given)
    assert controller.budget_unit == "parameters"
    assert (controller.initial_budget, controller.target_budget) == (FULL, amount)
    used = cost_of(controller)
    assert amount - 28 < used <= amount
    saved = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert saved == used
    amounts = [controller.schedule.budget(record["step"]) for record in controller.history.of("allocation")]
    assert amounts == sorted(amounts, reverse=True)
    for record, allowed in zip(controller.history.of("allocation"), amounts):
        assert (
            sum(rank * COSTS[name.split(".")[-1]] for name, rank in zip(controller.ranks, record["ranks"])) <= allowed
        )
        assert record["budget"] == sum(record["ranks"])


def test_a_lambda_of_its_own_is_a_parameter():
    _, controller = run(total_parameters=300, parametrization="svd")
    assert controller.initial_budget == FULL + 6 * 7
    assert 300 - 29 < cost_of(controller, extra=1) <= 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes(dtype):
    model = lora().to(dtype)
    controller = adalora.attach(model, total_steps=STEPS, adapter_bytes="1kB")
    train(model, adamw(model), STEPS, dtype=dtype)
    controller.finalize()
    size = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "lora_" in n)
    assert controller.budget_unit == "bytes"
    assert 1000 - 28 * torch.finfo(dtype).bits // 8 < size <= 1000


def test_a_rank_at_its_price():
    """budget_cost="parameters" with a rank: what a LoRA of that rank has."""
    _, controller = run(target_rank=2, budget_cost="parameters")
    assert controller.target_budget == 2 * FULL // 6
    assert controller.target_budget - 28 < cost_of(controller) <= controller.target_budget


def test_costs_change_the_choice():
    """Equal spending buys more importance where price counts."""
    handles = find_triplets(lora(), "default")
    scores, ranks = torch.rand(42), [6] * 7
    prices = torch.tensor([COSTS[h.name.split(".")[-1]] for h in handles]).repeat_interleave(6)
    by_rank = make_budget(adalora.AdaLoraConfig(target_rank=2), handles).deal(scores, ranks, amount=14)
    by_cost = make_budget(adalora.AdaLoraConfig(target_rank=2, budget_cost="parameters"), handles)
    mask = by_cost.deal(scores, ranks, amount=int(prices[by_rank].sum()))
    assert int(prices[mask].sum()) <= int(prices[by_rank].sum())
    assert float(scores[mask].sum()) > float(scores[by_rank].sum())


@pytest.mark.parametrize("scope", ["layer", "module_type"])
def test_groups_have_their_shares(scope):
    """At every allocation; at the end in proportion to what they started with."""
    _, controller = run(target_rank=2, budget_scope=scope)
    groups = {}
    for name, rank in controller.ranks.items():
        groups.setdefault(group_name(name, scope), []).append(rank)
    expected = (
        {"layers.0": 6, "layers.1": 6, "": 2} if scope == "layer" else {"query": 4, "up": 4, "down": 4, "head": 2}
    )
    assert {name: sum(ranks) for name, ranks in groups.items()} == expected
    names = [group_name(name, scope) for name in controller.ranks]
    for record in controller.history.of("allocation"):
        budget = controller.schedule.budget(record["step"])
        sums = {g: sum(r for n, r in zip(names, record["ranks"]) if n == g) for g in expected}
        assert sum(sums.values()) <= budget
        assert sum(sums.values()) > budget - len(expected)
        assert all(sums[g] >= expected[g] for g in expected)


def test_groups_that_do_not_divide():
    """Five triplets for three groups: remainders go to the largest, none is lost."""
    handles = find_triplets(lora(), "default")
    budget = make_budget(adalora.AdaLoraConfig(total_rank=5, budget_scope="layer"), handles)
    assert [group.target for group in budget.groups] == [2, 2, 1]
    whole = budget.deal(torch.rand(42), [6] * 7, amount=5)
    assert int(whole.sum()) == 5


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("encoder.layer.3.attention.self.query", "encoder.layer.3", "query"),
        ("model.layers.11.mlp.down_proj", "model.layers.11", "down_proj"),
        ("classifier", "", "classifier"),
        ("0", "0", ""),
        ("blocks.1.experts.4.up", "blocks.1", "up"),
        ("seq.2", "seq.2", "seq"),
    ],
)
def test_group_names(name, layer, kind):
    assert group_name(name, "layer") == layer
    assert group_name(name, "module_type") == kind
    assert group_name(name, "global") == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"total_parameters": 10_000},
            f"the target of 10000 parameters is above the {FULL} that the model starts with",
        ),
        ({"total_parameters": 10}, "a budget of 10 parameters buys no triplet: the cheapest of 7 modules takes 11"),
        ({"target_rank": 1, "min_rank": 2}, "min_rank=2 needs 14 triplets, the budget has 7"),
        ({"target_rank": 0.01}, "target_rank=0.01 leaves no triplet in 7 modules"),
        ({"total_parameters": 100, "min_rank": 1}, "min_rank=1 needs 155 parameters, the budget has 100"),
        (
            {"total_rank": 8, "min_rank": 1, "budget_scope": "layer"},
            None,
        ),
        (
            {"total_rank": 6, "min_rank": 1, "budget_scope": "layer"},
            "min_rank=1 needs 3 triplets in the layer of layers.1.query, the budget has 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_training(settings, message):
    model = lora()
    if message is None:
        adalora.attach(model, total_steps=STEPS, **settings)
        return
    with pytest.raises(ConfigError, match=re.escape(message)):
        adalora.attach(model, total_steps=STEPS, **settings)
    adalora.attach(model, total_steps=STEPS, target_rank=2)


@pytest.mark.parametrize("given", [{"total_parameters": 300}, {"target_rank": 2}])
def test_floor_and_cap(given):
    _, controller = run(min_rank=1, max_rank=3, **given)
    assert all(1 <= rank <= 3 for rank in controller.ranks.values())


def test_modules_may_start_with_ranks_of_their_own():
    """LoraConfig's rank_pattern: b0 is what the layers have."""
    model = lora(rank_pattern={"query": 2, "up": 9})
    controller = adalora.attach(model, total_steps=STEPS, target_rank=3)
    assert controller.initial_budget == 2 * (2 + 9 + 6) + 6
    train(model, adamw(model), STEPS)
    assert controller.live == 21
    assert controller.ranks["layers.0.query"] <= 2
