import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adalora.core.allocation import allocate
from adalora.core.knapsack import allocate_costs


@st.composite
def models(draw):
    """Ranks and costs of a few modules, scores with ties and zeros."""
    ranks = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any))
    prices = draw(st.lists(st.sampled_from([2, 3, 5, 9]), min_size=len(ranks), max_size=len(ranks)))
    n = sum(ranks)
    scores = draw(st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0, 3.0, 7.0]), min_size=n, max_size=n))
    module = torch.repeat_interleave(torch.tensor(ranks))
    return ranks, torch.tensor(scores), module, torch.tensor(prices)[module]


def best_by_brute_force(ranks, scores, module, costs, *, budget, floor=0, cap=99):
    """Highest total score of any subset that fits."""
    best = None
    for chosen in itertools.product([False, True], repeat=len(scores)):
        keep = torch.tensor(chosen)
        counts = torch.bincount(module[keep], minlength=len(ranks)).tolist()
        if any(not min(r, floor) <= k <= cap for r, k in zip(ranks, counts)) or int(costs[keep].sum()) > budget:
            continue
        best = max(best or 0.0, float(scores[keep].sum()))
    return best


@settings(max_examples=150, deadline=None)
@given(models(), st.data())
def test_it_is_the_optimum_of_all_subsets(model, data):
    ranks, scores, module, costs = model
    floor = data.draw(st.integers(0, 2))
    cap = data.draw(st.integers(max(1, floor), 4))
    least = sum(min(r, floor) * int(costs[module == m][0]) for m, r in enumerate(ranks) if r)
    budget = data.draw(st.integers(least, int(costs.sum())))
    keep = allocate_costs(scores, module, costs=costs, budget=budget, min_rank=floor, max_rank=cap)
    counts = torch.bincount(module[keep], minlength=len(ranks)).tolist()
    assert all(min(r, floor) <= k <= cap for r, k in zip(ranks, counts))
    assert int(costs[keep].sum()) <= budget
    best = best_by_brute_force(ranks, scores, module, costs, budget=budget, floor=floor, cap=cap)
    assert float(scores[keep].sum()) == pytest.approx(best)
    # Nothing more would fit.
    may = torch.tensor([counts[m] < cap for m in module.tolist()]) & ~keep
    assert not bool((costs[may] <= budget - int(costs[keep].sum())).any())


@settings(max_examples=100, deadline=None)
@given(models(), st.data())
def test_floors_and_caps_of_single_modules(model, data):
    """The optimum of all subsets, each module with its own."""
    ranks, scores, module, costs = model
    floors = [data.draw(st.integers(0, rank)) for rank in ranks]
    caps = [data.draw(st.integers(floor, 4)) for floor in floors]
    prices = [int(costs[module == m][0]) if rank else 0 for m, rank in enumerate(ranks)]
    budget = data.draw(st.integers(sum(f * p for f, p in zip(floors, prices)), int(costs.sum())))
    bounds = {"min_rank": torch.tensor(floors)[module], "max_rank": torch.tensor(caps)[module]}
    keep = allocate_costs(scores, module, costs=costs, budget=budget, **bounds)
    best = -1.0
    for chosen in itertools.product([False, True], repeat=len(scores)):
        subset = torch.tensor(chosen)
        counts = torch.bincount(module[subset], minlength=len(ranks)).tolist()
        if int(costs[subset].sum()) <= budget and all(f <= k <= c for f, k, c in zip(floors, counts, caps)):
            best = max(best, float(scores[subset].sum()))
    counts = torch.bincount(module[keep], minlength=len(ranks)).tolist()
    assert all(f <= k <= c for f, k, c in zip(floors, counts, caps))
    assert int(costs[keep].sum()) <= budget
    assert float(scores[keep].sum()) == pytest.approx(best)


