"""Budgets in ranks, parameters and bytes; costs; groups; floors: on models that train."""

import re

import pytest
import torch
from peft import PeftModel

import adalora
from adalora.errors import ConfigError
from adalora.lora.layers.triplets import find_triplets
from adalora.lora.ranks.budget import group_name, make_budget
from adalora.lora.ranks.module_names import matches
from helpers.toys import adamw, lora, train

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


@pytest.mark.parametrize("parametrization", ["lora", "svd"])
@pytest.mark.parametrize("given", [{"target_rank": 2}, {"total_parameters": 300}])
def test_rank_zero_for_some_modules(given, parametrization, tmp_path):
    """Their adapter is gone, and what is saved says so."""
    model, controller = run(max_rank={"query": 0}, parametrization=parametrization, **given)
    kept = {name for name, rank in controller.ranks.items() if rank}
    assert kept
    assert not any("query" in name for name in kept)
    assert not any("query" in name for name, _ in model.named_parameters() if "lora_" in name)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(lora().unload(), tmp_path)
    x = torch.randn(4, 8)
    torch.testing.assert_close(again(x), model(x))


def test_floors_and_caps_by_name():
    """The first name that fits counts; modules without one are free."""
    floors, caps = {"layers.1.up": 0, "up": 4}, {"layers.0.*": 4, "head": 1}
    _, controller = run(target_rank=2, min_rank=floors, max_rank=caps)
    ranks = controller.ranks
    assert sum(ranks.values()) == 14
    assert ranks["layers.0.up"] == 4
    assert ranks["head"] <= 1
    assert max(ranks["layers.0.query"], ranks["layers.0.down"]) <= 4


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("query", "layers.0.query", True),
        ("query", "query", True),
        ("query", "layers.0.my_query", False),
        ("layers.0", "layers.0.query", False),
        ("layers.0.*", "encoder.layers.0.query", True),
        ("layers.0.*", "encoder.layers.10.query", False),
        ("layers.[01].*", "layers.1.up", True),
        ("*", "head", True),
    ],
)
def test_names(pattern, name, fits):
    assert matches(pattern, name) is fits


@pytest.mark.parametrize("given", [{}, {"target_rank": 25 / 7}])
def test_groups_with_budgets_of_their_own(given):
    """Exact at the end; each group on its own way to it."""
    _, controller = run(
        budget_scope="module_type", group_budgets={"query": 0.5, "up": 6, "down": 5, "head": 2}, **given
    )
    sums = {}
    for name, rank in controller.ranks.items():
        sums[group_name(name, "module_type")] = sums.get(group_name(name, "module_type"), 0) + rank
    assert sums == {"query": 1, "up": 12, "down": 10, "head": 2}
    assert controller.target_budget == 25


def test_other_groups_share_the_rest():
    handles = find_triplets(lora(), "default")
    config = adalora.AdaLoraConfig(target_rank=2, budget_scope="layer", group_budgets={"layers.1": 3})
    budget = make_budget(config, handles)
    assert [group.target for group in budget.groups] == [4, 9, 1]  # 5 left, for 18 and 6 at the start
    assert int(budget.deal(torch.rand(42), [6] * 7, amount=14).sum()) == 14


