"""One table of what can be adapted: {layer kind} x {type} x {eager, compiled} x {parametrization} x {score}.

Each combination trains a whole run with fine masks, and the live model has to be the plain LoRA that is saved.
"""

import contextlib
import copy
import warnings
from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import adalora
from adalora import config as config_module
from adalora.lora.layers import forward as forward_module
from helpers.compiling import in_one_graph

STEPS, RANK = 24, 4
SHORT = {"warmup": 1, "final": 2, "allocation_interval": 1}  # of 8 steps
SCORES = get_args(config_module.Importance)
# Roundings between input and output of an adapted layer: base, Qx, ·s·λ, P·, the sum; then tanh and the last layer.
ROUNDINGS = 8


class One(nn.Module):
    """The layer between two fixed ones, so that it gets gradients and has to learn something."""

    def __init__(self, layer, out, *, tokens=False):
        super().__init__()
        self.layer, self.out, self.tokens = layer, out, tokens
        self.bend = torch.tanh

    def forward(self, x):
        return self.out(self.bend(self.layer(x)).flatten(1))


@dataclass
class Kind:
    """How to build a model around a layer, and its input."""

    make: Any
    shape: tuple
    flat: int
    tokens: bool = False
    extra: Any = None
    r: int = RANK


def conv(cls, dims, **settings):
    return lambda: cls(3, 6, 3, **settings)


KINDS = {
    "Linear": Kind(lambda: nn.Linear(8, 6), (5, 8), 30),
    "Conv1D": Kind(lambda: Conv1D(6, 8), (5, 8), 30, extra={"fan_in_fan_out": True}),
    "Embedding": Kind(lambda: nn.Embedding(11, 6), (5,), 30, tokens=True),
    "Embedding_padding": Kind(lambda: nn.Embedding(11, 6, padding_idx=0), (5,), 30, tokens=True),
    "Conv1d": Kind(conv(nn.Conv1d, 1, padding=1), (3, 7), 42),
    "Conv1d_reflect": Kind(conv(nn.Conv1d, 1, padding=1, padding_mode="reflect"), (3, 7), 42),
    "Conv1d_same": Kind(conv(nn.Conv1d, 1, padding="same"), (3, 7), 42),
    "Conv2d": Kind(conv(nn.Conv2d, 2, stride=2), (3, 7, 5), 36),
    "Conv2d_1x1": Kind(lambda: nn.Conv2d(3, 6, 1), (3, 3, 2), 36),
    "Conv2d_circular": Kind(conv(nn.Conv2d, 2, padding=1, padding_mode="circular"), (3, 4, 3), 72),
    "Conv3d": Kind(conv(nn.Conv3d, 3), (3, 4, 3, 3), 12),
    "Conv3d_replicate": Kind(conv(nn.Conv3d, 3, padding=1, padding_mode="replicate"), (3, 2, 2, 2), 48),
    "Conv1d_groups": Kind(lambda: nn.Conv1d(4, 6, 3, groups=2), (4, 7), 30, r=2 * RANK),
    "Conv1d_depthwise": Kind(lambda: nn.Conv1d(4, 4, 3, groups=4), (4, 7), 20, r=4 * RANK),
    "Conv2d_groups": Kind(lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), (4, 7, 5), 36, r=2 * RANK),
    "Conv3d_groups": Kind(lambda: nn.Conv3d(4, 6, 2, groups=2), (4, 3, 2, 2), 12, r=2 * RANK),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# PEFT's default for a base in half precision: the adapter in float32.
MIXED = {"bfloat16_base": torch.bfloat16, "float16_base": torch.float16}
# Where PEFT itself cannot do it: its convolution for the adapter does not take the base's padding mode when merging.
NO_MERGE = {"Conv1d_reflect", "Conv2d_circular", "Conv3d_replicate"}
# Nor does it merge grouped convolutions.
GROUPED = {"Conv1d_groups", "Conv1d_depthwise", "Conv2d_groups", "Conv3d_groups"}


