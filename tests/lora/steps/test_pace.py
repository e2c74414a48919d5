"""P's steps grow as triplets go: what is left trains as a LoRA of its rank does."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import adalora
from adalora.config import AdaLoraConfig
from adalora.lora.steps.pace import Pace

STEPS = 40
X, Y = torch.randn(32, 12, generator=torch.manual_seed(1)), torch.randn(32, 4, generator=torch.manual_seed(2))
TINY = {"lr": 1e-2, "weight_decay": 0.0, "eps": 1e-30}


class Net(nn.Module):
    """Three layers of different shapes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 20), nn.Linear(20, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def make(*, rslora=False, optimizer=torch.optim.AdamW, options=TINY, **fields):
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["a", "b", "c"], use_rslora=rslora)
    model = get_peft_model(Net().double(), config, autocast_adapter_dtype=False).double()
    controller = adalora.attach(model, total_steps=STEPS, target_rank=2, **fields)
    return model, controller, optimizer([p for p in model.parameters() if p.requires_grad], **options)


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X.double()) - Y.double()).square().mean().backward()
        optimizer.step()


def end_of(controller):
    return controller.schedule.decrease_end + 1


def assert_same(one, two):
    assert one.ranks == two.ranks
    for mine, theirs in zip(one.handles, two.handles):
        if not mine.removed:
            torch.testing.assert_close(mine.P_parameter, theirs.P_parameter, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(mine.Q_parameter, theirs.Q_parameter, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_left_trains_as_a_lora_of_its_rank(rslora):
    """Written down anew: the scale of the target rank, P shorter by as much, and torch's Adam alone."""
    model, controller, optimizer = make(rslora=rslora, orthogonality="off")
    train(model, optimizer, end_of(controller))
    scale, factor = (16 / 2**0.5, 2.0) if rslora else (8.0, 4.0)
    pairs, twin = [], torch.optim.AdamW([nn.Parameter(torch.zeros(1))], **TINY)
    for h in controller.handles:
        assert h.lora_scale * factor == pytest.approx(scale)
        P, Q = (nn.Parameter(t.detach().clone()) for t in (h.P_parameter / factor, h.Q_parameter))
        for parameter, source, gradient in ((P, h.P_parameter, factor), (Q, h.Q_parameter, 1.0)):
            state = {key: value.clone() for key, value in optimizer.state[source].items()}
            state["exp_avg"] *= gradient
            state["exp_avg_sq"] *= gradient**2
            twin.state[parameter] = state
            twin.param_groups[0]["params"].append(parameter)
        pairs.append((P, Q))
    base = [h.layer.get_base_layer() for h in controller.handles]
    for _ in range(STEPS - end_of(controller)):
        x = X.double()
        for number, (layer, (P, Q)) in enumerate(zip(base, pairs)):
            x = layer(x) + scale * x @ Q.T @ P.T
            x = x if number == 2 else torch.tanh(x)
        twin.zero_grad()
        (x - Y.double()).square().mean().backward()
        twin.step()
    train(model, optimizer, STEPS - end_of(controller))
    for h, (P, Q) in zip(controller.handles, pairs):
        torch.testing.assert_close(h.P_parameter, P * factor, rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(h.Q_parameter, Q, rtol=1e-8, atol=1e-11)


def longer(kind, controllers):
    """An optimizer that lengthens P's steps by itself."""

    class Longer(kind):
        def step(self, closure=None):
            (controller,) = controllers
            ratio = 24 / sum(controller.ranks.values())
            before = [(h.P_parameter, h.P_parameter.detach().clone()) for h in controller.handles if h.rank]
            super().step(closure)
            for P, old in before:
                P.data = old + ratio * (P.detach() - old)

    return Longer


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
        (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
        (torch.optim.Adafactor, {"lr": 1e-2}),
    ],
    ids=lambda value: getattr(value, "__name__", "options"),
)
@pytest.mark.parametrize("compact", [True, False])
def test_a_whole_run_beside_an_optimizer_that_does_it_by_itself(kind, options, compact):
    model, controller, optimizer = make(optimizer=kind, options=options, compact=compact)
    attached = []
    other, reference, by_itself = make(optimizer=longer(kind, attached), options=options, pace="fixed", compact=compact)
    attached.append(reference)
    for _ in range(STEPS):
        train(model, optimizer, 1)
        train(other, by_itself, 1)
        assert_same(controller, reference)
    assert sum(controller.ranks.values()) == 6


def test_no_step_is_longer_before_a_triplet_is_gone():
    model, controller, optimizer = make()
    other, fixed, its = make(pace="fixed")
    train(model, optimizer, controller.schedule.warmup_steps)
    train(other, its, controller.schedule.warmup_steps)
    assert_same(controller, fixed)
    train(model, optimizer, 8)
    train(other, its, 8)
    a, b = (c.handles[0].P_parameter for c in (controller, fixed))
    assert a.shape != b.shape or bool((a != b).any())


def test_what_has_not_moved_is_left_where_it_is():
    model, controller, optimizer = make()
    train(model, optimizer, end_of(controller))
    pace = Pace(controller.handles)
    pace._triplets = 24
    assert pace.factor == 4
    before = [h.P_parameter.detach().clone() for h in controller.handles]
    pace.before(optimizer)
    pace.after()
    assert all(bool((h.P_parameter == b).all()) for h, b in zip(controller.handles, before))
    with torch.no_grad():
        pace.before(optimizer)
        controller.handles[0].P_parameter.add_(1)
        pace.after()
    torch.testing.assert_close(controller.handles[0].P_parameter.detach(), before[0] + 4)


def test_a_copy_of_the_weights_that_the_optimizer_keeps_moves_along():
    """Schedule-free keeps z beside the weights."""

    class WithCopy(torch.optim.SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p].setdefault("z", p.detach().clone())
            super().step(closure)
            for p in self.param_groups[0]["params"]:
                self.state[p]["z"].sub_(p.grad, alpha=self.param_groups[0]["lr"])

    model, controller, optimizer = make(
        optimizer=WithCopy, options={"lr": 1e-2}, orthogonality="off", handover=False, revival=False
    )
    for _ in range(STEPS):
        train(model, optimizer, 1)
        for h in controller.handles:
            if h.rank:
                mine, copy = h.P_parameter.detach(), optimizer.state[h.P_parameter]["z"]
                torch.testing.assert_close(copy[:, h.mask], mine[:, h.mask])


@pytest.mark.parametrize(
    "fields",
    [
        {"scale": "matched"},
        {"scale": "target"},
        {"scale": 1.5},
        {"parametrization": "svd"},
        {"schedule": "constant"},
        {"pace": "fixed"},
    ],
    ids=str,
)
def test_where_steps_keep_their_length(fields):
    assert AdaLoraConfig(target_rank=2, **fields).pace == "fixed"
    assert AdaLoraConfig(target_rank=2).pace == "steady"
    _, controller, _ = make(**fields)
    assert controller._pace is None
