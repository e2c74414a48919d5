"""Triplets that start along the loss's gradient."""

import gc
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import adalora
from adalora.errors import AttachError, ConfigError

SHAPES = {"up": (48, 32), "down": (32, 48)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(32, 48), nn.Linear(48, 32), nn.Dropout(0.3)

    def forward(self, x):
        return self.down(self.drop(torch.relu(self.up(x))))


def model_of(r=4, base=Net, **settings):
    torch.manual_seed(0)
    return get_peft_model(base(), LoraConfig(r=r, lora_alpha=r, target_modules=["up", "down"], **settings))


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(64, 32, generator=generator)
        yield x, torch.stack([x[:, 0], x[:, 1] * 2, x[:, 2].abs()], dim=1)


def loss(model, batch):
    return (model(batch[0])[:, :3] - batch[1]).square().mean()


def true_gradients(model):
    """The full weight gradients that the sketch never forms."""
    base = model.get_base_model().eval()
    weights = {name: getattr(base, name).get_base_layer().weight for name in ("up", "down")}
    for weight in weights.values():
        weight.requires_grad_(True)
    for batch in batches():
        loss(model, batch).backward()
    return {name: weight.grad for name, weight in weights.items()}


@pytest.mark.parametrize("parametrization", ["lora", "svd"])
def test_q_starts_along_the_true_gradient(parametrization):
    model = model_of()
    before = model(torch.ones(2, 32)).detach()
    lengths = {name: m.weight.norm(dim=1).square().mean() for name, m in model.named_modules() if ".lora_A.def" in name}
    sketch = adalora.GradientSketch(model, batches(), loss=loss, oversampling=12)
    sketch.initialize()
    assert sketch.batches == 3
    model.eval()
    torch.testing.assert_close(model(torch.ones(2, 32)), model_of().eval()(torch.ones(2, 32)))
    assert before.shape == (2, 32)
    for name, gradient in true_gradients(model_of()).items():
        A = getattr(model.get_base_model(), name).lora_A["default"].weight.detach()
        S = torch.linalg.svdvals(gradient)
        rows = A / A.norm(dim=1, keepdim=True)
        captured, possible = (gradient @ rows.T).norm(), S[:4].norm()
        assert captured > 0.97 * possible
        start = getattr(model_of().get_base_model(), name).lora_A["default"].weight.detach()
        assert (gradient @ (start / start.norm(dim=1, keepdim=True)).T).norm() < 0.8 * possible
        torch.testing.assert_close(sketch.spectra[name], S[:4], rtol=0.05, atol=0.1 * float(S[0]))
        mean_square = lengths[f"base_model.model.{name}.lora_A.default"]
        used = int((S[:4] > 1e-6 * S[0]).sum())  # "down" has three outputs with a gradient, its fourth row stays random
        assert used == (3 if name == "down" else 4)
        torch.testing.assert_close(A.norm(dim=1).square()[:used], mean_square.expand(used))
    controller = adalora.attach(model, target_rank=2, total_steps=20, parametrization=parametrization)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first = last = None
    for _ in range(20):
        value = loss(model, next(batches(1)))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = value.detach()
        first, last = first or float(value), float(value)
    assert controller.live == 4
    assert last < first


def test_nothing_but_q_is_changed():
    model = model_of().train()
    model.get_base_model().drop.eval()  # a mode of its own
    parameter = model.get_base_model().up.lora_B["default"].weight
    parameter.grad = torch.full_like(parameter, 3.0)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    sketch = adalora.GradientSketch(model, batches(), loss=loss)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    sketch.initialize()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])}
    assert changed == {f"base_model.model.{name}.lora_A.default.weight" for name in SHAPES}
    assert model.training
    assert not model.get_base_model().drop.training
    assert torch.equal(parameter.grad, torch.full_like(parameter, 3.0))
    assert [p for p in model.parameters() if p.grad is not None] == [parameter]
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks for m in model.modules())


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that some operation has made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and func.overloadpacket not in (torch.ops.aten.t, torch.ops.aten.detach):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_no_full_weight_gradient_is_formed():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(512, 512), nn.Linear(512, 512)

        def forward(self, x):
            return self.down(torch.relu(self.up(x)))

    model = model_of(r=2, base=Wide)
    with Largest() as seen:
        adalora.GradientSketch(model, [torch.randn(8, 512)], loss=lambda m, x: m(x).square().mean())
    assert seen.numbers < 512 * 512 / 4
    gc.collect()


