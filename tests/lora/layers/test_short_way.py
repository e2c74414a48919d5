"""The short way through PEFT's Linear: the numbers of PEFT's forward, which is taken wherever more is asked for."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import adalora
from adalora.lora.layers import forward as module_under_test
from adalora.lora.layers.forward import AdaptiveLinear, shorten


class Net(nn.Module):
    """Two Linears."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def pair(*, dtype=torch.float64, **options):
    """PEFT's model and an attached one, with the same weights."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["first", "second"], init_lora_weights=False)
    plain = get_peft_model(Net().to(dtype), config)
    attached = copy.deepcopy(plain)
    adalora.attach(attached, target_rank=2, total_steps=10, **options)
    return plain, attached


@pytest.fixture
def stock_calls(monkeypatch):
    """How often PEFT's own forward was taken by a short-cut layer."""
    calls = []
    original = module_under_test._STOCK_FORWARD

    def counted(self, *args, **kwargs):
        if type(self) is AdaptiveLinear:
            calls.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Linear, "forward", counted)
    monkeypatch.setattr(module_under_test, "_STOCK_FORWARD", counted)
    return calls


def inputs(dtype=torch.float64):
    return torch.randn(5, 6, dtype=dtype, generator=torch.Generator().manual_seed(3))


def same(plain, attached, x, **options):
    torch.testing.assert_close(attached(x, **options), plain(x, **options), rtol=1e-9, atol=1e-11)


def test_ordinary_calls_take_it(stock_calls):
    plain, attached = pair()
    assert type(attached.base_model.model.first) is AdaptiveLinear
    same(plain, attached, inputs())
    assert not stock_calls


def test_it_is_a_linear_of_peft_s_to_everyone_else():
    _, attached = pair()
    layer = attached.base_model.model.first
    assert isinstance(layer, Linear)
    assert repr(layer).startswith("lora.Linear(")


def test_copies_and_pickles_keep_it(stock_calls):
    plain, attached = pair()
    same(plain, copy.deepcopy(attached), inputs())
    same(plain, pickle.loads(pickle.dumps(attached.base_model.model)), inputs())
    assert not stock_calls


def test_merged_and_disabled_adapters(stock_calls):
    plain, attached = pair()
    for model in (plain, attached):
        model.merge_adapter()
    same(plain, attached, inputs())
    assert len(stock_calls) == 2
    for model in (plain, attached):
        model.unmerge_adapter()
    with plain.disable_adapter(), attached.disable_adapter():
        same(plain, attached, inputs())
    assert len(stock_calls) == 4
    same(plain, attached, inputs())
    assert len(stock_calls) == 4


def test_adapters_by_row_of_the_batch(stock_calls):
    plain, attached = pair()
    for model in (plain, attached):
        model.eval()
    names = ["default", "__base__", "default", "default", "__base__"]
    same(plain, attached, inputs(), adapter_names=names)
    assert len(stock_calls) == 2


def test_an_input_that_peft_casts(stock_calls):
    layers = [model.base_model.model.first for model in pair(dtype=torch.bfloat16)]
    x = inputs(torch.bfloat16)
    assert layers[0].lora_A["default"].weight.dtype == torch.float32
    torch.testing.assert_close(layers[1](x), layers[0](x), rtol=1e-2, atol=1e-2)
    assert layers[1](x).dtype == torch.bfloat16
    assert len(stock_calls) == 2


def test_several_adapters_and_an_adapter_that_is_not_ours(stock_calls):
    plain, attached = pair()
    for model in (plain, attached):
        torch.manual_seed(5)
        config = LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
        model.add_adapter("other", config)
        model.set_adapter("other")
    same(plain, attached, inputs())
    assert len(stock_calls) == 2
    for model in (plain, attached):
        model.base_model.set_adapter(["default", "other"])
    same(plain, attached, inputs())
    assert len(stock_calls) == 4


@pytest.mark.parametrize("everywhere", [False, True], ids=["own hook", "hook on all modules"])
def test_hooks_on_the_base_layer_run(everywhere):
    plain, attached = pair()
    base, seen = attached.base_model.model.first.base_layer, []

    def hook(module, args, out):
        if module is base:
            seen.append(module)

    removing = register_module_forward_hook(hook) if everywhere else base.register_forward_hook(hook)
    try:
        same(plain, attached, inputs())
    finally:
        removing.remove()
    assert seen == [base]
    same(plain, attached, inputs())
    assert seen == [base]


def test_another_s_forward_stays(monkeypatch):
    layer = pair()[0].base_model.model.first
    monkeypatch.setattr(Linear, "forward", lambda self, x: x)
    shorten(layer)
    assert type(layer) is Linear


def test_a_layer_that_has_left_the_adapter_goes_peft_s_way(stock_calls):
    plain, attached = pair()
    layer = attached.base_model.model.first
    del layer.lora_variant["default"]
    same(plain, attached, inputs())
    assert stock_calls == [layer]


@pytest.mark.parametrize("parametrization", ["lora", "svd"])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_autocast_casts_once_for_both_parts(stock_calls, given, parametrization):
    """Weights in fp32, inputs as LayerNorm (fp32) or a product (bf16) leaves them."""
    models = pair(dtype=torch.float32, parametrization=parametrization)
    layers = [model.base_model.model.first for model in models]
    results = []
    for layer in layers:
        x = inputs(given).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(x)
        out.float().square().sum().backward()
        results.append((out, x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad))
    (out, *grads), (own, *own_grads) = results
    assert own.dtype == out.dtype
    torch.testing.assert_close(own, out, rtol=2e-2, atol=2e-2)
    assert [g.dtype for g in own_grads] == [g.dtype for g in grads]
    if parametrization == "lora":  # else P stands for another factor
        for grad, own_grad in zip(grads, own_grads, strict=True):
            torch.testing.assert_close(own_grad, grad, rtol=3e-2, atol=3e-2 * float(grad.abs().max()))
    assert not stock_calls


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_autocast_trains_the_base_layer_where_that_is_asked_for(stock_calls, trained):
    models = pair(dtype=torch.float32)
    grads = []
    for model in models:
        layer = model.base_model.model.first
        parameter = getattr(layer.base_layer, trained).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(inputs(torch.float32))
        out.float().square().sum().backward()
        grads.append(parameter.grad)
    assert grads[1].dtype == torch.float32
    torch.testing.assert_close(grads[1], grads[0], rtol=3e-2, atol=3e-2 * float(grads[0].abs().max()))
    assert not stock_calls
