"""What pruning takes away is kept exactly, and goes through checkpoints."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

import adalora
from adalora.export.pruned import read_pruned

STEPS = 40


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.out = nn.Linear(6, 5)

    def forward(self, ids):
        return self.out(torch.tanh(self.conv(self.words(ids).transpose(1, 2))).mean(2))


def lora():
    """An adapter that is trained already."""
    torch.manual_seed(0)
    model = get_peft_model(Network(), LoraConfig(r=6, target_modules=["words", "conv", "out"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def deltas(model):
    return {
        name: module.get_delta_weight("default").detach().double().flatten(1)
        for name, module in model.base_model.model.named_modules()
        if getattr(module, "lora_A", None) or getattr(module, "lora_embedding_A", None)
    }


def train(model, *, steps=STEPS, lr=0.0, seed=0):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(torch.randint(0, 11, (8, 4), generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"compact_at": (0.3, 0.6)},
        {"revival": False},
        {"compact": False},
        {"parametrization": "svd", "initialization": "keep", "scale": "initial", "revival": False},
        {"handover": False, "total_rank": 1, "revival": False},
    ],
    ids=str,
)
def test_what_stays_and_what_went_are_the_whole(tmp_path, settings):
    """Nothing moves at learning rate 0: the final adapter and the pruned triplets add up to what there was.

    A triplet that returns does so from zero, so those of before are not in the sum: none does here.
    """
    model = lora()
    file = tmp_path / "run" / "pruned.safetensors"
    budget = {} if "total_rank" in settings else {"target_rank": 2}
    controller = adalora.attach(
        model, total_steps=STEPS, orthogonality="off", pruned=file, warmup=4, **budget, **settings
    )
    before = deltas(model)
    train(model)
    controller.finalize()
    pruned, after = read_pruned(file), deltas(model)
    record = controller.history.last("pruned")
    assert sum(r["revived"] for r in controller.history.of("allocation")) == 0
    assert record["triplets"] == 18 - controller.live == sum(pruned.adapter.ranks.values())
    assert pruned.adapter.factors
    for name, whole in before.items():
        total = torch.zeros_like(whole)
        if name in after:
            total += after[name]
        if name in pruned.adapter.factors:
            delta = pruned.adapter.factors[name].delta().double()
            total += delta.T if name == "words" else delta
        assert torch.allclose(total, whole, atol=1e-5), name
    assert not list(file.parent.glob("*.part"))


def test_a_layer_that_was_removed_at_a_stage_has_nothing_more_to_keep(tmp_path):
    """All of one layer goes at the first allocation, and leaves the model at the first stage."""
    model = lora()
    file = tmp_path / "pruned.safetensors"
    controller = adalora.attach(
        model, target_rank=2, total_steps=STEPS, max_rank={"conv": 0}, compact_at=(0.3,), pruned=file
    )
    train(model)
    controller.finalize()
    (conv,) = [h for h in controller.handles if h.name == "conv"]
    assert conv.removed
    assert read_pruned(file).adapter.ranks["conv"] == 6


def test_plain_attach_keeps_nothing(tmp_path):
    model = lora()
    controller = adalora.attach(model, total_steps=STEPS, target_rank=2)
    train(model, lr=1e-2)
    controller.finalize()
    assert controller.history.of("pruned") == []


@pytest.mark.parametrize("moment", [8, 14, 30])
def test_a_resumed_run_keeps_the_same(tmp_path, moment):
    """Bit for bit: the file of a run that went on from a checkpoint is that of one left alone."""

    def start(name):
        model = lora()
        settings = {"target_rank": 2, "warmup": 4, "compact_at": (0.5,)}
        return model, adalora.attach(model, total_steps=STEPS, pruned=tmp_path / name, **settings)

    model, controller = start("whole")
    train(model, steps=moment, lr=0.1)
    state = copy.deepcopy(controller.state_dict())
    train(model, steps=STEPS - moment, lr=0.1, seed=1)
    controller.finalize()
    again, resumed = start("resumed")
    resumed.load_state_dict(state)
    train(again, steps=STEPS - moment, lr=0.1, seed=1)
    resumed.finalize()
    one, other = (load_file(tmp_path / name) for name in ("whole", "resumed"))
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert controller.history.last("pruned")["triplets"] == 12


def test_a_checkpoint_that_kept_nothing_says_so(tmp_path):
    model = lora()
    controller = adalora.attach(model, total_steps=STEPS, target_rank=2)
    train(model, steps=20, lr=0.1)
    again = lora()
    resumed = adalora.attach(again, total_steps=STEPS, target_rank=2, pruned=tmp_path / "pruned")
    with pytest.warns(adalora.AdaLoraWarning, match="did not keep what it pruned"):
        resumed.load_state_dict(copy.deepcopy(controller.state_dict()))
    train(again, steps=20, lr=0.1)
    resumed.finalize()
    assert not (tmp_path / "pruned").exists()
