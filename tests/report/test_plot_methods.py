"""Figures and frames straight from a controller."""

import pytest
import torch
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from torch import nn

import adalora
from adalora.report.frames import FRAMES
from adalora.report.plot_methods import HistoryPlots

METHODS = [name for name in vars(HistoryPlots) if name.startswith("plot_")]


@pytest.fixture(scope="module")
def controllers():
    """One in the middle of its training, one at its end."""
    made = []
    for steps in (15, 30):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        model = get_peft_model(network, LoraConfig(r=4, target_modules=["0", "2"]))
        controller = adalora.attach(model, target_rank=2, total_steps=30)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(steps):
            loss = (model(torch.randn(16, 8)) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            controller.log(loss=loss.item())
        made.append((model, controller))
    made[1][1].finalize()
    return [controller for _, controller in made], made


@pytest.mark.parametrize("name", METHODS)
def test_every_figure_at_any_time(controllers, name):
    for controller in controllers[0]:
        figure = getattr(controller, name)()
        assert isinstance(figure, Figure)
        assert any(ax.has_data() for ax in figure.axes) or name == "plot_singular_values"


def test_the_picture_shows_the_ranks(controllers):
    _, controller = controllers[0]
    figure = controller.plot_ranks()
    assert figure.axes[0].get_title(loc="left") == f"Rank of every module, {controller.live} in all"


def test_frames(controllers):
    _, controller = controllers[0]
    assert controller.history.to_frame("ranks").iloc[-1].to_dict() == controller.ranks
    assert controller.history.to_frame()["loss"].notna().sum() == 30
    for name in FRAMES:
        controller.history.to_frame(name)
    with pytest.raises(adalora.AdaLoraError, match="no frame 'rank'; there are steps, allocations"):
        controller.history.to_frame("rank")