def build(kind, dtype):
    """A base model, always the same."""
    torch.manual_seed(2)
    return One(kind.make(), nn.Linear(kind.flat, 3), tokens=kind.tokens).to(dtype)


def adapted(kind, dtype, *, mixed):
    """The base model with a LoRA of `RANK` triplets on the layer."""
    config = LoraConfig(r=kind.r, lora_alpha=2 * kind.r, target_modules=["layer"], **(kind.extra or {}))
    with quiet():  # PEFT says of grouped convolutions that it does not merge them
        return get_peft_model(build(kind, dtype), config, autocast_adapter_dtype=mixed)


def data(kind, step, dtype):
    generator = torch.Generator().manual_seed(step)
    if kind.tokens:
        x = torch.randint(11, (8, *kind.shape), generator=generator)
        return x, nn.functional.one_hot(x[:, 0] % 3, 3).to(dtype)
    x = torch.randn(8, *kind.shape, generator=generator).to(dtype)
    return x, torch.stack([x.flatten(1)[:, k] for k in range(3)], dim=1)


def identity(x):
    return x


@torch.no_grad()
def assert_exact_to_rounding(model, x, dtype):
    """The output differs from that of exact arithmetic by no more than each of its operations' own rounding.

    Exact is float64 with the same weights. What an operation may round is its sum of absolute values: the same model
    with absolute weights and inputs, and no tanh to make it smaller.
    """
    exact = copy.deepcopy(model).double()
    absolute = copy.deepcopy(exact)
    for parameter in absolute.parameters():
        parameter.abs_()
    absolute.base_model.model.bend = identity
    wide = x if not x.is_floating_point() else x.double()
    size = absolute(wide.abs())
    unit = torch.finfo(dtype).eps / 2
    error = (model(x).double() - exact(wide)).abs()
    assert bool((error <= ROUNDINGS * unit * size).all()), float((error / (unit * size)).max())


def train(model, forward, kind, dtype, *, lr=5e-3, steps=STEPS):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, eps=1e-5)
    for step in range(steps):
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
    model = adapted(kind, torch_type, mixed=mixed)
    controller = adalora.attach(model, total_rank=2, total_steps=STEPS, parametrization=parametrization)
    train(model, model, kind, torch_type, lr=1e-2 if parametrization == "svd" else 5e-3)
    assert controller.live == controller.handles[0].rank == 2
    assert bool(controller.handles[0].left_or.any())
    assert controller.handles[0].P_parameter.dtype == (torch.float32 if mixed else torch_type)

    x, _ = data(kind, 99, torch_type)
    assert_exact_to_rounding(model, x, torch_type)
    with torch.no_grad():
        expected = model(x)
        # What is saved or merged holds P·Λ, or W + ΔW, rounded once more to the type.
        loose = {torch.bfloat16: 6e-2, torch.float16: 1e-2}.get(torch_type, 1e-5)
        close = {"atol": loose, "rtol": loose}
        model.save_pretrained(tmp_path)
        with quiet():
            stock = PeftModel.from_pretrained(build(kind, torch_type), tmp_path, autocast_adapter_dtype=mixed)
        torch.testing.assert_close(stock(x), expected, **close)
        with model.disable_adapter():
            assert torch.equal(model(x), build(kind, torch_type)(x))
        assert float((build(kind, torch_type)(x) - expected).abs().max()) > 0.015
        if name in GROUPED:
            with pytest.raises(NotImplementedError, match="groups > 1"):
                model.merge_adapter()
        elif name not in NO_MERGE:
            model.merge_adapter()
            torch.testing.assert_close(model(x), expected, **close)
            model.unmerge_adapter()
        controller.finalize()
        torch.testing.assert_close(model(x), expected, **close)


def scores_for(parametrization):
    """Every score that a parametrization has."""
    return [score for score in SCORES if parametrization == "svd" or score != "lambda_magnitude"]


