"""Whole training steps on a device without values: whatever the host would wait for on CUDA is counted or an error.

On CUDA itself: `test_cuda.py`.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import adalora
from benchmarks.operations import DeviceWaits


class Net(nn.Module):
    """Linears of two shapes over an embedding; one of them is left out in every other step."""

    def __init__(self, blocks=2):
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.up = nn.ModuleList(nn.Linear(8, 12) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(12, 8) for _ in range(blocks))

    def forward(self, words, *, every=True):
        x = self.words(words)
        for number, (up, down) in enumerate(zip(self.up, self.down)):
            if every or number:
                x = x + down(torch.tanh(up(x)))
        return x


def adamw(model, **settings):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **settings)


def step(model, optimizer, *, device, every=True):
    model(torch.zeros(4, 5, dtype=torch.long, device=device), every=every).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def on_meta(phase, *, targets=r".*(words|up\.\d+|down\.\d+)", dropout=0.0, **options):
    """A model that has trained on the CPU up to a phase and lies on `meta` since."""
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, lora_dropout=dropout)
    model = get_peft_model(Net(), config)
    # No allocation lies in the next steps.
    controller = adalora.attach(model, target_rank=2, total_steps=40, allocation_interval=10, **options)
    optimizer = adamw(model)
    while controller.phase != phase or controller.schedule.allocates(controller.step):
        step(model, optimizer, device="cpu")
    controller._scorer.reset()  # they lie on the CPU
    model.to("meta")
    if controller._nested is not None:  # so does what the coming step leaves out
        controller._nested.draw(controller.step)
    return model, controller


OPTIONS = {
    "default": {},
    "dropout": {"dropout": 0.1},
    "svd": {"parametrization": "svd"},
    "svd_dropout": {"parametrization": "svd", "dropout": 0.1},
    "coupled": {"parametrization": "svd", "orthogonality": "released"},
    "before": {"score_weights": "before"},
    "no_revival": {"revival": False},
    "masked_to_the_end": {"compact": False},
    "no_handover": {"handover": False},
    "nested": {"nested": True, "targets": r".*(up|down)\.\d+"},
}


@pytest.mark.parametrize("phase", ["warmup", "decrease", "final"])
@pytest.mark.parametrize("name", OPTIONS)
def test_no_ordinary_step_waits_for_the_device(name, phase):
    """The first one, which makes the averages, and one in which a layer has got no gradient."""
    model, controller = on_meta(phase, **OPTIONS[name])
    optimizer = adamw(model)
    for every in (True, False):
        assert controller.phase == phase
        assert not controller.schedule.allocates(controller.step)
        with DeviceWaits() as counter:
            step(model, optimizer, device="meta", every=every)
        assert not counter.waits


@pytest.mark.parametrize("name", ["default", "svd"])
def test_a_learning_rate_on_the_device_stays_there(name):
    """Where an optimizer is captured in a CUDA graph."""
    model, controller = on_meta("decrease", **OPTIONS[name])
    optimizer = adamw(model)
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-2, device="meta")
    with DeviceWaits() as counter, torch.no_grad():
        controller._observation.after(optimizer, observe=False)
    assert not counter.waits


@pytest.mark.parametrize("name", ["default", "svd"])
def test_a_learning_rate_that_is_a_tensor_moves_as_much(name):
    results = []
    for lr in (1e-2, torch.tensor(1e-2)):
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=r".*(up|down)\.\d+", init_lora_weights=False)
        model = get_peft_model(Net(), config)
        adalora.attach(model, target_rank=2, total_steps=20, orthogonality_weight=0.5, **OPTIONS[name])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, foreach=False)
        for _ in range(20):
            step(model, optimizer, device="cpu")
        results.append({key: value for key, value in model.state_dict().items() if "lora" in key})
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-4, atol=1e-5)


def test_what_makes_the_host_wait_is_counted():
    device = torch.zeros(3, device="meta")
    with DeviceWaits() as counter:
        torch.zeros(3).to("meta")
        torch.zeros(3).to("meta", non_blocking=True)
        device.copy_(torch.zeros(3))
        device.copy_(torch.zeros(3), non_blocking=True)
        device.copy_(torch.zeros(3, device="meta"))
        torch._foreach_copy_([device], [torch.zeros(3)])
        torch.zeros(3).to(torch.float64).sum().item()
        with pytest.raises(NotImplementedError):
            device.cpu()
    assert counter.waits == {"cpu to meta": 3}
