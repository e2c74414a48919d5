"""Diagnostics on real small trainings: each condition is provoked, and does not show in a healthy run."""

import copy
import functools
import re
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import adalora
from adalora.report.diagnostics import diagnose, diagnose_seeds
from adalora.report.history import History
from adalora.report.thresholds import CODES, DiagnosticThresholds

LAYERS, WIDTH, STEPS = 8, 32, 150
EVEN = (2,) * LAYERS


class Network(nn.Module):
    """Residual layers; one more that the forward pass does not use."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for layer in self.layers:
            x = x + 0.5 * torch.tanh(layer(x))
        return x


class Parallel(Network):
    """Every layer has its own task, so that where the rank belongs does not depend on the seed."""

    def forward(self, x):
        return torch.stack([layer(x) for layer in self.layers])


def teacher_of(network, ranks, size):
    """The same network with an update of the given rank in each layer: what the adapter has to learn."""
    teacher, random = copy.deepcopy(network), torch.Generator().manual_seed(5)
    for layer, rank in zip(teacher.layers, ranks):
        left = torch.randn(WIDTH, rank, generator=random)
        right = torch.randn(rank, WIDTH, generator=random)
        layer.weight.data += size * 3 / WIDTH / max(rank, 1) ** 0.5 * left @ right
    return teacher


@functools.cache
def train(
    *,
    seed=0,
    learning_rate=1e-2,
    ranks=EVEN,
    size=1.0,
    noise=0.0,
    unused=False,
    live=False,
    network=Network,
    **settings,
):
    torch.manual_seed(0)
    student = network()
    teacher = teacher_of(student, ranks, size)
    torch.manual_seed(1 + seed)
    targets = [f"layers.{i}" for i in range(LAYERS)] + (["unused"] if unused else [])
    model = get_peft_model(student, LoraConfig(r=6, lora_alpha=6, target_modules=targets))
    history = History()
    thresholds = None if live else DiagnosticThresholds(ignore=CODES)
    settings = {"target_rank": 3, **settings}
    controller = adalora.attach(model, total_steps=STEPS, history=history, thresholds=thresholds, **settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for _ in range(STEPS):
        x = torch.randn(32, WIDTH)
        wanted = teacher(x)
        loss = (model(x) - wanted - noise * torch.randn_like(wanted)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        controller.log(loss=loss.item())
    controller.finalize()
    return history


PROVOKED = {
    "unstable-scores": {
        "noise": 3.0,
        "learning_rate": 0.1,
        "target_rank": 2,
        "sensitivity_beta": 0.01,
        "uncertainty_beta": 0.01,
    },
    "budget-too-low": {"ranks": (6,) * LAYERS, "size": 2.0, "target_rank": 0.5},
    "ranks-unbalanced": {"ranks": (0, 0, 0, 0, 0, 6, 0, 0), "size": 2.0, "target_rank": 0.75},
    "orthogonality-not-reached": {
        "orthogonality": "off",
        "handover": False,
        "ranks": (1,) * LAYERS,
        "learning_rate": 2e-2,
    },
    "slow-start": {"learning_rate": 1e-7},
    "final-phase-too-short": {"final": 0.04},
    "no-gradient": {"unused": True},
}


DEFAULTS = DiagnosticThresholds()


def codes(history):
    return [f["code"] for f in diagnose(history, DEFAULTS)]


@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_training_raises_nothing(seed):
    assert codes(train(seed=seed)) == []


@pytest.mark.parametrize("code", PROVOKED)
def test_provoked(code):
    assert code in codes(train(**PROVOKED[code]))


def test_the_unused_module_is_named():
    found = {f["code"]: f["message"] for f in diagnose(train(**PROVOKED["no-gradient"]), DEFAULTS)}
    assert "1 of 9 modules never got a gradient" in found["no-gradient"]
    assert found["no-gradient"].endswith(": unused")


def test_a_budget_that_suffices_for_the_hard_task():
    assert "budget-too-low" not in codes(train(ranks=(6,) * LAYERS, size=2.0, target_rank=5))


def test_without_a_hand_over_the_first_allocation_tells():
    history = train(learning_rate=1e-7, handover=False)
    assert history.of("allocation")[0]["update_ratio"] < 1e-4
    assert "slow-start" in codes(history)
    assert "slow-start" not in codes(train(handover=False))


def test_while_it_trains():
    with pytest.warns(adalora.AdaLoraWarning, match=r"final-phase-too-short: the final phase is 6 of 150 steps"):
        history = train(final=0.04, live=True)
    assert [r["code"] for r in history.of("diagnostic")] == ["final-phase-too-short"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(live=True).of("diagnostic") == []


def test_the_triplets_that_come_back_are_named():
    """The record of each allocation says which ones it revived; their counts are the message's."""
    history = train(**PROVOKED["unstable-scores"])
    (found,) = [f for f in diagnose(history, DEFAULTS) if f["code"] == "unstable-scores"]
    name, number, times = re.search(r"most often: (\S+?)\[(\d+)\] \((\d+) times\)", found["message"]).groups()
    module = [m["name"] for m in history.last("start")["modules"]].index(name)
    until = [r for r in history.of("allocation") if r["step"] <= found["step"]]
    assert sum([module, int(number)] in r["revived_triplets"] for r in until) == int(times) >= 2
    assert all(len(r["revived_triplets"]) == r["revived"] for r in history.of("allocation"))


def test_limits_are_kept_with_the_run():
    """What was silenced while it trained stays silent in a later report."""
    history = train(unused=True)  # everything ignored
    assert history.last("thresholds")["ignore"] == list(CODES)
    assert diagnose(history) == []
    assert "no-gradient" in codes(history)


def test_ranks_between_seeds():
    task = {"ranks": (0, 6, 0, 6, 0, 6, 0, 6), "network": Parallel, "target_rank": 2, "noise": 0.1}
    assert diagnose_seeds([train(seed=seed, **task) for seed in range(3)]) == []
    noisy = {**task, "ranks": (0,) * LAYERS, "noise": 3.0, "learning_rate": 0.1}
    found = diagnose_seeds([train(seed=seed, **noisy) for seed in range(3)])
    assert [f["code"] for f in found] == ["ranks-differ-between-seeds"]
