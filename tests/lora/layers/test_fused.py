"""The fused function against the same sum written out, values and gradients of first and second order."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from adalora.lora.layers.fused import fused_lora


def operands(*, shape=(2, 3, 5), d_out=4, r=2, dtype=torch.float64, trained=True):
    x = torch.randn(*shape, dtype=dtype, requires_grad=trained)
    W = torch.randn(d_out, shape[-1], dtype=dtype)
    Q = torch.randn(r, shape[-1], dtype=dtype, requires_grad=True)
    P = torch.randn(d_out, r, dtype=dtype, requires_grad=True)
    return x, W, Q, P


def written_out(x, W, Q, P, *, scale, dropout=0.0):
    return x @ W.T + functional.dropout(x, dropout) @ Q.T @ P.T * scale


def fused(x, W, Q, P, *, scale, dropout=0.0, with_weight=True, in_place=True):
    weight = W if with_weight else None
    return fused_lora(x, x @ W.T, Q, P, scale=scale, dropout=dropout, weight_oi=weight, in_place=in_place)


@pytest.mark.parametrize(
    ("with_weight", "in_place", "dropout"), list(itertools.product([True, False], [True, False], [0.0, 0.4]))
)
def test_gradients_of_first_and_second_order(with_weight, in_place, dropout):
    x, W, Q, P = operands()

    def output(x, Q, P):
        torch.manual_seed(1)  # the same zeros at every call
        return fused(x, W, Q, P, scale=0.7, dropout=dropout, with_weight=with_weight, in_place=in_place)

    assert gradcheck(output, (x, Q, P))
    assert gradgradcheck(output, (x, Q, P))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (2, 1, 3, 5), (0, 5), (5,)])
def test_equals_the_sum_written_out(shape, dropout):
    x, W, Q, P = operands(shape=shape)
    results = []
    for function in (written_out, fused):
        torch.manual_seed(3)
        out = function(x, W, Q, P, scale=1.7, dropout=dropout)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, Q, P))))
    for expected, actual in zip(*results):
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def with_lambda(function, *, scale=0.7, **options):
    """The function of x, Q, P and λ; the same zeros at every call."""

    def output(x, Q, P, weights, W):
        torch.manual_seed(1)
        if function is fused_lora:
            return fused_lora(x, x @ W.T, Q, P, scale=scale, lambda_r=weights, **options)
        return written_out(x, W, Q, P * weights, scale=scale, dropout=options.get("dropout", 0.0))

    return output


@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_lambda_has_gradients_of_first_and_second_order(with_weight, dropout):
    x, W, Q, P = operands()
    weights = torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True)
    options = {"dropout": dropout, "weight_oi": W if with_weight else None, "in_place": with_weight}
    actual, expected = with_lambda(fused_lora, **options), with_lambda(written_out, dropout=dropout)
    results = []
    for function in (actual, expected):
        out = function(x, Q, P, weights, W)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, Q, P, weights))))
    for a, b in zip(*results):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda *inputs: actual(*inputs, W), (x, Q, P, weights))
    assert gradgradcheck(lambda *inputs: actual(*inputs, W), (x, Q, P, weights))


@pytest.mark.parametrize("frozen", ["x", "Q", "P", "weights"])
def test_each_gradient_is_the_same_without_another(frozen):
    x, W, Q, P = operands()
    given = {"x": x, "Q": Q, "P": P, "weights": torch.tensor([0.0, 2.0], dtype=torch.float64, requires_grad=True)}
    given[frozen].requires_grad_(False)
    trained = [t for t in given.values() if t.requires_grad]
    results = [
        torch.autograd.grad(function(*given.values(), W).square().sum(), trained)
        for function in (with_lambda(fused_lora, weight_oi=W), with_lambda(written_out))
    ]
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_same_random_numbers_as_dropout():
    x, W, Q, P = operands(dtype=torch.float32, shape=(64, 33))
    after = []
    for function in (written_out, fused):
        torch.manual_seed(3)
        function(x, W, Q, P, scale=1.0, dropout=0.1)
        after.append(torch.rand(1))
    assert torch.equal(*after)


def test_inputs_that_are_not_contiguous():
    x, W, Q, P = operands(shape=(4, 3, 5))
    x_t = x.detach().transpose(0, 1).requires_grad_()
    gradient = torch.randn(4, 3, 4, dtype=torch.float64).transpose(0, 1)
    results = [
        torch.autograd.grad(function(x_t, W, Q, P, scale=0.5), (x_t, Q, P), gradient)
        for function in (written_out, fused)
    ]
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_only_what_is_trained_gets_a_gradient():
    x, W, Q, P = operands(trained=False)
    Q.requires_grad_(False)
    fused(x, W, Q, P, scale=1.0).sum().backward()
    assert x.grad is None
    assert Q.grad is None
    expected = torch.autograd.grad(written_out(x, W, Q, P, scale=1.0).sum(), P)[0]
    torch.testing.assert_close(P.grad, expected)


def test_a_frozen_P_gets_no_gradient():
    x, W, Q, P = operands()
    P.requires_grad_(False)
    fused(x, W, Q, P, scale=1.3).sum().backward()
    assert P.grad is None
    expected = torch.autograd.grad(written_out(x, W, Q, P, scale=1.3).sum(), (x, Q))
    torch.testing.assert_close((x.grad, Q.grad), expected)


def test_base_gets_the_gradient_where_no_weight_stands_for_it():
    x, W, Q, P = operands()
    W.requires_grad_()
    fused(x, W, Q, P, scale=1.0, with_weight=False).sum().backward()
    torch.testing.assert_close(W.grad, x.detach().sum(dim=(0, 1)).expand(4, 5))


def test_narrower_base_is_widened_as_a_sum_would():
    x, W, Q, P = operands(dtype=torch.float32)
    base = (x @ W.T).detach().bfloat16().requires_grad_()
    out = fused_lora(x, base, Q, P, scale=2.0, in_place=True)
    torch.testing.assert_close(out, base.detach() + 2.0 * x @ Q.T @ P.T)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert base.grad.dtype == torch.bfloat16
    assert base.grad.eq(1).all()


def test_output_may_be_changed_in_place_afterwards():
    x, W, Q, P = operands()
    results = []
    for function in (written_out, fused):
        out = functional.relu(function(x, W, Q, P, scale=1.0), inplace=True)
        results.append(torch.autograd.grad(out.sum(), (x, Q, P)))
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected)


def test_backward_inside_autocast_keeps_full_precision():
    x, W, Q, P = operands(dtype=torch.float32)
    expected = torch.autograd.grad(written_out(x, W, Q, P, scale=1.0).sum(), (x, Q, P))
    out = fused(x, W, Q, P, scale=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = torch.autograd.grad(out.sum(), (x, Q, P))
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("own_lambda", [False, True])
def test_keeps_x_the_mask_as_bytes_and_the_small_product(own_lambda):
    x, W, Q, P = operands(shape=(8, 16), d_out=32)
    weights = torch.ones(2, dtype=torch.float64, requires_grad=True) if own_lambda else None
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        base = (x @ W.T).detach()
        fused_lora(x, base, Q, P, scale=1.0, lambda_r=weights, dropout=0.5, weight_oi=W)
    given = [t for t in (x, W, Q, P, weights) if t is not None]
    mine = [t for t in kept if not any(t.data_ptr() == o.data_ptr() for o in given)]
    assert sorted((t.dtype, tuple(t.shape)) for t in mine if t.dtype == torch.uint8) == [(torch.uint8, (8, 16))]
    assert [tuple(t.shape) for t in mine if t.dtype != torch.uint8] == [(2, 8)]


def test_saved_by_someone_else_and_overwritten_is_an_error_not_a_wrong_gradient():
    x, W, Q, P = operands()
    base = (x @ W.T).exp()  # exp keeps its output
    out = fused_lora(x, base, Q, P, scale=1.0, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_base_layer_s_product_made_inside(bias, dropout):
    x, W, Q, P = operands()
    b = torch.randn(4, dtype=torch.float64) if bias else None
    results = []
    for base in (functional.linear(x, W, b), None):
        torch.manual_seed(1)
        out = fused_lora(x, base, Q, P, scale=0.7, dropout=dropout, weight_oi=W, bias_o=b)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, Q, P))))
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    out.add_(1)  # the next layer may change it in place
    inside = lambda *inputs: fused_lora(inputs[0], None, *inputs[1:], scale=0.7, weight_oi=W, bias_o=b)  # noqa: E731
    assert gradcheck(inside, (x, Q, P))
    assert gradgradcheck(inside, (x, Q, P))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("order", [1, 2])
def test_what_is_of_another_type_is_cast_as_autograd_s_casts_are(inside, order):
    """Leaves are wide and x is narrow, as under autocast: gradients come in each one's own type."""
    x, W, Q, P = operands(dtype=torch.float32, shape=(6, 5))
    weights = torch.tensor([0.3, -1.2], requires_grad=True)
    leaves = (x, Q, P, weights)
    results = []
    for by_hand in (True, False):
        narrow = [t.bfloat16() for t in (x, W, Q, P, weights)]
        rows = narrow[0]
        left, right, lam = narrow[2:] if by_hand else (Q, P, weights)
        weight = narrow[1] if by_hand else W
        base = functional.linear(rows, narrow[1]) if by_hand or not inside else None
        out = fused_lora(rows, base, left, right, scale=0.7, lambda_r=lam, weight_oi=weight)
        grads = torch.autograd.grad(out.float().square().sum(), leaves, create_graph=order == 2)
        if order == 2:
            grads = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        results.append((out, *grads))
    for leaf, expected, actual in zip((out, *leaves), *results):
        assert actual.dtype == leaf.dtype
        rtol = 0 if order == 1 else 1e-2  # of second order several parts are added up, each in bfloat16 or in float32
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


def test_a_lambda_of_another_type_alone():
    x, _, Q, P = operands(dtype=torch.bfloat16)
    weights = torch.tensor([0.3, -1.2], requires_grad=True)
    base = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    out = fused_lora(x, base, Q, P, scale=0.7, lambda_r=weights)
    narrow = fused_lora(x, base, Q, P, scale=0.7, lambda_r=weights.detach().bfloat16())
    torch.testing.assert_close(out, narrow, rtol=0, atol=0)
    assert torch.autograd.grad(out.float().sum(), weights)[0].dtype == torch.float32
