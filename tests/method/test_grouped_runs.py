"""Whole runs with grouped convolutions: interrupted, reloaded, compacted, reported."""

import re
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import adalora
from adalora.errors import CheckpointError
from helpers.resuming import adamw, assert_equal, outcome, resumed

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
    pytest.mark.filterwarnings("ignore::adalora.errors.AdaLoraWarning"),  # of a small model, of its update's size
]
STEPS = 30  # warm-up ends with step 4, allocations follow from step 7 on, compaction comes with step 16
BOTH = pytest.mark.parametrize("parametrization", ["lora", "svd"])


class Net(nn.Module):
    """A grouped and a depthwise convolution, with dropout from LoRA, and a head."""

    def __init__(self):
        super().__init__()
        self.mix, self.deep = nn.Conv1d(6, 8, 3, groups=2), nn.Conv2d(8, 8, (1, 2), groups=8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = torch.tanh(self.mix(x)).unflatten(2, (1, -1))
        return self.head(torch.tanh(self.deep(h)).mean(dim=(2, 3)))


def lora(seed=1):
    torch.manual_seed(seed)
    config = LoraConfig(r=16, lora_alpha=16, lora_dropout=0.1, target_modules=["mix", "deep", "head"])
    return get_peft_model(Net(), config)


def attach(model, **settings):
    given = {"target_rank": 6, "total_steps": STEPS, "allocation_interval": 3, "min_rank": {"mix": 2, "deep": 8}}
    return adalora.attach(model, **{**given, **settings})


def begin(**settings):
    model = lora()
    return model, attach(model, **settings)


def train(model, optimizer, steps):
    for step in steps:
        torch.manual_seed(1000 + step)
        x = torch.randn(16, 6, 6)
        (model(x) - x[:, :3].mean(dim=2)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module", params=["lora", "svd"])
def whole(request):
    """A run that nothing interrupts."""
    torch.set_num_threads(1)  # as in every test, but this comes before: other threads round otherwise
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lora()
        controller = attach(model, parametrization=request.param)
        train(model, adamw(model), range(STEPS))
        controller.finalize()
    return request.param, outcome(model, controller)


@pytest.mark.parametrize("optimizer_first", [False, True])
@pytest.mark.parametrize("moment", [2, 10, 17])
def test_resumed_to_the_bit(whole, tmp_path, moment, optimizer_first):
    parametrization, wanted = whole
    found = resumed(
        lambda: begin(parametrization=parametrization), train, steps=STEPS, moment=moment,
        optimizer_first=optimizer_first, file=tmp_path / "state",
    )  # fmt: skip
    assert_equal(found, wanted)


def test_a_state_of_other_groups_is_refused():
    model = lora()
    controller = attach(model)
    state = controller.state_dict()
    state["tensors"]["mix.Q"] = state["tensors"]["mix.Q"][:8]
    with pytest.raises(CheckpointError, match=r"'mix.Q' has shape \[8, 6, 3\], \[16, 6, 3\] fits this model"):
        controller.load_state_dict(state)


@BOTH
def test_saved_at_any_moment_it_is_plain_lora(tmp_path, parametrization):
    """Also half way, where columns are masked; loaded weights bring their ranks, one way and the other."""
    model = lora()
    controller, optimizer = attach(model, parametrization=parametrization), adamw(model)
    x, states = torch.randn(4, 6, 6), {}
    for moment in (3, 11, 20):
        train(model, optimizer, range(controller.step, moment))
        model.eval().save_pretrained(tmp_path / str(moment))
        expected = model(x).detach()
        states[moment] = {k: v.clone() for k, v in model.state_dict().items()}, expected
        torch.manual_seed(1)
        stock = PeftModel.from_pretrained(Net(), str(tmp_path / str(moment))).eval()
        torch.testing.assert_close(stock(x), expected)
        model.train()
    assert [h.rank for h in controller.handles] != [8, 2, 16]
    for h in controller.handles:
        B, A = h.layer.lora_B["default"], h.layer.lora_A["default"]
        assert h.layer.r["default"] == h.lora_rank(h.rank) == A.weight.shape[0]
        if h.groups > 1:
            assert (A.out_channels, B.in_channels, B.groups) == (h.lora_rank(h.rank), h.lora_rank(h.rank), h.groups)
    for weights, expected in states.values():
        model.load_state_dict(weights)
        torch.testing.assert_close(model.eval()(x), expected)


@BOTH
def test_masks_hold_every_group_at_zero(parametrization):
    model = lora()
    controller = attach(model, parametrization=parametrization, compact=False)
    train(model, adamw(model), range(STEPS))
    for h in controller.handles:
        by_triplet = h.by_group(h.left_or).any(dim=(0, 1))
        assert torch.equal(by_triplet, h.mask)
    assert controller.live == 10 < sum(h.rank for h in controller.handles)


def test_the_report_shows_them(tmp_path):
    model = lora()
    controller = attach(model, history=str(tmp_path / "history.jsonl"))
    train(model, adamw(model), range(STEPS))
    controller.finalize()
    adalora.report([tmp_path / "history.jsonl"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert re.search(r"8 × 18, 2 groups", page)
    assert re.search(r"8 × 16, 8 groups", page)
    frame = controller.history.to_frame("modules")
    sizes = {h.name: sum(p.numel() for p, _ in h.factors.values()) for h in controller.handles}
    assert dict(zip(frame["module"], frame["parameters"])) == sizes
    finish = controller.history.last("finish")
    assert [len(v) for v in finish["singular_values"]][:2] == [2 * controller.ranks["mix"], 8]