@pytest.mark.parametrize("parametrization", ["lora", "svd"])
@pytest.mark.parametrize("dtype", [*DTYPES, *MIXED])
@pytest.mark.parametrize("name", list(KINDS))
def test_every_score_of_every_kind_of_layer_in_every_type(name, dtype, parametrization):
    kind, torch_type, mixed = KINDS[name], {**DTYPES, **MIXED}[dtype], dtype in MIXED
    for score in scores_for(parametrization):
        model = adapted(kind, torch_type, mixed=mixed)
        settings = {"parametrization": parametrization, "importance": score, "compact": False, **SHORT}
        controller = adalora.attach(model, total_rank=2, total_steps=8, **settings)
        train(model, model, kind, torch_type, steps=5)
        values = controller._scorer.scores()
        assert values.dtype == torch.float32
        assert bool(values.isfinite().all() and (values >= 0).all() and (values > 0).any()), score
        train(model, model, kind, torch_type, steps=3)
        assert controller.live == 2
        assert [len(record["ranks"]) for record in controller.history.of("allocation")] == [1] * 5


# Scores are made outside of what is compiled: all of them in the other types only on demand, `-m slow`.
ALL_SCORES = [pytest.param(d, marks=[] if d == "float32" else pytest.mark.slow) for d in (*DTYPES, *MIXED)]


@pytest.mark.parametrize("parametrization", ["lora", "svd"])
@pytest.mark.parametrize("dtype", [*DTYPES, *MIXED])
@pytest.mark.parametrize("name", list(KINDS))
def test_compiled_in_one_graph_without_recompilation(name, dtype, parametrization, monkeypatch):
    """Forward and backward, `fullgraph`; masks change at each of many allocations and nothing is compiled again."""
    torch._dynamo.reset()
    settings = {"parametrization": parametrization, "allocation_interval": 1}
    assert_compiled_is_eager(name, dtype, settings, steps=STEPS, monkeypatch=monkeypatch)


@pytest.mark.parametrize("parametrization", ["lora", "svd"])
@pytest.mark.parametrize("dtype", ALL_SCORES)
@pytest.mark.parametrize("name", list(KINDS))
def test_compiled_with_every_score(name, dtype, parametrization, monkeypatch):
    torch._dynamo.reset()
    for score in scores_for(parametrization)[1:]:
        settings = {"parametrization": parametrization, "importance": score, **SHORT}
        assert_compiled_is_eager(name, dtype, settings, steps=8, monkeypatch=monkeypatch)


