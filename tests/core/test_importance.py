import pytest
import torch

from adalora.core.importance import SmoothedImportance, left_products, right_products, triplet_score


def test_two_steps_by_hand():
    average = SmoothedImportance.zeros_like(torch.zeros(1))
    average.update(torch.tensor([-4.0]), beta1=0.75, beta2=0.5)
    assert average.sensitivity.item() == 1.0  # 0.25 * 4
    assert average.uncertainty.item() == 1.5  # 0.5 * |4 - 1|
    average.update(torch.tensor([2.0]), beta1=0.75, beta2=0.5)
    assert average.sensitivity.item() == 1.25  # 0.75 * 1 + 0.25 * 2
    assert average.uncertainty.item() == 1.125  # 0.5 * 1.5 + 0.5 * |2 - 1.25|
    assert average.score("sensitivity_uncertainty").item() == 1.25 * 1.125
    assert average.score("ratio").item() == pytest.approx(1.25 / 1.125)
    assert average.score("sensitivity").item() == 1.25
    assert average.score(lambda mean, spread: mean - spread).item() == 1.25 - 1.125


def test_a_constant_product_is_its_own_average_and_certain():
    average = SmoothedImportance.zeros_like(torch.zeros(3))
    for _ in range(400):
        average.update(torch.tensor([2.0, -3.0, 0.0]), beta1=0.85, beta2=0.85)
    torch.testing.assert_close(average.sensitivity, torch.tensor([2.0, 3.0, 0.0]), rtol=1e-5, atol=0)
    assert average.uncertainty.max() < 1e-5


def test_ratio_without_uncertainty_is_finite_or_infinite_never_nan():
    average = SmoothedImportance(torch.tensor([0.0, 1e-3]), torch.tensor([0.0, 0.0]))
    ratio = average.score("ratio")
    assert ratio[0] == 0
    assert not bool(ratio.isnan().any())
    assert ratio[1] > ratio[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_averages_are_fp32_and_contiguous(dtype):
    stack = torch.zeros(2, 5, 3, dtype=dtype).transpose(1, 2)
    average = SmoothedImportance.zeros_like(stack)
    for tensor in (average.sensitivity, average.uncertainty):
        assert tensor.dtype == torch.float32
        assert tensor.shape == (2, 3, 5)
        assert tensor.is_contiguous()


def test_score_is_a_copy():
    average = SmoothedImportance(torch.ones(2), torch.ones(2))
    for kind in ("sensitivity", "ratio", "sensitivity_uncertainty"):
        average.score(kind).zero_()
    assert average.sensitivity.tolist() == [1, 1]
    assert average.uncertainty.tolist() == [1, 1]


def test_half_precision_products_are_made_in_fp32():
    P = torch.full((1, 2, 1), 1e-4, dtype=torch.float16)
    gradient = torch.full((1, 2, 1), 1e-4, dtype=torch.float16)  # the product, 1e-8, is 0 in float16
    products, row_sums = left_products(P, gradient)
    assert products.dtype == row_sums.dtype == torch.float32
    torch.testing.assert_close(products, torch.full((1, 2, 1), 1e-8), rtol=2e-3, atol=0)
    torch.testing.assert_close(row_sums, torch.full((1, 1), 2e-8), rtol=2e-3, atol=0)
    torch.testing.assert_close(right_products(P, gradient), products)


def test_triplet_score_by_hand():
    score_lambda = torch.tensor([[1.0, 2.0]])
    score_P = torch.tensor([[[1.0, 10.0], [3.0, 20.0], [5.0, 30.0]]])  # means of the columns: 3, 20
    score_Q = torch.tensor([[[100.0, 300.0], [1000.0, 3000.0]]])  # means of the rows: 200, 2000
    assert triplet_score(score_lambda, score_P, score_Q).tolist() == [[204.0, 2022.0]]


@pytest.mark.parametrize("c", [0.01, 7.0])
def test_scores_do_not_depend_on_how_a_triplet_shares_its_length(c):
    """P·c and Q/c are the same ΔW with gradients scaled the other way: every product stays."""
    P, Q = torch.randn(1, 6, 3, dtype=torch.float64), torch.randn(1, 3, 4, dtype=torch.float64)
    x, y = torch.randn(10, 4, dtype=torch.float64), torch.randn(10, 6, dtype=torch.float64)

    def products(P, Q):
        P, Q = P.clone().requires_grad_(), Q.clone().requires_grad_()
        ((x @ (P[0] @ Q[0]).T - y) ** 2).mean().backward()
        return (*left_products(P.detach(), P.grad), right_products(Q.detach(), Q.grad))

    for before, after in zip(products(P, Q), products(P * c, Q / c)):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)
