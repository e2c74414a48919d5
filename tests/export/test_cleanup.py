import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adalora.errors import AdapterFileError
from adalora.export import clean, truncate
from adalora.export.adapter import Adapter, difference, make_factor, norm, relative_error


def adapter(shapes=((12, 8, 4), (6, 10, 3), (20, 20, 5)), seed=0):
    g = torch.Generator().manual_seed(seed)
    factors = {}
    for i, (d_out, d_in, r) in enumerate(shapes):
        A, B = torch.randn(r, d_in, generator=g), torch.randn(d_out, r, generator=g)
        factors[f"m.{i}.lin"] = make_factor(f"m.{i}.lin", A, B * 0.3 ** (i + 1), 1.5)
    return Adapter(factors, {})


def test_cleaning_keeps_delta_and_gives_orthonormal_sorted_triplets():
    before = adapter()
    after = clean(before)
    for name, f in after.factors.items():
        assert (f.delta() - before.factors[name].delta()).abs().max() < 1e-5
        eye = torch.eye(f.rank, dtype=f.left.dtype)
        assert (f.left.T @ f.left - eye).abs().max() < 1e-10
        assert (f.right @ f.right.T - eye).abs().max() < 1e-10
        assert (f.values.diff() <= 0).all()
        assert relative_error(before.factors[name].product(), f.product()) < 1e-9


def test_cleaning_drops_what_adds_nothing():
    A, B = torch.randn(4, 8), torch.randn(6, 4)
    A[2:] = 0
    B[:, 1] = B[:, 0]  # rank 1 in fact: rows 2, 3 of A are zero and the two left columns agree
    (f,) = clean(Adapter({"x": make_factor("x", A, B, 1.0)}, {})).factors.values()
    assert f.rank == 1
    (zero,) = clean(Adapter({"x": make_factor("x", A, torch.zeros(6, 4), 1.0)}, {})).factors.values()
    assert zero.rank == 0
    assert torch.equal(zero.delta(), torch.zeros(6, 8))


@settings(max_examples=25, deadline=None)
@given(budget=st.floats(0.25, 1.0), seed=st.integers(0, 50))
def test_a_budget_is_never_exceeded_and_its_error_is_the_true_one(budget, seed):
    source = adapter(seed=seed)
    cut = truncate(source, budget=budget)
    assert cut.parameters_after == cut.adapter.parameters <= budget * source.parameters + 1e-6
    squares = total = 0.0
    for name, f in source.factors.items():
        miss = difference(f.product(), cut.adapter.factors[name].product())
        size = norm(*f.product())
        assert math.isclose(cut.errors[name], miss / size, abs_tol=1e-6)
        squares, total = squares + miss**2, total + size**2
    assert math.isclose(cut.error, math.sqrt(squares / total), abs_tol=1e-6)


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0.05, 1.0), seed=st.integers(0, 50))
def test_energy_keeps_at_least_its_share_and_not_a_triplet_more(share, seed):
    source = adapter(seed=seed)
    cut = truncate(source, energy=share)
    assert cut.kept_energy >= share - 1e-9
    cleaned = clean(source)
    kept = [
        (float(f.values[i]) ** 2 / (f.d_out + f.d_in), float(f.values[i]) ** 2)
        for name, f in cleaned.factors.items()
        for i in range(cut.adapter.factors[name].rank)
    ]
    total = sum(float((f.values**2).sum()) for f in cleaned.factors.values())
    assert (sum(e for _, e in kept) - min(kept)[1]) / total < share


def test_within_one_shape_the_cut_is_the_best_there_is():
    source = adapter(shapes=((9, 9, 4), (9, 9, 4)))
    cut = truncate(source, budget=0.5)
    values = torch.cat([f.values for f in clean(source).factors.values()]) ** 2
    best = values.sort(descending=True).values[:4].sum() / values.sum()
    assert math.isclose(cut.kept_energy, float(best), rel_tol=1e-9)


def test_scores_decide_where_they_are_given():
    source = adapter(shapes=((9, 9, 3), (9, 9, 3)))
    first, second = source.factors
    scores = {first: torch.zeros(3), second: torch.tensor([1.0, 2.0, 3.0])}
    assert truncate(source, budget=0.5, scores=scores).adapter.ranks == {first: 0, second: 3}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"energy": 0}, "above 0"),
        ({"energy": 1.5}, "up to 1"),
        ({"budget": 0}, "budget 0"),
        ({"budget": float("nan")}, "budget nan"),
        ({"budget": 1e-6}, "keeps nothing"),
        ({"budget": 0.5, "energy": 0.5}, "not both"),
    ],
)
def test_wrong_amounts_are_named(options, words):
    with pytest.raises(AdapterFileError, match=words):
        truncate(adapter(), **options)


def test_norms_do_not_form_the_product():
    P, Q = torch.randn(50, 3), torch.randn(3, 40)
    assert math.isclose(norm(P, Q), float(torch.linalg.norm(P @ Q)), rel_tol=1e-5)
    assert difference((P, Q), (P, Q)) < 1e-12
    assert norm(P[:, :0], Q[:0]) == 0
    assert relative_error((P[:, :0], Q[:0]), (P, Q)) == math.inf