def assert_compiled_is_eager(name, dtype, settings, *, steps, monkeypatch):
    """Two runs are the same bit by bit, in every type, where the eager one calls the modules one by one.

    What fusing them by hand does to the rounding, which compiled code does not, `assert_exact_to_rounding` bounds.
    """
    monkeypatch.setattr(forward_module, "_fusable", lambda *_, **__: False)
    kind, torch_type, mixed = KINDS[name], {**DTYPES, **MIXED}[dtype], dtype in MIXED
    models = [adapted(kind, torch_type, mixed=mixed) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    controllers = [adalora.attach(m, total_rank=2, total_steps=steps, compact=False, **settings) for m in models]
    train(models[0], models[0], kind, torch_type, steps=steps)
    compiled = torch.compile(in_one_graph(models[1]), fullgraph=True, backend="aot_eager")
    x, _ = data(kind, 0, torch_type)
    compiled(x).sum().backward()  # compiles
    models[1].zero_grad()
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(models[1], compiled, kind, torch_type, steps=steps)
    masks = [c.handles[0].mask.tolist() for c in controllers]
    assert masks[0] == masks[1]
    assert sum(masks[1]) == 2
    for (at, mine), (_, theirs) in zip(models[1].named_parameters(), models[0].named_parameters()):
        assert torch.equal(mine, theirs), at
    assert torch.equal(compiled(x), models[0](x))


@contextlib.contextmanager
def quiet():
    """Quantisation packages warn about the machine they find themselves on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def quantized(base):
    """A LoRA model on a quantised layer: "bitsandbytes4", "bitsandbytes8" or "torchao"; skips where it is missing."""
    torch.manual_seed(2)
    if base == "torchao":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        module = One(nn.Linear(64, 32), nn.Linear(32, 3))
        quantize_(module.layer, Int8WeightOnlyConfig())
    else:
        bnb = pytest.importorskip("bitsandbytes")
        if base == "bitsandbytes4":
            layer = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32)
        else:
            layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
        module = One(layer, nn.Linear(32, 3))
        module.is_loaded_in_8bit, module.is_loaded_in_4bit = base == "bitsandbytes8", base == "bitsandbytes4"
        module.to("cpu")
    return get_peft_model(module, LoraConfig(r=RANK, lora_alpha=8, target_modules=["layer"]))


@pytest.mark.parametrize("parametrization", ["lora", "svd"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_bases(bits, score, parametrization):
    """Only the base is quantised: P, λ and Q train as ever."""
    if score not in scores_for(parametrization):
        pytest.skip("this score needs a λ of its own")
    with quiet():
        model = quantized(f"bitsandbytes{bits}")
        assert type(model.base_model.model.layer).__name__ in ("Linear4bit", "Linear8bitLt")
        settings = {"parametrization": parametrization, "importance": score}
        controller = adalora.attach(model, total_rank=2, total_steps=STEPS, **settings)
        train(model, model, Kind(None, (64,), 32), torch.float32)
        assert controller.live == controller.handles[0].rank == 2
        x, _ = data(Kind(None, (64,), 32), 99, torch.float32)
        expected = model(x).detach()
        state = {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}
        assert not any("lambda" in key for key in state)
        controller.finalize()
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("parametrization", ["lora", "svd"])
@pytest.mark.parametrize("score", SCORES)
def test_torchao_bases(score, parametrization):
    if score not in scores_for(parametrization):
        pytest.skip("this score needs a λ of its own")
    with quiet():
        model = quantized("torchao")
        assert "Torchao" in type(model.base_model.model.layer).__name__
        settings = {"parametrization": parametrization, "importance": score}
        controller = adalora.attach(model, total_rank=2, total_steps=STEPS, **settings)
        train(model, model, Kind(None, (64,), 32), torch.float32)
        assert controller.live == 2
        assert controller.history.last("allocation")["update_ratio"] is None


@pytest.mark.parametrize("parametrization", ["lora", "svd"])
@pytest.mark.parametrize("base", ["bitsandbytes4", "bitsandbytes8", "torchao"])
def test_quantized_bases_compiled(base, parametrization):
    """Masks change at every allocation, nothing is compiled again, and the numbers are the eager ones."""
    torch._dynamo.reset()
    kind = Kind(None, (64,), 32)
    with quiet():
        models = [quantized(base) for _ in range(2)]
        settings = {"parametrization": parametrization, "compact": False, **SHORT}
        controllers = [adalora.attach(m, total_rank=2, total_steps=8, **settings) for m in models]
        train(models[0], models[0], kind, torch.float32, steps=8)
        # The packages' own operations may break the graph: that is theirs, and no reason to compile again.
        compiled = torch.compile(models[1], backend="aot_eager")
        x, _ = data(kind, 0, torch.float32)
        models[1](x)  # bitsandbytes arranges an 8-bit weight at its first use
        compiled(x).sum().backward()
        models[1].zero_grad()
        with torch._dynamo.config.patch(error_on_recompile=True):
            train(models[1], compiled, kind, torch.float32, steps=8)
        assert controllers[0].handles[0].mask.tolist() == controllers[1].handles[0].mask.tolist()
        assert controllers[1].live == 2
        torch.testing.assert_close(compiled(x), models[0](x), atol=1e-4, rtol=1e-4)
