"""What a score is and is not: measured on small models. `docs/method.md` states the results."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

import adalora
from adalora.config import AdaLoraConfig
from adalora.core.importance import SmoothedImportance, left_products, right_products, triplet_score
from adalora.lora.measures.scoring import Scorer
from helpers.toys import adamw, batch, lora, train

GRADIENT_KINDS = ["sensitivity_uncertainty", "ratio", "sensitivity"]


def scores_of(P, Q, gradients, *, kind):
    """Scores of one module from a sequence of gradients ∂L/∂W, weights fixed."""
    averages = [SmoothedImportance.zeros_like(t[None]) for t in (P, P[0], Q)]
    for G in gradients:
        product, weights = left_products(P[None], (G @ Q.T)[None])
        for average, value in zip(averages, (product, weights, right_products(Q[None], (P.T @ G)[None]))):
            average.update(value, beta1=0.85, beta2=0.85)
    left, weights, right = averages
    return triplet_score(weights.score(kind), left.score(kind), right.score(kind))[0]


def example(seed=0, r=4):
    generator = torch.Generator().manual_seed(seed)
    P, Q = torch.randn(7, r, generator=generator), torch.randn(r, 6, generator=generator)
    return P, Q, [torch.randn(7, 6, generator=generator) for _ in range(12)]


@pytest.mark.parametrize("kind", GRADIENT_KINDS)
@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 100), st.integers(0, 10**6))
def test_rescaling_a_triplet_changes_no_score(kind, c, seed):
    """P·c and Q/c, or P·c and λ/c: weights and gradients scale inversely."""
    P, Q, gradients = example(seed)
    torch.testing.assert_close(
        scores_of(P * c, Q / c, gradients, kind=kind), scores_of(P, Q, gradients, kind=kind), rtol=2e-3, atol=0
    )


@pytest.mark.parametrize("c", [0.01, 3.0, 200.0])
def test_rescaling_leaves_the_magnitude_and_changes_lambda_alone(c):
    """|λ|·‖P‖·‖Q‖ is the size of the triplet's ΔW; |λ| by itself is whatever P and Q leave to it."""
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=10, parametrization="svd")
    scorers = {
        kind: Scorer(controller.handles, AdaLoraConfig(importance=kind, parametrization="svd"))
        for kind in ("magnitude", "lambda_magnitude")
    }
    with torch.no_grad():
        for h in controller.handles:
            h.lambda_parameter.copy_(torch.rand(h.rank) + 0.5)
    before = {kind: scorer.scores() for kind, scorer in scorers.items()}
    with torch.no_grad():
        for h in controller.handles:
            h.P_or.mul_(c)
            h.lambda_parameter.div_(c)
    torch.testing.assert_close(scorers["magnitude"].scores(), before["magnitude"])
    torch.testing.assert_close(scorers["lambda_magnitude"].scores(), before["lambda_magnitude"] / c)


