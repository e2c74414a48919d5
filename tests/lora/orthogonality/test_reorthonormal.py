"""Exact re-orthonormalisation in the middle of a run: nothing changes but the coordinates."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import adalora
from adalora.lora.orthogonality.orthogonal import orthogonality_error
from adalora.lora.orthogonality.reorthonormal import reorthonormalize
from adalora.lora.ranks.masking import zero_pruned

BOTH = pytest.mark.parametrize("kind", ["lora", "svd"])


def trained(kind, *, steps=8, **settings):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(9, 14), nn.Tanh(), nn.Linear(14, 5))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
    controller = adalora.attach(
        model, parametrization=kind, target_rank=2, total_steps=40, orthogonality="off", compact=False, **settings
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    run(model, optimizer, steps)
    return model, controller, optimizer


def run(model, optimizer, steps, *, start=0):
    for step in range(start, start + steps):
        x = torch.randn(16, 9, generator=torch.Generator().manual_seed(step))
        (model(x) - x[:, :5] * x[:, 4:]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@BOTH
def test_the_product_stays_and_the_vectors_are_orthogonal(kind):
    _, controller, optimizer = trained(kind, warmup=20)
    assert orthogonality_error(controller.handles) > 1e-3
    for h in controller.handles:
        h.mask[1] = False
        with torch.no_grad():
            zero_pruned([h])
        before, pruned = h.left_or @ h.Q_ri, h.Q_ri[1].clone()
        reorthonormalize(h, optimizer)
        torch.testing.assert_close(h.left_or @ h.Q_ri, before, atol=1e-6, rtol=1e-5)
        assert torch.equal(h.Q_ri[1], pruned)
        live = h.Q_ri[h.mask]
        torch.testing.assert_close(live @ live.T, h.row_norm**2 * torch.eye(3), atol=1e-5, rtol=0)
        if kind == "svd":
            P = h.P_or[:, h.mask]
            torch.testing.assert_close(P.T @ P, torch.eye(3), atol=1e-5, rtol=0)
            weights = h.lambda_parameter.detach()[h.mask]
            assert torch.equal(weights, weights.sort(descending=True).values)
    assert orthogonality_error(controller.handles) < 1e-5


@BOTH
def test_first_moments_are_the_gradients_of_the_new_coordinates(kind):
    """A first moment is a sum of gradients: carried over, it is what the same gradients are in the new coordinates."""
    model, controller, optimizer = trained(kind)
    x = torch.randn(16, 9)
    twin = copy.deepcopy(model)

    def gradients(of):
        of.zero_grad()
        of(x).square().mean().backward()
        return {n: p.grad for n, p in of.named_parameters() if p.grad is not None}

    old = gradients(model)
    names = dict(model.named_parameters())
    for name, gradient in old.items():
        optimizer.state[names[name]]["exp_avg"].copy_(gradient)
    for h in controller.handles:
        reorthonormalize(h, optimizer)
    new = gradients(model)
    assert max(float((old[n] - new[n]).abs().max()) for n in old) > 1e-4
    for name, gradient in new.items():
        if "lambda" not in name:
            torch.testing.assert_close(optimizer.state[names[name]]["exp_avg"], gradient, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(model(x), twin(x), atol=1e-5, rtol=1e-4)


@BOTH
def test_it_runs_at_every_allocation(kind):
    model, controller, optimizer = trained(kind, steps=0, reorthonormalize=True, allocation_interval=5)
    for step in range(40):
        run(model, optimizer, 1, start=step)
        if controller.schedule.allocates(step):
            assert orthogonality_error(controller.handles) < 1e-4
    assert controller.allocations > 2
    assert controller.live == 4


@BOTH
def test_an_untrained_and_a_diverged_layer_are_left_alone(kind):
    _, controller, optimizer = trained(kind, steps=0)
    h = controller.handles[0]
    before = h.Q_ri.clone()
    reorthonormalize(h, optimizer)
    assert torch.equal(h.Q_ri, before)
    h.P_or[0, 0] = torch.nan
    reorthonormalize(h, None)
    assert torch.equal(h.Q_ri, before)
