"""One table of what can be adapted: {layer kind} x {type} x {eager, compiled} x {parametrization}.

Each combination trains a whole run with fine masks, and the live model has to be the plain LoRA that is saved.
"""

import contextlib
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import adalora

STEPS, RANK = 24, 4


class One(nn.Module):
    """The layer between two fixed ones, so that it gets gradients and has to learn something."""

    def __init__(self, layer, out, *, tokens=False):
        super().__init__()
        self.layer, self.out, self.tokens = layer, out, tokens

    def forward(self, x):
        return self.out(torch.tanh(self.layer(x)).flatten(1))


@dataclass
class Kind:
    """How to build a model around a layer, and its input."""

    make: Any
    shape: tuple
    flat: int
    tokens: bool = False
    extra: Any = None


def conv(cls, dims, **settings):
    return lambda: cls(3, 6, 3, **settings)


KINDS = {
    "Linear": Kind(lambda: nn.Linear(8, 6), (5, 8), 30),
    "Conv1D": Kind(lambda: Conv1D(6, 8), (5, 8), 30, extra={"fan_in_fan_out": True}),
    "Embedding": Kind(lambda: nn.Embedding(11, 6), (5,), 30, tokens=True),
    "Embedding_padding": Kind(lambda: nn.Embedding(11, 6, padding_idx=0), (5,), 30, tokens=True),
    "Conv1d": Kind(conv(nn.Conv1d, 1, padding=1), (3, 7), 42),
    "Conv1d_same": Kind(conv(nn.Conv1d, 1, padding="same"), (3, 7), 42),
    "Conv2d": Kind(conv(nn.Conv2d, 2, stride=2), (3, 7, 5), 36),
    "Conv2d_1x1": Kind(lambda: nn.Conv2d(3, 6, 1), (3, 3, 2), 36),
    "Conv2d_circular": Kind(conv(nn.Conv2d, 2, padding=1, padding_mode="circular"), (3, 4, 3), 72),
    "Conv3d": Kind(conv(nn.Conv3d, 3), (3, 4, 3, 3), 12),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# PEFT's default for a base in half precision: the adapter in float32.
MIXED = {"bfloat16_base": torch.bfloat16, "float16_base": torch.float16}
# Where PEFT itself cannot do it: its convolution for the adapter does not take the base's padding mode when merging.
NO_MERGE = {"Conv2d_circular"}


def build(kind, dtype):
    """A base model, always the same."""
    torch.manual_seed(2)
    return One(kind.make(), nn.Linear(kind.flat, 3), tokens=kind.tokens).to(dtype)


def data(kind, step, dtype):
    generator = torch.Generator().manual_seed(step)
    if kind.tokens:
        x = torch.randint(11, (8, *kind.shape), generator=generator)
        return x, nn.functional.one_hot(x[:, 0] % 3, 3).to(dtype)
    x = torch.randn(8, *kind.shape, generator=generator).to(dtype)
    return x, torch.stack([x.flatten(1)[:, k] for k in range(3)], dim=1)


def train(model, forward, kind, dtype, *, lr=5e-3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, eps=1e-5)
    for step in range(STEPS):
        x, y = data(kind, step, dtype)
        loss = (forward(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert bool(loss.isfinite())


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("parametrization", ["lora", "svd"])
@pytest.mark.parametrize("dtype", [*DTYPES, *MIXED])
@pytest.mark.parametrize("name", list(KINDS))
def test_every_kind_of_layer_in_every_type(name, dtype, parametrization, tmp_path):
    kind, torch_type, mixed = KINDS[name], {**DTYPES, **MIXED}[dtype], dtype in MIXED
    config = LoraConfig(r=RANK, lora_alpha=8, target_modules=["layer"], **(kind.extra or {}))
    model = get_peft_model(build(kind, torch_type), config, autocast_adapter_dtype=mixed)
    controller = adalora.attach(model, total_rank=2, total_steps=STEPS, parametrization=parametrization)
    train(model, model, kind, torch_type, lr=1e-2 if parametrization == "svd" else 5e-3)
    assert controller.live == controller.handles[0].rank == 2
    assert bool(controller.handles[0].left_or.any())
    assert controller.handles[0].P_parameter.dtype == (torch.float32 if mixed else torch_type)

    x, _ = data(kind, 99, torch_type)
    with torch.no_grad():
        expected = model(x)
        loose = {torch.bfloat16: 6e-2, torch.float16: 1e-2}.get(torch_type, 1e-5)
        close = {"atol": loose, "rtol": loose}
        model.save_pretrained(tmp_path)
        stock = PeftModel.from_pretrained(build(kind, torch_type), tmp_path, autocast_adapter_dtype=mixed)
        torch.testing.assert_close(stock(x), expected, **close)
        with model.disable_adapter():
            assert torch.equal(model(x), build(kind, torch_type)(x))
        assert float((build(kind, torch_type)(x) - expected).abs().max()) > 0.03
        if name not in NO_MERGE:
            model.merge_adapter()
            torch.testing.assert_close(model(x), expected, **close)
            model.unmerge_adapter()
        controller.finalize()
        torch.testing.assert_close(model(x), expected, **close)


@pytest.mark.parametrize("parametrization", ["lora", "svd"])
@pytest.mark.parametrize("dtype", [*DTYPES, *MIXED])
@pytest.mark.parametrize("name", list(KINDS))
def test_compiled_in_one_graph_without_recompilation(name, dtype, parametrization):
    """Forward and backward, `fullgraph`; masks change at each of many allocations and nothing is compiled again."""
    torch._dynamo.reset()
    kind, torch_type, mixed = KINDS[name], {**DTYPES, **MIXED}[dtype], dtype in MIXED
    config = LoraConfig(r=RANK, lora_alpha=8, target_modules=["layer"], **(kind.extra or {}))
    models = [get_peft_model(build(kind, torch_type), config, autocast_adapter_dtype=mixed) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    settings = {"total_rank": 2, "total_steps": STEPS, "parametrization": parametrization, "compact": False}
    controllers = [adalora.attach(m, allocation_interval=1, **settings) for m in models]
    compiled = torch.compile(models[1], fullgraph=True, backend="aot_eager")
    train(models[0], models[0], kind, torch_type)
    x, _ = data(kind, 0, torch_type)
    compiled(x).sum().backward()  # compiles
    models[1].zero_grad()
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(models[1], compiled, kind, torch_type)
    loose = {torch.bfloat16: 6e-2, torch.float16: 1e-2}.get(torch_type, 1e-3)
    close = {"atol": loose, "rtol": loose}
    assert controllers[0].ranks == controllers[1].ranks
    assert controllers[1].live == 2
    torch.testing.assert_close(compiled(x), models[1](x), **close)
    # Eager and compiled round in another order: in 16 bits two whole runs need not choose the same triplets.
    if torch_type in (torch.float32, torch.float64):
        torch.testing.assert_close(models[1](x), models[0](x), **close)


@contextlib.contextmanager
def quiet():
    """Quantisation packages warn about the machine they find themselves on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("parametrization", ["lora", "svd"])
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_bases(bits, parametrization, tmp_path):
    """Only the base is quantised: P, λ and Q train as ever."""
    with quiet():
        bnb = pytest.importorskip("bitsandbytes")
        torch.manual_seed(2)
        if bits == 4:
            layer = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32)
        else:
            layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
        base = One(layer, nn.Linear(32, 3))
        base.is_loaded_in_8bit, base.is_loaded_in_4bit = bits == 8, bits == 4
        base.to("cpu")
        model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=8, target_modules=["layer"]))
        assert type(model.base_model.model.layer).__name__ in ("Linear4bit", "Linear8bitLt")
        controller = adalora.attach(model, total_rank=2, total_steps=STEPS, parametrization=parametrization)
        train(model, model, Kind(None, (64,), 32), torch.float32)
        assert controller.live == controller.handles[0].rank == 2
        x, _ = data(Kind(None, (64,), 32), 99, torch.float32)
        expected = model(x).detach()
        state = {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}
        assert not any("lambda" in key for key in state)
        controller.finalize()
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("parametrization", ["lora", "svd"])
def test_torchao_bases(parametrization):
    with quiet():
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        torch.manual_seed(2)
        base = One(nn.Linear(64, 32), nn.Linear(32, 3))
        quantize_(base.layer, Int8WeightOnlyConfig())
        model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=8, target_modules=["layer"]))
        assert "Torchao" in type(model.base_model.model.layer).__name__
        controller = adalora.attach(model, total_rank=2, total_steps=STEPS, parametrization=parametrization)
        train(model, model, Kind(None, (64,), 32), torch.float32)
        assert controller.live == 2
        assert controller.history.last("allocation")["update_ratio"] is None