@pytest.mark.parametrize("kind", GRADIENT_KINDS)
@settings(max_examples=25, deadline=None)
@given(st.permutations(range(4)), st.integers(0, 10**6))
def test_permuting_triplets_permutes_scores(kind, order, seed):
    P, Q, gradients = example(seed)
    index = torch.tensor(order)
    permuted = scores_of(P[:, index], Q[index], gradients, kind=kind)
    torch.testing.assert_close(permuted, scores_of(P, Q, gradients, kind=kind)[index], rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", GRADIENT_KINDS)
def test_rotating_triplets_among_themselves_changes_scores(kind):
    """The same ΔW and the same gradients in other coordinates: which triplets there are is part of the score."""
    P, Q, gradients = example()
    R = torch.linalg.qr(torch.randn(4, 4)).Q
    torch.testing.assert_close((P @ R) @ (R.T @ Q), P @ Q)
    before, after = scores_of(P, Q, gradients, kind=kind), scores_of(P @ R, R.T @ Q, gradients, kind=kind)
    assert float((after.sort().values / before.sort().values - 1).abs().max()) > 0.02


def test_rotating_inputs_changes_the_scores_of_P_and_Q_but_not_of_lambda():
    """λ's product is an inner product of P·Q with the gradient; entries of P and Q hang on the basis."""
    P, Q, gradients = example()
    U, V = torch.linalg.qr(torch.randn(7, 7)).Q, torch.linalg.qr(torch.randn(6, 6)).Q
    turned = [U @ G @ V for G in gradients]

    def of_lambda(P, Q, gradients):
        average = SmoothedImportance.zeros_like(P[0][None])
        for G in gradients:
            average.update(left_products(P[None], (G @ Q.T)[None])[1], beta1=0.85, beta2=0.85)
        return average.score("sensitivity_uncertainty")[0]

    torch.testing.assert_close(of_lambda(U @ P, Q @ V, turned), of_lambda(P, Q, gradients), rtol=1e-3, atol=1e-5)
    kind = "sensitivity_uncertainty"
    before, after = scores_of(P, Q, gradients, kind=kind), scores_of(U @ P, Q @ V, turned, kind=kind)
    assert float((after / before - 1).abs().max()) > 0.01


@pytest.fixture(scope="module")
def learned():
    """A model at the end of warm-up with its triplets handed over, and the loss on much data."""
    model = lora(r=6)
    controller = adalora.attach(model, target_rank=2, total_steps=1000, warmup=150, orthogonality="off", scale="target")
    train(model, adamw(model), 151)
    x, y = (torch.cat(parts) for parts in zip(*(batch(1000 + k) for k in range(64))))

    def loss():
        return (model(x) - y).square().mean()

    return model, controller, loss


def changes_of_loss(controller, loss):
    """Loss without each triplet, minus the loss; and its first-order estimate -λ·∂L/∂λ."""
    for h in controller.handles:
        h.P_parameter.grad = h.Q_parameter.grad = None
    base = loss()
    base.backward()
    true, linear = [], []
    with torch.no_grad():
        for h in controller.handles:
            linear += (-(h.P_or * h.as_P(h.P_parameter.grad)).sum(dim=0)).tolist()
            for i in range(h.rank):
                column = h.P_or[:, i].clone()
                h.P_or[:, i] = 0
                true.append(float(loss() - base))
                h.P_or[:, i] = column
    return torch.tensor(true), torch.tensor(linear)


def test_lambda_times_its_gradient_is_the_loss_change_to_first_order(learned):
    """Exact for small λ: with all triplets scaled down it converges to the true change."""
    model, controller, loss = copy.deepcopy(learned[0]), *learned[1:]
    with torch.no_grad():
        saved = [h.P_or.clone() for h in controller.handles]
        for h in controller.handles:
            h.P_or.mul_(1e-2)
    true, linear = changes_of_loss(controller, lambda: loss().double())
    with torch.no_grad():
        for h, P in zip(controller.handles, saved):
            h.P_or.copy_(P)
    assert model is not None
    big = true.abs() > 0.2 * true.abs().max()
    torch.testing.assert_close(linear[big], true[big], rtol=0.1, atol=0)


def test_at_full_size_first_order_says_little_and_averages_more(learned):
    """Rank correlations with the true change, one trained model."""
    model, controller, loss = learned
    true, linear = changes_of_loss(controller, loss)
    optimizer = adamw(model, lr=0.0)
    correlations = {"first_order": float(spearmanr(linear.abs(), true).statistic)}
    for kind in ("sensitivity_uncertainty", "sensitivity", "lambda_sensitivity", "magnitude"):
        scorer = Scorer(controller.handles, AdaLoraConfig(importance=kind))
        for step in range(40):
            x, y = batch(step)
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            scorer.observe()
        correlations[kind] = float(spearmanr(scorer.scores(), true).statistic)
    assert 0.5 < correlations["first_order"] < 0.75
    assert 0.5 < correlations["magnitude"] < 0.75
    for kind in ("sensitivity_uncertainty", "sensitivity", "lambda_sensitivity"):
        assert 0.75 < correlations[kind] < 0.9


def test_batch_size_sets_the_size_of_a_score_and_hardly_its_noise(learned):
    """Near a minimum gradients are noise: |w·g| shrinks with the batch, its relative spread does not.

    Two disjoint streams of 25 batches each, of 4 and of 64 rows.
    """
    model, controller, _ = learned
    agreement, spread, level = {}, {}, {}
    for size in (4, 64):
        streams = []
        for stream in range(2):
            scorer = Scorer(controller.handles, AdaLoraConfig())
            for step in range(25):
                first = 5000 + stream * 999 + step * 4
                x, y = (torch.cat(parts)[:size] for parts in zip(*(batch(first + k) for k in range(4))))
                for h in controller.handles:
                    h.P_parameter.grad = h.Q_parameter.grad = None
                (model(x) - y).square().mean().backward()
                scorer.observe()
            streams.append(scorer.scores())
        agreement[size] = float(spearmanr(*streams).statistic)
        spread[size] = float((streams[0] / streams[1]).log().abs().median())
        level[size] = float(streams[0].median())
    assert min(agreement.values()) > 0.95
    assert level[64] < 0.2 * level[4]
    assert 0.5 < spread[64] / spread[4] < 1.5
