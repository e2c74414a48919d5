"""What a step may be in real runs, with either parametrization: gradients, number types, optimizers.

Elsewhere: `torch.compile` in `test_conformance.py`.
"""

import pytest
import torch
from kinds import BOTH, STEPS, attach
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import adalora
from adalora.errors import AdaLoraWarning
from helpers.toys import Blocks, adamw, batch, lora, train


@BOTH
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_bad_gradients_are_left_out_counted_and_told(kind, bad):
    """Every third step is bad and the user skips it in the loop's own way: here by zeroing what is not finite."""

    class Guarded(torch.optim.SGD):
        def step(self, closure=None):
            """Leave the step out, as mixed precision does."""
            if all(bool(p.grad.isfinite().all()) for g in self.param_groups for p in g["params"] if p.grad is not None):
                super().step(closure)

    model = lora()
    controller = attach(model, kind)
    optimizer = Guarded([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def run():
        for step in range(STEPS):
            x, y = batch(step)
            (model(x) - y).square().mean().backward()
            if step % 3 == 0:
                next(h for h in controller.handles if h.rank).Q_parameter.grad[0, 0] = bad
            optimizer.step()
            optimizer.zero_grad()

    with pytest.warns(AdaLoraWarning, match="had no finite gradient and are left out of the scores"):
        run()
    last = controller.history.last("allocation")
    assert last["skipped_steps"] >= 5
    assert all(torch.tensor(last["module_scores"]).isfinite())
    assert controller.live == 14


@BOTH
@pytest.mark.parametrize("fused", [True, False])
def test_a_grad_scalers_overflow_is_no_step(kind, fused):
    """No weight moves, nothing is counted; fused optimizers run their hooks all the same."""
    model = lora()
    controller = attach(model, kind)
    optimizer = adamw(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(12):
        x, y = batch(step)
        loss = (model(x) - y).square().mean()
        scaler.scale(loss * (torch.inf if step in (3, 7) else 1)).backward()
        before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        scaler.step(optimizer)
        moved = any(bool((a != b).any()) for a, b in zip(before, (p for p in model.parameters() if p.requires_grad)))
        assert moved == (step not in (3, 7))
        scaler.update()
        optimizer.zero_grad()
    assert controller.step == 10


@BOTH
def test_scores_do_not_depend_on_the_loss_scale(kind):
    """A fused optimizer unscales by itself: the gradients that the hooks see are 1024 times too large."""
    scores = []
    for scale in (None, 1024.0):
        model = lora()
        orthogonality = {"orthogonality": "squared", "score_weights": "before"} if kind == "svd" else {}
        controller = attach(model, kind, **orthogonality)
        optimizer = adamw(model, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(12):
            x, y = batch(step)
            scaler.scale((model(x) - y).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        scores.append(controller._scorer.scores())
    torch.testing.assert_close(scores[0], scores[1], rtol=2e-3, atol=1e-4 * float(scores[0].max()))


@BOTH
def test_frozen_layers_score_nothing(kind):
    """A layer whose adapter is frozen gets no gradient and goes first; what it adds is nothing, it never learned."""
    model = lora()
    for name, parameter in model.named_parameters():
        if "lora_" in name and "layers.0" in name:
            parameter.requires_grad_(False)
    controller = attach(model, kind)
    train(model, adamw(model), STEPS)
    assert {rank for name, rank in controller.ranks.items() if "layers.0" in name} == {0}
    assert controller.live == 14


class Partly(Blocks):
    """The second block's `query` is left out where `used` is False."""

    used = True

    def forward(self, x):
        for number, block in enumerate(self.layers):
            if number == 0 or self.used:
                x = x + torch.tanh(block["query"](x))
            x = x + block["down"](torch.tanh(block["up"](x)))
        return self.head(x)


@BOTH
def test_a_module_without_a_gradient_for_a_step(kind):
    """Its averages wait; the step counts for all others and is not a skipped one."""
    model = lora(base=Partly)
    controller = attach(model, kind, handover=False)
    optimizer = adamw(model)
    train(model, optimizer, 4)
    names = [f"layers.1.query.{part}.sensitivity" for part in ("P", "lambda", "Q")]
    before = controller._scorer.state_dict()
    model.base_model.model.used = False
    train(model, optimizer, 1, start=4)
    between = controller._scorer.state_dict()
    assert all(torch.equal(before[name], between[name]) for name in names)
    assert not torch.equal(before["layers.0.query.P.sensitivity"], between["layers.0.query.P.sensitivity"])
    model.base_model.model.used = True
    train(model, optimizer, STEPS - 5, start=5)
    assert controller._scorer.skipped == 0
    assert controller.live == 14


@BOTH
def test_a_module_that_never_gets_a_gradient(kind):
    """It scores nothing, goes first, and the rest of the model has the whole budget."""
    model = lora(base=Partly)
    model.base_model.model.used = False
    controller = attach(model, kind)
    train(model, adamw(model), STEPS)
    assert controller.ranks["layers.1.query"] == 0
    assert controller.live == 14
    assert controller._scorer.skipped == 0


@BOTH
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(kind, reentrant):
    """The same run as without it."""

    class Checkpointed(Blocks):
        def forward(self, x):
            if reentrant and not x.requires_grad:
                x = x.detach().requires_grad_()
            for block in self.layers:
                x = checkpoint(self.one, block, x, use_reentrant=reentrant)
            return self.head(x)

        @staticmethod
        def one(block, x):
            """One block."""
            x = x + torch.tanh(block["query"](x))
            return x + block["down"](torch.tanh(block["up"](x)))

    losses, ranks = [], []
    for base in (Blocks, Checkpointed):
        model = lora(base=base)
        controller = attach(model, kind)
        losses.append(train(model, adamw(model), STEPS))
        ranks.append(controller.ranks)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert ranks[0] == ranks[1]


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameter_types(kind, dtype):
    """Averages are fp32 whatever the type; the run allocates and stays finite."""
    model = lora().to(dtype)
    controller = attach(model, kind)
    losses = train(model, adamw(model, eps=1e-4, lr=3e-3), 20, dtype=dtype)
    left = next(iter(controller._scorer._left.values()))
    assert {left.factors.sensitivity.dtype, left.weights.uncertainty.dtype} == {torch.float32}
    losses += train(model, adamw(model, eps=1e-4, lr=3e-3), STEPS - 20, dtype=dtype)
    assert {p.dtype for h in controller.handles if not h.removed for p, _ in h.factors.values()} == {dtype}
    assert torch.tensor(losses).isfinite().all()
    assert controller.live == 14


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(kind, dtype):
    model = lora()
    controller = attach(model, kind)
    optimizer = adamw(model)
    for step in range(STEPS):
        x, y = batch(step)
        with torch.autocast("cpu", dtype=dtype):
            loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {p.dtype for h in controller.handles if not h.removed for p, _ in h.factors.values()} == {torch.float32}
    assert controller.live == 14


@BOTH
def test_P_and_Q_in_two_optimizers_make_one_step(kind):
    """And both optimizers' states are cut at compaction."""
    model = lora()
    controller = attach(model, kind)
    lefts = [h.P_parameter for h in controller.handles]
    rest = [p for h in controller.handles for p, _ in h.factors.values() if not any(p is left for left in lefts)]
    optimizers = [torch.optim.AdamW(lefts, lr=1e-2), torch.optim.AdamW(rest, lr=1e-2)]
    for step in range(STEPS):
        x, y = batch(step)
        (model(x) - y).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert controller.step == step + 1
    assert controller.live == 14
    for h in controller.handles:
        if not h.removed:
            for optimizer, parameter in zip(optimizers, (h.P_parameter, h.Q_parameter)):
                assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape


def test_a_new_optimizer_in_the_middle_takes_over():
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=STEPS)
    train(model, adamw(model), 20)
    train(model, adamw(model), 20, start=20)
    assert controller.step == STEPS
    assert controller.live == 14


def test_a_closure_sees_the_orthogonality_term():
    """Lightning and L-BFGS compute gradients inside `step`."""
    results = []
    for with_closure in (False, True):
        model = lora()
        controller = adalora.attach(
            model, target_rank=2, total_steps=STEPS, parametrization="svd", orthogonality="squared"
        )
        optimizer = adamw(model)
        for step in range(10):
            x, y = batch(step)

            def closure(x=x, y=y, model=model, optimizer=optimizer):
                optimizer.zero_grad()
                loss = (model(x) - y).square().mean()
                loss.backward()
                return loss

            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        results.append(torch.cat([h.Q_ri.flatten() for h in controller.handles]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_channels_last_parameters_are_written():
    """A 3x3 convolution whose factor is not laid out row by row: the hand-over must not write to a copy."""

    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, padding=1)

        def forward(self, x):
            return self.conv(x)

    torch.manual_seed(0)
    model = get_peft_model(Conv(), LoraConfig(r=4, target_modules=["conv"])).to(memory_format=torch.channels_last)
    controller = adalora.attach(model, target_rank=2, total_steps=20, compact=False)
    optimizer = adamw(model)
    x, y = torch.randn(4, 4, 5, 5), torch.randn(4, 6, 5, 5)
    for _ in range(20):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if controller.history.of("handover"):
            break
    h = controller.handles[0]
    gram = h.Q_ri @ h.Q_ri.T
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), atol=1e-5, rtol=0)
