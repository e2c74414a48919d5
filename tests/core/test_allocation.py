import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adalora.core.allocation import allocate


@st.composite
def models(draw):
    """Ranks of the modules, and scores with many ties, NaN and infinities."""
    ranks = draw(st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any))
    value = st.sampled_from([float("nan"), float("-inf"), float("inf"), -1.0, 0.0, 0.5, 1.0])
    scores = draw(st.lists(value, min_size=sum(ranks), max_size=sum(ranks)))
    return ranks, torch.tensor(scores), torch.repeat_interleave(torch.tensor(ranks))


def counts(keep, module, modules):
    return torch.bincount(module[keep], minlength=modules).tolist()


@settings(max_examples=300, deadline=None)
@given(models(), st.data())
def test_exactly_the_budget_is_kept_whatever_the_scores(model, data):
    _ranks, scores, module = model
    budget = data.draw(st.integers(0, len(scores)))
    keep = allocate(scores, module, budget=budget)
    assert keep.dtype == torch.bool
    assert int(keep.sum()) == budget
    ranking = torch.nan_to_num(scores.double(), nan=-torch.inf, posinf=1e300)
    if 0 < budget < len(scores):
        assert ranking[keep].min() >= ranking[~keep].max()


@settings(max_examples=300, deadline=None)
@given(models(), st.data())
def test_floors_and_caps(model, data):
    ranks, scores, module = model
    min_rank = data.draw(st.integers(0, 3))
    max_rank = data.draw(st.integers(max(1, min_rank), 6))
    floor = sum(min(r, min_rank) for r in ranks)
    budget = data.draw(st.integers(floor, len(scores)))
    keep = allocate(scores, module, budget=budget, min_rank=min_rank, max_rank=max_rank)
    kept = counts(keep, module, len(ranks))
    assert all(min(r, min_rank) <= k <= min(r, max_rank) for r, k in zip(ranks, kept))
    assert int(keep.sum()) == min(budget, sum(min(r, max_rank) for r in ranks))
    # Inside a module the best are kept.
    ranking = torch.nan_to_num(scores.double(), nan=-torch.inf, posinf=1e300)
    for m in range(len(ranks)):
        inside, outside = ranking[keep & (module == m)], ranking[~keep & (module == m)]
        if len(inside) and len(outside):
            assert inside.min() >= outside.max()


@settings(max_examples=100, deadline=None)
@given(models())
def test_a_larger_budget_keeps_what_a_smaller_one_kept(model):
    _, scores, module = model
    before = torch.zeros(len(scores), dtype=torch.bool)
    for budget in range(len(scores) + 1):
        keep = allocate(scores, module, budget=budget)
        assert not bool((before & ~keep).any())
        before = keep


def test_equal_scores_go_by_position():
    keep = allocate(torch.ones(6), torch.tensor([0, 0, 0, 1, 1, 1]), budget=4)
    assert keep.tolist() == [True, True, True, True, False, False]


def test_nan_comes_last_and_infinity_first():
    scores = torch.tensor([torch.nan, 1.0, torch.inf, -5.0])
    module = torch.zeros(4, dtype=torch.int64)
    assert allocate(scores, module, budget=1).tolist() == [False, False, True, False]
    assert allocate(scores, module, budget=3).tolist() == [False, True, True, True]


def test_a_floor_displaces_better_triplets_of_other_modules():
    scores = torch.tensor([9.0, 8.0, 7.0, 1.0, 2.0])
    module = torch.tensor([0, 0, 0, 1, 1])
    assert allocate(scores, module, budget=3).tolist() == [True, True, True, False, False]
    assert allocate(scores, module, budget=3, min_rank=1).tolist() == [True, True, False, False, True]
    assert allocate(scores, module, budget=3, max_rank=1).tolist() == [True, False, False, False, True]


