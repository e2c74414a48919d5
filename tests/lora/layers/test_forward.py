"""The adaptive layer against PEFT's own LoRA forward: the same numbers, step after step, whatever surrounds it."""

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from adalora.lora.layers import forward as module_under_test
from adalora.lora.layers.forward import DROPPED, TripletVariant
from adalora.lora.layers.svd import add_lambda
from adalora.lora.layers.triplets import find_triplets
from helpers.compiling import in_one_graph


class Net(nn.Module):
    """Three Linears, one of them behind an in-place activation, one that reads what another reads."""

    def __init__(self, checkpointing=None, inplace=True):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.checkpointing, self.inplace = checkpointing, inplace

    def block(self, x):
        return nn.functional.gelu(self.second(x)) * self.third(x)

    def forward(self, x):
        x = nn.functional.relu(self.first(x), inplace=self.inplace)
        if self.checkpointing is not None:
            return self.head(checkpoint(self.block, x, use_reentrant=self.checkpointing))
        return self.head(self.block(x))


TARGETS = ["first", "second", "third"]


def pair(*, dtype=torch.float64, net=None, adapters=("default",), **options):
    """PEFT's model, and a copy of it with the fused forward on the first adapter."""
    options = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS, "init_lora_weights": False, **options}
    plain = get_peft_model((net or Net()).to(dtype), LoraConfig(**options), adapters[0])
    for name in adapters[1:]:
        plain.add_adapter(name, LoraConfig(**options))
    plain.base_model.set_adapter(list(adapters))
    fused = copy.deepcopy(plain)
    for h in find_triplets(fused, adapters[0]):
        h.layer.lora_variant[adapters[0]] = TripletVariant()
    return plain, fused


