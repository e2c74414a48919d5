"""Which weights and gradients the scores see, around the orthogonality term."""

import pytest
import torch

import adalora
from adalora.lora.measures.scoring import Scorer
from helpers.toys import adamw, batch, lora, train

COUPLED = {"parametrization": "svd", "initialization": "gaussian", "orthogonality": "squared"}


def one_step(model, optimizer):
    x, y = batch(0)
    torch.nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()


def averages(controller):
    return controller._scorer.state_dict()


def test_weights_as_the_step_found_them_without_a_coupled_term():
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=40, handover=False, score_weights="before")
    expected = Scorer(controller.handles, controller.config)
    x, y = batch(0)
    torch.nn.functional.mse_loss(model(x), y).backward()
    expected.observe()
    adamw(model).step()
    found = averages(controller)
    assert len(found) > 1
    assert all(torch.equal(value, found[name]) for name, value in expected.state_dict().items())


def test_the_term_reaches_only_what_the_optimizer_trains():
    """P and λ of the first block are frozen, and Q has an optimizer of its own."""
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=40, **COUPLED)
    frozen = controller.handles[0].P_parameter
    frozen.requires_grad_(False)
    right = {id(h.Q_parameter) for h in controller.handles}
    trained = [p for p in model.parameters() if p.requires_grad]
    x, y = batch(0)
    torch.nn.functional.mse_loss(model(x), y).backward()
    before = {id(p): p.grad.clone() for p in trained}
    torch.optim.SGD([p for p in trained if id(p) not in right], lr=0.0).step()
    assert frozen.grad is None
    for h in controller.handles[1:]:
        assert torch.equal(h.Q_parameter.grad, before[id(h.Q_parameter)])
        assert not torch.equal(h.P_parameter.grad, before[id(h.P_parameter)])


class Forgetful(torch.optim.AdamW):
    """Lets go of some gradients in its step."""

    dropped = ()

    def step(self, closure=None):
        super().step(closure)
        for parameter in self.dropped:
            parameter.grad = None


def test_an_optimizer_that_drops_a_gradient_in_its_step():
    """It is not scored in this step, and the term is taken out of all others."""
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=40, score_gradient="task", **COUPLED)
    train(model, adamw(model), 2)  # λ leaves 0, without which P and Q have no gradient
    controller._scorer.reset()
    optimizer = Forgetful([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first, second = controller.handles[:2]
    optimizer.dropped = [first.Q_parameter]
    x, y = batch(0)
    torch.nn.functional.mse_loss(model(x), y).backward()
    task = second.Q_parameter.grad.clone()
    optimizer.step()
    assert first.Q_parameter.grad is None
    torch.testing.assert_close(second.Q_parameter.grad, task, rtol=1e-5, atol=1e-8)
    found = averages(controller)
    assert not found[f"{first.name}.Q.sensitivity"].any()
    assert found[f"{second.name}.Q.sensitivity"].any()


@pytest.mark.parametrize("kind", ["lora", "svd"])
def test_adapters_of_two_types_in_one_model(kind):
    """Gradients of both types are looked at for infinities."""
    model = lora()
    for name, parameter in model.named_parameters():
        if "lora_" in name and "head" in name:
            parameter.data = parameter.data.bfloat16()
    model.base_model.model.head.get_base_layer().float()
    controller = adalora.attach(model, target_rank=2, total_steps=40, handover=False, parametrization=kind)
    optimizer = adamw(model)
    one_step(model, optimizer)
    assert controller._scorer.skipped == 0
    optimizer.zero_grad()
    x, y = batch(1)
    torch.nn.functional.mse_loss(model(x), y).backward()
    controller.handles[-1].Q_parameter.grad.fill_(torch.inf)
    optimizer.step()
    assert controller._scorer.skipped == 1


@pytest.mark.parametrize(("options", "to_the_end"), [({}, False), ({"parametrization": "svd"}, True)])
def test_vectors_turn_until_the_ranks_are_final(options, to_the_end):
    """An optimizer that moves nothing: what moves is the term's."""
    model = lora()
    controller = adalora.attach(model, target_rank=3, total_steps=40, orthogonality_weight=0.1, **options)
    train(model, adamw(model), 3)
    moved = {}
    for step in range(3, 40):
        phase, before = controller.phase, [p.detach().clone() for p in controller.handles[0].parameters]
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        after = controller.handles[0].parameters
        if not controller.schedule.allocates(step):
            changed = any(not torch.equal(a, b) for a, b in zip(before, after))
            moved.setdefault(phase, []).append(changed)
    assert set(moved["warmup"]) == {True}
    assert set(moved["final"]) == {to_the_end}


def test_at_a_learning_rate_of_zero_nothing_turns():
    """The first step of most learning-rate warm-ups."""
    model = lora()
    controller = adalora.attach(model, target_rank=3, total_steps=40)
    before = [p.detach().clone() for h in controller.handles for p in h.parameters]
    train(model, adamw(model, lr=0.0), 1)
    assert all(torch.equal(a, b) for a, b in zip(before, (p for h in controller.handles for p in h.parameters)))