def test_ranks_go_where_the_gradient_is_strong():
    model = model_of(r=6)
    sketch = adalora.GradientSketch(model, batches(), loss=loss)
    pattern = sketch.rank_pattern(8)
    assert sum(pattern.values()) == 8
    assert min(pattern.values()) >= 1
    everything = [(value, name) for name, values in sketch.spectra.items() for value in values[1:].square().tolist()]
    best = sorted(everything, reverse=True)[:6]
    assert pattern == {name: 1 + sum(owner == name for _, owner in best) for name in SHAPES}
    ranked = model_of(r=1, rank_pattern=pattern)
    again = adalora.GradientSketch(ranked, batches(), loss=loss)
    again.initialize()
    assert {name: len(values) for name, values in again.spectra.items()} == pattern
    for wrong in (1, 13):
        with pytest.raises(ConfigError, match=f"total_rank={wrong} must be from 2.* to 12"):
            sketch.rank_pattern(wrong)


class Told(Net):
    """Gives its own loss, as transformers' models do."""

    def forward(self, x, labels):
        out = super().forward(x)
        return SimpleNamespace(loss=(out[:, :3] - labels).square().mean())


def test_a_model_may_give_its_own_loss():
    given, own = model_of(), model_of(base=Told)
    adalora.GradientSketch(given, batches(), loss=loss).initialize()
    adalora.GradientSketch(own, ({"x": x, "labels": y} for x, y in batches())).initialize()
    for a, b in zip(given.parameters(), own.parameters()):
        assert torch.equal(a, b)


class Fixed(Net):
    """Its first layer runs without a gradient."""

    def forward(self, x):
        with torch.no_grad():
            x = self.up(x)
        return self.down(self.drop(torch.relu(x)))


def test_a_layer_that_runs_without_a_gradient_keeps_its_start():
    model, untouched = model_of(base=Fixed), model_of(base=Fixed)
    adalora.GradientSketch(model, batches(), loss=loss).initialize()
    changed = {
        name: not torch.equal(*(getattr(m.get_base_model(), name).lora_A["default"].weight for m in (model, untouched)))
        for name in SHAPES
    }
    assert changed == {"up": False, "down": True}


def test_equal_seeds_give_equal_starts():
    first, second = model_of(), model_of()
    for model in (first, second):
        adalora.GradientSketch(model, batches(), loss=loss, seed=3).initialize()
    for a, b in zip(first.parameters(), second.parameters()):
        assert torch.equal(a, b)


def test_a_trained_adapter_an_empty_stream_and_a_loss_of_nothing_are_refused():
    model = model_of()
    with pytest.raises(ConfigError, match="batches is empty"):
        adalora.GradientSketch(model, [], loss=loss)
    with pytest.raises(ConfigError, match="gives no loss by itself: pass loss="):
        adalora.GradientSketch(model, batches())
    with pytest.raises(ConfigError, match="is not finite"):
        adalora.GradientSketch(model, batches(), loss=lambda m, b: loss(m, b) * float("nan"))
    model.get_base_model().up.lora_B["default"].weight.data.fill_(1.0)
    with pytest.raises(AttachError, match="trained already"):
        adalora.GradientSketch(model, batches(), loss=loss)
    torch.manual_seed(0)
    embedding = get_peft_model(nn.Sequential(nn.Embedding(5, 4)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(AttachError, match="no linear layer"):
        adalora.GradientSketch(embedding, batches())