def test_groups_in_parameters():
    """An average rank costs what a LoRA of it has."""
    handles = find_triplets(lora(), "default")
    budgets = {"query": 1, "*": 2}
    config = adalora.AdaLoraConfig(budget_cost="parameters", budget_scope="module_type", group_budgets=budgets)
    budget = make_budget(config, handles)
    assert [group.target for group in budget.groups] == [2 * 16, 2 * 2 * 28, 2 * 2 * 28, 2 * 11]
    assert budget.target == 32 + 112 + 112 + 22


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_rank": {"qeury": 0}}, "max_rank: nothing matches 'qeury': did you mean 'query'?"),
        ({"min_rank": {"zzz": 1}}, "min_rank: nothing matches 'zzz': the model has 'layers.0.query', "),
        ({"max_rank": {"*": 0}}, "max_rank={'*': 0} leaves no triplet in 7 modules: allow some module"),
        (
            {"max_rank": {"query": 0}, "min_rank": 1},
            "layers.0.query: max_rank=0 is below min_rank=1: raise the one or lower the other",
        ),
        (
            {"budget_scope": "layer", "group_budgets": {"layers.0": 1}},
            "group_budgets has nothing for 'layers.1', '': add them, or target_rank=… for the whole model",
        ),
        (
            {"budget_scope": "layer", "group_budgets": {"layers.7": 1}, "target_rank": 1},
            "group_budgets: nothing matches 'layers.7': did you mean 'layers.",
        ),
        (
            {"budget_scope": "layer", "group_budgets": {"layers.0": 7}, "target_rank": 4},
            "group_budgets gives 'layers.0' 21 triplets, it starts with 18: a larger r in LoraConfig or",
        ),
        (
            {"budget_scope": "layer", "group_budgets": {"layers.0": 5}, "target_rank": 2},
            "group_budgets gives 15 triplets and the other groups take 24 at most, the model's budget is 14: leave",
        ),
        (
            {"budget_scope": "layer", "group_budgets": {"*": 2}, "target_rank": 3},
            "group_budgets gives 14 triplets, the model's budget is 21: leave the model's budget out or change it",
        ),
        (
            {"budget_scope": "layer", "group_budgets": {"*": 0}},
            "group_budgets={'*': 0.0} leaves no triplet in 7 modules",
        ),
        (
            {"budget_scope": "module_type", "group_budgets": {"query": 0, "*": 2}, "min_rank": 1},
            "min_rank=1 needs 2 triplets in the module_type of layers.0.query, the budget has 0",
        ),
    ],
)
def test_names_and_groups_that_do_not_fit(settings, message):
    given = settings if "group_budgets" in settings else {"target_rank": 2, **settings}
    with pytest.raises(ConfigError, match=re.escape(message)):
        adalora.attach(lora(), total_steps=STEPS, **given)


@pytest.mark.parametrize(
    ("settings", "message", "cure"),
    [
        (
            {"total_rank": 30, "max_rank": 3},
            "max_rank=3 keeps 21 triplets at most, the budget has 30: a larger max_rank, or total_rank=21",
            {"total_rank": 21},
        ),
        (
            {"target_rank": 3, "max_rank": {"query": 0, "up": 2}},
            "keeps 22 triplets at most, the budget has 21",
            None,
        ),
        (
            {"target_rank": 4, "max_rank": {"query": 0, "up": 2}},
            "max_rank={'query': 0, 'up': 2} keeps 22 triplets at most, the budget has 28: a larger max_rank, or "
            "target_rank=3.14",
            {"target_rank": 3.14},
        ),
        (
            {"total_parameters": 500, "max_rank": 3},
            "max_rank=3 keeps 465 parameters at most, the budget has 500: a larger max_rank, or total_parameters=465",
            {"total_parameters": 465},
        ),
        (
            {"adapter_bytes": "2kB", "max_rank": 3},
            "max_rank=3 keeps 1860 bytes at most, the budget has 2000: a larger max_rank, or adapter_bytes=1860",
            {"adapter_bytes": 1860},
        ),
        (
            {"total_rank": 30, "max_rank": 3, "budget_cost": "parameters"},
            "max_rank=3 keeps 465 parameters at most, the budget has 664: a larger max_rank, or target_rank=3",
            {"total_rank": None, "target_rank": 3},
        ),
        (
            {"target_rank": 2, "max_rank": {"query": 0}, "budget_scope": "module_type"},
            "max_rank={'query': 0} keeps 0 triplets at most in the module_type 'query', the budget has 4: a larger "
            "max_rank, or group_budgets={'query': 0}",
            {"group_budgets": {"query": 0}},
        ),
        (
            {"group_budgets": {"layers.0": 4, "*": 2}, "max_rank": 3, "budget_scope": "layer"},
            "max_rank=3 keeps 9 triplets at most in the layer 'layers.0', the budget has 12: a larger max_rank, or "
            "group_budgets={'layers.0': 3}",
            {"group_budgets": {"layers.0": 3, "*": 2}},
        ),
    ],
)
def test_caps_that_cannot_reach_the_budget_are_refused(settings, message, cure):
    """Fewer triplets than asked for would be kept in silence; the corrected line is accepted and spends all."""
    if cure is None:  # just enough
        assert adalora.attach(lora(), total_steps=STEPS, **settings).target_budget == 21
        return
    with pytest.raises(ConfigError, match=re.escape(message)):
        adalora.attach(lora(), total_steps=STEPS, **settings)
    _, controller = run(**{name: value for name, value in {**settings, **cure}.items() if value is not None})
    if controller.budget_unit == "triplets":
        assert controller.live == controller.target_budget
    else:
        spent = cost_of(controller) * (4 if controller.budget_unit == "bytes" else 1)
        assert controller.target_budget - 28 * 4 < spent <= controller.target_budget