@settings(max_examples=100, deadline=None)
@given(st.permutations(range(10)), st.integers(20, 60), st.integers(0, 10**6))
def test_reordering_modules_reorders_the_mask(order, budget, seed):
    """Who is bought hangs on scores and prices, not on where a module stands, or a triplet in it."""
    scores = torch.rand(10, generator=torch.Generator().manual_seed(seed))
    module, index = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3]), torch.tensor(order)
    costs = torch.tensor([5, 3, 8, 2])[module]
    keep = allocate_costs(scores, module, costs=costs, budget=budget)
    moved = allocate_costs(scores[index], module[index], costs=costs[index], budget=budget)
    assert moved.tolist() == keep[index].tolist()


@settings(max_examples=100, deadline=None)
@given(models(), st.data())
def test_equal_costs_give_the_choice_by_rank(model, data):
    _, scores, module, costs = model
    count = data.draw(st.integers(0, len(scores)))
    keep = allocate_costs(scores, module, costs=torch.full_like(costs, 7), budget=7 * count + 6)
    assert keep.tolist() == allocate(scores, module, budget=count).tolist()


def test_a_large_model_is_exact_and_quick():
    """144 modules of three shapes and one odd head; against an upper bound of the fractional problem."""
    torch.manual_seed(0)
    prices = torch.tensor([1536, 1536, 1536, 1536, 3840, 3840] * 24 + [845])
    module = torch.arange(len(prices)).repeat_interleave(12)
    costs = prices[module]
    scores = torch.rand(len(costs)) ** 4 * costs.float().sqrt()
    budget = int(0.31 * int(costs.sum()))
    keep = allocate_costs(scores, module, costs=costs, budget=budget)
    assert budget - int(costs[keep].sum()) < 845
    worth = torch.sort(scores.double() / costs, descending=True)
    spent = torch.cumsum(costs[worth.indices], 0)
    whole = int((spent <= budget).sum())
    relaxed = scores.double()[worth.indices][:whole].sum()
    relaxed += (budget - spent[whole - 1]) * worth.values[whole]
    assert 0 <= float(relaxed - scores.double()[keep].sum()) < 1e-4 * float(relaxed)


def test_bad_scores():
    """NaN last, infinity first, -inf never but for a floor."""
    module, costs = torch.tensor([0, 0, 1, 1]), torch.tensor([3, 3, 2, 2])
    scores = torch.tensor([torch.nan, 1.0, torch.inf, -torch.inf])
    assert allocate_costs(scores, module, costs=costs, budget=10).tolist() == [True, True, True, False]
    assert allocate_costs(scores, module, costs=costs, budget=5).tolist() == [False, True, True, False]
    assert allocate_costs(scores, module, costs=costs, budget=4).tolist() == [False, False, True, False]
    assert allocate_costs(scores, module, costs=costs, budget=10, min_rank=2).tolist() == [True] * 4


def test_all_scores_zero_still_spends_the_budget():
    module, costs = torch.tensor([0, 0, 1, 1]), torch.tensor([3, 3, 2, 2])
    assert int(allocate_costs(torch.zeros(4), module, costs=costs, budget=8).sum()) == 3


def test_a_floor_beyond_the_budget_is_refused():
    with pytest.raises(ValueError, match="min_rank=1 costs 5, the budget has 4"):
        allocate_costs(
            torch.rand(4), torch.tensor([0, 0, 1, 1]), costs=torch.tensor([3, 3, 2, 2]), budget=4, min_rank=1
        )


def test_a_subset_sum_ends():
    """Every score proportional to its cost and no exact fit: no bound helps, and it must not run for hours."""
    torch.manual_seed(0)
    prices = torch.tensor([1000, 1010, 1030, 1070, 1130, 1370])
    module = torch.arange(6).repeat_interleave(300)
    costs = prices[module]
    keep = allocate_costs(costs.double(), module, costs=costs, budget=700_003)
    assert 700_003 - 1000 < int(costs[keep].sum()) <= 700_003
