"""What PEFT's LoRA has beside plain layers: which of it is refused, and what its convolutions do."""

import copy
import warnings

import pytest
import torch
from peft import (
    ArrowConfig,
    BdLoraConfig,
    KasaConfig,
    LoraConfig,
    MontecloraConfig,
    PeftModel,
    VeloraConfig,
    get_peft_model,
)
from peft.tuners.lora import layer as peft_layers
from torch import nn

import adalora
from adalora.errors import AttachError

LAYERS = {
    "Linear": nn.Linear(8, 8),
    "Embedding": nn.Embedding(9, 8),
    "Conv1d": nn.Conv1d(8, 8, 3),
    "Conv2d": nn.Conv2d(8, 8, 3),
    "Conv3d": nn.Conv3d(8, 8, 3),
}


def arrow():
    config = ArrowConfig()
    config.task_adapter_names = ["default"]  # else PEFT's own `create_arrow_model` sets it
    return config


OPTIONS = {
    "use_dora": lambda: {"use_dora": True},
    "alora_invocation_tokens": lambda: {"alora_invocation_tokens": [1]},
    "arrow_config": lambda: {"arrow_config": arrow()},
    "use_bdlora": lambda: {"use_bdlora": BdLoraConfig(target_modules_bd_a=["layer"], nblocks=2)},
    "velora_config": lambda: {"velora_config": VeloraConfig()},
    "monteclora_config": lambda: {"monteclora_config": MontecloraConfig()},
    "mica": lambda: {"init_lora_weights": "mica"},
    "kasa_config": lambda: {"kasa_config": KasaConfig()},
}
REGISTERED = [
    (kind, option)
    for kind in LAYERS
    for options in getattr(peft_layers, kind).lora_variants.fget(None)
    for option in options
]


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = copy.deepcopy(layer)

    def forward(self, x):
        return self.layer(x)


def lora(layer, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's about groups, MiCA's and aLoRA's about what they need
        return get_peft_model(Net(layer), LoraConfig(**{"r": 4, "target_modules": ["layer"], **settings}))


def test_pefts_registry_is_read():
    assert ("Linear", "kasa_config") in REGISTERED
    assert ("Conv3d", "use_dora") in REGISTERED
    assert {option for _, option in REGISTERED} == set(OPTIONS)


@pytest.mark.parametrize(("kind", "option"), REGISTERED)
def test_every_variant_is_refused(kind, option):
    model = lora(LAYERS[kind], **OPTIONS[option]())
    variant = type(model.base_model.model.layer.lora_variant["default"]).__name__
    with pytest.raises(AttachError, match=f"layer: {variant} is not plain LoRA"):
        adalora.attach(model, target_rank=1, total_steps=10)
    adalora.attach(lora(LAYERS[kind]), target_rank=1, total_steps=10)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("cls", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_what_peft_does_with_grouped_convolutions(cls, groups, tmp_path):
    """It trains, saves and loads them; it has no ΔW of them, so that nothing merges; r is a multiple of the groups."""
    layer = cls(4, 8, 3, groups=groups)
    model = lora(layer, init_lora_weights=False)
    wrapped = model.base_model.model.layer
    assert wrapped.lora_A["default"].weight.shape[:2] == (4, 4)  # not grouped: every triplet sees all inputs
    assert wrapped.lora_B["default"].weight.shape[:2] == (8, 4 // groups)  # and reaches one group's outputs
    x = torch.randn(2, 4, *([5] * (wrapped._kernel_dim - 2)))
    model(x).sum().backward()
    assert wrapped.lora_A["default"].weight.grad is not None
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = PeftModel.from_pretrained(Net(layer), tmp_path)
    torch.testing.assert_close(again(x), model(x))
    with pytest.raises(NotImplementedError, match="groups > 1"):
        model.merge_adapter()
    with pytest.raises(RuntimeError):
        wrapped.get_delta_weight("default")
    with pytest.raises(ValueError, match="rank is divisible by groups"):
        lora(layer, r=3)


@pytest.mark.parametrize("parametrization", ["lora", "svd"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("cls", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_padding_modes_are_pefts(cls, mode, parametrization):
    """The adapter pads with zeros in any mode, so that merging is exact with zeros alone."""
    torch.manual_seed(3)
    dims = [nn.Conv1d, nn.Conv2d, nn.Conv3d].index(cls) + 1
    layer = cls(3, 5, 3, padding=1, padding_mode=mode)
    model = lora(layer, init_lora_weights=False, lora_alpha=8)
    controller = adalora.attach(model, target_rank=2, total_steps=10, parametrization=parametrization)
    h = controller.handles[0]
    x = torch.randn(2, 3, *([7] * dims))
    delta = (h.scale * h.left_or @ h.Q_ri).view(layer.weight.shape)
    convolve = [nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d][dims - 1]
    with torch.no_grad():
        expected = layer(x) + convolve(x, delta, padding=1)
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
        model.merge_adapter()
        error = float((model(x) - expected).abs().max())
    assert (error < 1e-4) is (mode == "zeros")


def test_dilation_is_not_pefts():
    model = lora(nn.Conv1d(3, 5, 3, dilation=2))
    with pytest.raises(RuntimeError, match="must match the size"):
        model(torch.randn(2, 3, 9))
    model = lora(nn.Conv1d(3, 5, 3, dilation=2, padding="same"), init_lora_weights=False)
    x = torch.randn(2, 3, 9)
    with torch.no_grad():
        before = model(x)
        model.merge_adapter()
        assert float((model(x) - before).abs().max()) > 0.1