def test_a_floor_beyond_the_budget_is_refused():
    with pytest.raises(ValueError, match=r"min_rank=2 needs 4 triplets, the budget has 3"):
        allocate(torch.rand(6), torch.tensor([0, 0, 0, 1, 1, 1]), budget=3, min_rank=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_type(dtype):
    scores = torch.tensor([0.25, 4.0, 1.0, torch.inf], dtype=dtype)
    keep = allocate(scores, torch.tensor([0, 0, 1, 1]), budget=2)
    assert keep.tolist() == [False, True, False, True]


@settings(max_examples=100, deadline=None)
@given(st.permutations(range(9)), st.integers(0, 9), st.integers(0, 10**6))
def test_reordering_the_triplets_of_a_module_reorders_the_mask(order, budget, seed):
    scores = torch.rand(9, generator=torch.Generator().manual_seed(seed))
    index, module = torch.tensor(order), torch.zeros(9, dtype=torch.int64)
    keep = allocate(scores, module, budget=budget)
    assert allocate(scores[index], module, budget=budget).tolist() == keep[index].tolist()


@settings(max_examples=200, deadline=None)
@given(models(), st.data())
def test_floors_and_caps_of_single_modules(model, data):
    ranks, scores, module = model
    floors = torch.tensor([data.draw(st.integers(0, 3)) for _ in ranks])
    caps = torch.tensor([data.draw(st.integers(int(f), 6)) for f in floors])
    least = sum(min(r, int(f)) for r, f in zip(ranks, floors))
    budget = data.draw(st.integers(least, len(scores)))
    keep = allocate(scores, module, budget=budget, min_rank=floors[module], max_rank=caps[module])
    kept = counts(keep, module, len(ranks))
    assert all(min(r, int(f)) <= k <= min(r, int(c)) for r, f, c, k in zip(ranks, floors, caps, kept))
    assert int(keep.sum()) == min(budget, sum(min(r, int(c)) for r, c in zip(ranks, caps)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=3).filter(any), st.data())
def test_it_is_the_best_of_all_subsets(ranks, data):
    """The highest total score of as many triplets as the budget and the caps leave, floors and caps by module."""
    module, n = torch.repeat_interleave(torch.tensor(ranks)), sum(ranks)
    scores = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=n, max_size=n)))
    floors = [data.draw(st.integers(0, rank)) for rank in ranks]
    caps = [data.draw(st.integers(floor, 3)) for floor in floors]
    budget = data.draw(st.integers(sum(floors), n))
    keep = allocate(
        scores, module, budget=budget, min_rank=torch.tensor(floors)[module], max_rank=torch.tensor(caps)[module]
    )
    size, best = min(budget, sum(map(min, ranks, caps))), -1.0
    for chosen in itertools.combinations(range(n), size):
        inside = counts(torch.tensor(chosen, dtype=torch.int64), module, len(ranks))
        if all(floor <= k <= cap for floor, k, cap in zip(floors, inside, caps)):
            best = max(best, float(scores[list(chosen)].sum()))
    assert int(keep.sum()) == size
    assert float(scores[keep].sum()) == pytest.approx(best)


@settings(max_examples=100, deadline=None)
@given(st.permutations(range(10)), st.integers(4, 10), st.integers(0, 10**6))
def test_reordering_modules_reorders_the_mask(order, budget, seed):
    """Who is kept hangs on scores, floors and caps, not on where a module stands, or a triplet in it."""
    generator = torch.Generator().manual_seed(seed)
    scores, index = torch.rand(10, generator=generator), torch.tensor(order)
    module = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])
    floors, caps = torch.tensor([1, 0, 2, 1])[module], torch.tensor([2, 2, 4, 1])[module]
    keep = allocate(scores, module, budget=budget, min_rank=floors, max_rank=caps)
    moved = allocate(scores[index], module[index], budget=budget, min_rank=floors[index], max_rank=caps[index])
    assert moved.tolist() == keep[index].tolist()
