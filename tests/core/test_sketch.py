"""The streaming sketch against the matrix that it never forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adalora.core.sketch import MatrixSketch


def stream(d_out, d_in, *, rank, batches=4, n=16, noise=0.0, seed=0):
    """Pairs (x, δ) whose Σ δᵀx has `rank` strong directions."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rank, d_out, generator=generator), torch.randn(rank, d_in, generator=generator)
    strength = 2.0 ** -torch.arange(rank)
    for _ in range(batches):
        codes = torch.randn(n, rank, generator=generator)
        yield (
            codes @ right + noise * torch.randn(n, d_in, generator=generator),
            (codes * strength) @ left + noise * torch.randn(n, d_out, generator=generator),
        )


@settings(max_examples=40, deadline=None)
@given(d_out=st.integers(1, 30), d_in=st.integers(1, 30), rank=st.integers(1, 6), seed=st.integers(0, 1000))
def test_a_matrix_of_low_rank_is_recovered_exactly(d_out, d_in, rank, seed):
    pairs = list(stream(d_out, d_in, rank=rank, seed=seed))
    sketch = MatrixSketch(d_out, d_in, rank=rank, seed=seed)
    for x, delta in pairs:
        sketch.add(x, delta)
    full = sum(delta.T.double() @ x.double() for x, delta in pairs)
    U, S, Vh = sketch.svd()
    kept = min(rank, d_out, d_in)
    assert (U.shape, S.shape, Vh.shape) == ((d_out, kept), (kept,), (kept, d_in))
    assert ((U * S @ Vh).double() - full).norm() < 1e-3 * full.norm()
    assert (S[:-1] >= S[1:]).all()
    assert (Vh @ Vh.T - torch.eye(kept)).abs().max() < 1e-4


def test_leading_directions_are_found_in_noise():
    pairs = list(stream(96, 64, rank=3, batches=20, noise=0.3))
    sketch = MatrixSketch(96, 64, rank=3)
    for x, delta in pairs:
        sketch.add(x, delta)
    _, S, Vh = torch.linalg.svd(sum(delta.T @ x for x, delta in pairs), full_matrices=False)
    _, values, found = sketch.svd()
    assert torch.linalg.svdvals(found @ Vh[:3].T).min() > 0.95
    assert (values / S[:3] - 1).abs().max() < 0.1


@pytest.mark.parametrize(("d_out", "d_in"), [(2048, 2048), (4096, 512)])
def test_memory_is_linear_in_the_widths(d_out, d_in):
    sketch = MatrixSketch(d_out, d_in, rank=8, oversampling=8)
    assert sketch.numbers <= (d_out + d_in) * (2 * 16 + 1) + d_out * 16 + d_in * 16
    assert sketch.numbers < d_out * d_in / 3


def test_the_order_of_a_stream_does_not_matter_and_half_precision_is_summed_in_fp32():
    pairs = list(stream(12, 10, rank=2))
    forwards, backwards = MatrixSketch(12, 10, rank=2), MatrixSketch(12, 10, rank=2)
    for x, delta in pairs:
        forwards.add(x.bfloat16(), delta.bfloat16())
    for x, delta in reversed(pairs):
        backwards.add(x.bfloat16(), delta.bfloat16())
    for a, b in zip(forwards.svd(), backwards.svd()):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
