import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adalora.core.factored_svd import factored_svd


@settings(max_examples=40, deadline=None)
@given(
    d_out=st.integers(1, 24),
    d_in=st.integers(1, 24),
    r=st.integers(1, 30),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_it_is_the_svd_of_the_product(d_out, d_in, r, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    P = torch.randn(d_out, r, generator=generator, dtype=dtype)
    Q = torch.randn(r, d_in, generator=generator, dtype=dtype)
    U, S, Vh = factored_svd(P, Q)
    k = min(d_out, r, d_in)
    assert U.shape == (d_out, k)
    assert S.shape == (k,)
    assert Vh.shape == (k, d_in)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    scale = float((P @ Q).norm()) + 1
    assert (U * S @ Vh - P @ Q).norm() / scale < tolerance
    eye = torch.eye(k, dtype=dtype)
    assert (U.T @ U - eye).abs().max() < tolerance
    assert (Vh @ Vh.T - eye).abs().max() < tolerance
    assert (S - torch.linalg.svdvals(P @ Q)[:k]).abs().max() / scale < tolerance
    assert (S[:-1] >= S[1:]).all()


def test_low_rank_and_zero_factors_still_give_orthonormal_vectors():
    P = torch.randn(20, 1) @ torch.ones(1, 4)
    Q = torch.randn(4, 10)
    U, S, Vh = factored_svd(P, Q)
    assert (U * S @ Vh - P @ Q).abs().max() < 1e-5
    assert (S[1:] < 1e-5 * S[0]).all()
    assert (U.T @ U - torch.eye(4)).abs().max() < 1e-5
    U, S, Vh = factored_svd(torch.zeros(20, 3), torch.randn(3, 10))
    assert (S == 0).all()
    assert (Vh @ Vh.T - torch.eye(3)).abs().max() < 1e-5


def test_signs_do_not_depend_on_the_signs_of_the_factors():
    P, Q = torch.randn(12, 3), torch.randn(3, 9)
    for a, b in zip(factored_svd(P, Q), factored_svd(-P, -Q)):
        assert torch.allclose(a, b, atol=1e-5)


def test_rank_zero_half_precision_and_gradients():
    U, S, Vh = factored_svd(torch.zeros(5, 0), torch.zeros(0, 4))
    assert U.shape == (5, 0)
    assert S.shape == (0,)
    assert Vh.shape == (0, 4)
    P = torch.randn(6, 2, dtype=torch.bfloat16, requires_grad=True)
    U, S, Vh = factored_svd(P, torch.randn(2, 6, dtype=torch.bfloat16))
    assert U.dtype == torch.float32
    assert not U.requires_grad


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(3, 4\)"):
        factored_svd(torch.zeros(3, 2), torch.zeros(3, 4))