def train(model, *, steps=3, dtype=torch.float64, around=nullcontext, input_grad=False):
    """Losses and parameters after every step."""
    torch.manual_seed(7)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    seen = []
    for _ in range(steps):
        x = torch.randn(4, 5, 6, dtype=dtype, requires_grad=input_grad)
        with around():
            loss = model(x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(
            [
                loss.detach(),
                *([x.grad] if input_grad else []),
                *[p.detach().clone() for p in optimizer.param_groups[0]["params"]],
            ]
        )
    return seen


def assert_same(plain, fused, *, rtol=1e-9, atol=1e-11, **options):
    for expected, actual in zip(train(plain, **options), train(fused, **options)):
        for a, b in zip(actual, expected):
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.fixture
def fused_calls(monkeypatch):
    """Arguments of every call of the fused function: a fast path that is never taken proves nothing."""
    calls = []
    original = module_under_test.fused_lora

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(module_under_test, "fused_lora", spy)
    return calls


class Counted(torch.Tensor):
    """A tensor of a class of its own, as quantisers and others bring: its operations are its own affair."""

    products = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.products += func is torch.nn.functional.linear
        return super().__torch_function__(func, types, args, kwargs or {})


def test_factors_of_another_class_go_through_the_modules(fused_calls):
    plain, fused = pair()
    for h in find_triplets(fused, "default"):
        weight = h.layer.lora_B["default"].weight
        h.layer.lora_B["default"].weight = torch.nn.Parameter(weight.detach().as_subclass(Counted))
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(fused(x).as_subclass(torch.Tensor), plain(x), rtol=1e-12, atol=0)
    assert fused_calls == []
    assert Counted.products >= len(list(find_triplets(fused, "default")))  # the class goes on to what follows


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("input_grad", [True, False])
def test_training_is_peft_s(fused_calls, dropout, input_grad):
    assert_same(*pair(lora_dropout=dropout), input_grad=input_grad)
    assert len(fused_calls) == 9
    assert all(c["weight_oi"] is not None and c["in_place"] for c in fused_calls)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(fused_calls, reentrant):
    assert_same(*pair(net=Net(checkpointing=reentrant), lora_dropout=0.3), input_grad=True)
    assert len(fused_calls) > 9


def test_trained_bias_keeps_the_base_layer_in_the_graph(fused_calls):
    assert_same(*pair(bias="all"))
    assert all(c["weight_oi"] is None for c in fused_calls)


def test_several_active_adapters(fused_calls):
    assert_same(*pair(adapters=("default", "other")))
    assert all(c["weight_oi"] is not None for c in fused_calls)


def test_second_of_several_adapters_adds_to_the_first(fused_calls):
    plain, fused = pair(adapters=("other", "default"))
    for h in find_triplets(fused, "default"):
        h.layer.lora_variant.pop("other")
        h.layer.lora_variant["default"] = TripletVariant()
    assert_same(plain, fused)
    assert all(c["weight_oi"] is None and not c["in_place"] for c in fused_calls)


def test_both_adapters_adaptive():
    plain, fused = pair(adapters=("default", "other"))
    for h in find_triplets(fused, "other"):
        h.layer.lora_variant["other"] = TripletVariant()
    assert_same(plain, fused)


def test_autocast(fused_calls):
    around = lambda: torch.autocast("cpu", dtype=torch.bfloat16)  # noqa: E731
    assert_same(*pair(dtype=torch.float32), dtype=torch.float32, around=around, rtol=2e-2, atol=2e-3)
    assert len(fused_calls) == 9
    plain, fused = pair(dtype=torch.float32)
    x = torch.randn(4, 5, 6)
    with around():
        assert fused(x).dtype == plain(x).dtype == torch.bfloat16


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_half_precision(fused_calls, adapter):
    plain, fused = pair(dtype=torch.bfloat16)
    for model in (plain, fused):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(adapter)
    x = torch.randn(4, 5, 6, dtype=torch.bfloat16)
    assert fused(x).dtype == plain(x).dtype == torch.bfloat16
    assert_same(plain, fused, dtype=torch.bfloat16, rtol=3e-2, atol=1e-2)
    assert len(fused_calls) == 12


class Quantised(nn.Module):
    """A base layer as bitsandbytes' and GPTQ's: whole numbers and a scale, no float weight."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        step = linear.weight.detach().abs().max() / 127
        self.register_buffer("weight", (linear.weight.detach() / step).round().to(torch.int8))
        self.step, self.bias = step, linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.step, self.bias)


def test_quantised_base(fused_calls):
    plain, fused = pair()
    for model in (plain, fused):
        for h in find_triplets(model, "default"):
            h.layer.base_layer = Quantised(h.layer.base_layer)
    assert_same(plain, fused, input_grad=True)
    assert len(fused_calls) == 9
    assert all(c["weight_oi"] is None and not c["in_place"] for c in fused_calls)


def test_hooks_on_the_base_layer_see_and_keep_its_own_output(fused_calls):
    plain, fused = pair()
    kept = {}
    for name, model in (("plain", plain), ("fused", fused)):
        layer = find_triplets(model, "default")[1].layer
        layer.base_layer.register_forward_hook(lambda m, i, out, name=name: kept.update({name: out}))
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    plain(x), fused(x)
    torch.testing.assert_close(kept["fused"], kept["plain"])
    assert [c["in_place"] for c in fused_calls] == [True, False, True]


def test_hooks_on_the_adapter_s_own_layers_run():
    plain, fused = pair()
    for model in (plain, fused):
        find_triplets(model, "default")[0].layer.lora_A["default"].register_forward_hook(lambda m, i, out: out * 3)
    assert_same(plain, fused)


def test_a_replaced_forward_of_the_base_layer_is_respected(fused_calls):
    plain, fused = pair()
    for model in (plain, fused):
        base = find_triplets(model, "default")[0].layer.base_layer
        base.forward = lambda x, base=base: nn.functional.linear(x * 2, base.weight, base.bias)
    assert_same(plain, fused, input_grad=True)
    assert [c["weight_oi"] is None for c in fused_calls[:3]] == [True, False, False]


def test_no_grad_and_inference_mode():
    plain, fused = pair(lora_dropout=0.5)
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(fused.eval()(x), plain.eval()(x))


def test_second_order_through_the_model():
    plain, fused = pair(net=Net(inplace=False))
    results = []
    for model in (plain, fused):
        weights = [p for p in model.parameters() if p.requires_grad]
        x = torch.randn(4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad(model(x).square().sum(), weights, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), weights))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_functional_transforms():
    plain, fused = pair(net=Net(inplace=False))
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    results = []
    for model in (plain, fused):
        weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        loss = lambda w, x, model=model: torch.func.functional_call(model, w, (x,)).square().mean()  # noqa: E731
        results.append(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x))
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_as_one_graph(dropout):
    plain, fused = pair(lora_dropout=dropout)
    if dropout:
        plain.eval(), fused.eval()
    compiled = torch.compile(in_one_graph(fused), fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    results = []
    for model, run in ((plain, plain), (fused, compiled)):
        weights = [p for p in model.parameters() if p.requires_grad]
        results.append(torch.autograd.grad(run(x).square().mean(), weights))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_accumulated_gradients():
    plain, fused = pair()
    for model in (plain, fused):
        torch.manual_seed(3)
        for _ in range(3):
            model(torch.randn(4, 5, 6, dtype=torch.float64)).square().mean().backward()
    for a, b in zip(fused.parameters(), plain.parameters()):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)
            assert a.grad.is_contiguous()


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning",
    "ignore::DeprecationWarning",
    "ignore:.torch.jit.trace:FutureWarning",  # from torch 2.14 on
)
def test_can_be_traced():
    _, fused = pair(net=Net(inplace=False))
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.trace(fused, (x,))(x), fused(x))


@pytest.mark.parametrize("hooked", [False, True])
def test_triplets_left_out_get_no_gradient_and_add_nothing(fused_calls, hooked):
    plain, fused = pair()
    live = torch.tensor([True, False, True])
    for h in find_triplets(plain, "default"):
        h.layer.lora_A["default"].register_forward_hook(lambda m, i, out: out * live)
    for h in find_triplets(fused, "default"):
        setattr(h.layer, DROPPED, {"default": live})
        if hooked:  # the modules are called one by one
            h.layer.lora_B["default"].register_forward_hook(lambda m, i, out: out)
    assert_same(plain, fused)
    assert bool(fused_calls) is not hooked


def svd_pair(**options):
    """Two models with a λ of their own: one called module by module, one fused."""
    models = pair(**options)
    for model in models:
        for number, h in enumerate(find_triplets(model, "default")):
            add_lambda(h, torch.tensor([0.5, -1.0, 0.0]) + number, gain=1.5)
    for h in find_triplets(models[0], "default"):
        h.layer.lora_A["default"].register_forward_hook(lambda m, i, out: out)
    return models


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("input_grad", [True, False])
def test_a_lambda_of_its_own(fused_calls, dropout, input_grad):
    assert_same(*svd_pair(lora_dropout=dropout), input_grad=input_grad)
    assert len(fused_calls) == 9
    assert all(c["lambda_r"] is not None and c["weight_oi"] is not None for c in fused_calls)


def test_a_lambda_of_its_own_is_written_out(fused_calls):
    plain, fused = svd_pair()
    layer = find_triplets(fused, "default")[1].layer
    x = torch.randn(2, 8, dtype=torch.float64)
    left = layer.lora_B["default"].weight * layer.lora_lambda["default"]
    expected = layer.base_layer(x) + 5 / 3 * 1.5 * x @ layer.lora_A["default"].weight.T @ left.T
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(find_triplets(plain, "default")[1].layer(x), expected)
    assert len(fused_calls) == 1


def test_a_lambda_of_its_own_in_autocast_and_half_precision(fused_calls):
    around = lambda: torch.autocast("cpu", dtype=torch.bfloat16)  # noqa: E731
    assert_same(*svd_pair(dtype=torch.float32), dtype=torch.float32, around=around, rtol=2e-2, atol=4e-3)
    assert_same(*svd_pair(dtype=torch.bfloat16), dtype=torch.bfloat16, rtol=3e-2, atol=1e-2)
    assert len(fused_calls) == 18


def test_a_lambda_of_another_type_goes_through_the_modules(fused_calls):
    """One that was cast by itself, narrower than P and Q."""
    models = svd_pair()
    for model in models:
        for h in find_triplets(model, "default"):
            h.lambda_parameter.data = h.lambda_parameter.data.float()
    assert_same(*models)
    assert fused_calls == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_lambda_of_its_own_with_gradient_checkpointing(fused_calls, reentrant):
    assert_same(*svd_pair(net=Net(checkpointing=reentrant), lora_dropout=0.3), input_grad=True)
    assert len(fused_calls) > 9


def test_a_lambda_of_its_own_with_triplets_left_out(fused_calls):
    models = svd_pair()
    for model in models:
        for h in find_triplets(model, "default"):
            setattr(h.layer, DROPPED, {"default": torch.tensor([True, False, True])})
    assert_same(*models)
    assert len(fused_calls) == 9
