import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adalora.core.initialization import LORA_ROW_NORM, balance


@settings(max_examples=100, deadline=None)
@given(
    d_out=st.integers(1, 20),
    d_in=st.integers(1, 20),
    r=st.integers(1, 20),
    row_norm=st.sampled_from([LORA_ROW_NORM, 1.0, 3.0]),
    seed=st.integers(0, 10**6),
)
def test_same_product_in_singular_vectors(d_out, d_in, r, row_norm, seed):
    r = min(r, d_in)
    generator = torch.Generator().manual_seed(seed)
    P = torch.randn(d_out, r, generator=generator, dtype=torch.float64)
    # Orthonormal rows times a mild spread: a random square Q may be nearly singular, and the tolerances say nothing.
    basis = torch.linalg.qr(torch.randn(d_in, r, generator=generator, dtype=torch.float64)).Q.T
    Q = (1 + torch.rand(r, 1, generator=generator, dtype=torch.float64)) * basis
    Q = Q + 0.3 * torch.tril(torch.rand(r, r, generator=generator, dtype=torch.float64), -1) @ basis / math.sqrt(r)
    new = balance(P, Q, row_norm=row_norm)
    product = P @ Q
    close = {"rtol": 0, "atol": 1e-10 * (1 + float(product.norm()))}
    eye = torch.eye(r, dtype=torch.float64)

    torch.testing.assert_close(new.P_or @ new.Q_ri, product, **close)
    # Columns of P: orthogonal, as long as the singular values over ρ, falling.
    gram = new.P_or.T @ new.P_or
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-9 * (1 + float(gram.max())))
    singular = torch.zeros(r, dtype=torch.float64)
    values = torch.linalg.svdvals(product)[:r]
    singular[: len(values)] = values
    torch.testing.assert_close(new.P_or.norm(dim=0) * row_norm, singular, **close)
    # Rows of Q: orthogonal, of length ρ, all of them.
    torch.testing.assert_close(new.Q_ri @ new.Q_ri.T, row_norm**2 * eye, rtol=0, atol=1e-10 * (1 + row_norm**2))
    # The transforms are what they say, and inverse to each other.
    torch.testing.assert_close(P @ new.to_P, new.P_or, **close)
    torch.testing.assert_close(new.to_Q @ Q, new.Q_ri, rtol=0, atol=1e-9)
    torch.testing.assert_close(new.to_P @ new.to_Q, eye, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_spare_triplets_of_a_product_of_lower_rank(rank):
    P = torch.zeros(9, 5)
    P[:, :rank] = torch.randn(9, rank)
    Q = torch.randn(5, 12)
    new = balance(P, Q)
    torch.testing.assert_close(new.P_or @ new.Q_ri, P @ Q, rtol=1e-4, atol=1e-5)
    assert float(new.P_or[:, rank:].abs().max()) < 1e-5
    torch.testing.assert_close(new.Q_ri @ new.Q_ri.T, torch.eye(5) / 3, rtol=0, atol=1e-5)
    # The rows stay in Q's row space.
    basis = torch.linalg.qr(Q.T).Q
    torch.testing.assert_close(new.Q_ri @ basis @ basis.T, new.Q_ri, rtol=0, atol=1e-5)


def test_twice_is_once():
    once = balance(torch.randn(9, 4, dtype=torch.float64), torch.randn(4, 12, dtype=torch.float64))
    twice = balance(once.P_or, once.Q_ri)
    sign = torch.diag(twice.to_P).sign()  # singular vectors are fixed up to their sign
    torch.testing.assert_close(twice.to_P, torch.diag(sign), rtol=0, atol=1e-10)
    torch.testing.assert_close(twice.P_or * sign, once.P_or, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("given_type", "result"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_types(given_type, result):
    P, Q = torch.randn(6, 3).to(given_type), torch.randn(3, 8).to(given_type)
    new = balance(P, Q)
    assert {t.dtype for t in (new.P_or, new.Q_ri, new.to_P, new.to_Q)} == {result}
    torch.testing.assert_close(new.P_or @ new.Q_ri, P.to(result) @ Q.to(result), rtol=1e-4, atol=1e-5)


def test_row_norm_is_that_of_loras_own_rows():
    lora_A = nn.Linear(4096, 64, bias=False)
    nn.init.kaiming_uniform_(lora_A.weight, a=math.sqrt(5))  # as PEFT does
    measured = float(lora_A.weight.detach().square().sum(dim=1).mean().sqrt())
    assert measured == pytest.approx(LORA_ROW_NORM, rel=0.01)
