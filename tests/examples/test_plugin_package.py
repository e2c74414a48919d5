"""examples/plugin-package: its score and schedule are found by entry point and decide a run."""

import tomllib
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import adalora
from adalora import errors, plugins
from helpers.docs_blocks import blocks, run

FOLDER = Path(__file__).parents[2] / "examples" / "plugin-package"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The package as an installer leaves it: its code on the path, and its metadata, made from its pyproject.toml."""
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
    info = tmp_path / f"adalora_extras-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, functions in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {function}" for name, function in functions.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(FOLDER / "src")


def trained(**settings):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "2"]))
    controller = adalora.attach(model, target_rank=2, total_steps=50, **settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    inputs, goal = torch.randn(16, 8), torch.randn(16, 6)
    for _ in range(50):
        nn.functional.mse_loss(model(inputs), goal).backward()
        optimizer.step()
        optimizer.zero_grad()
    controller.finalize()
    return controller


@pytest.mark.usefixtures("installed")
def test_both_are_found_and_used():
    from adalora_extras import cosine, lower_bound

    assert plugins.names("importance") == ["lower-bound"]
    controller = trained(importance="lower-bound", schedule="cosine", sensitivity_beta=0.8)
    assert controller.live == 4
    schedule = controller.schedule
    length = schedule.decrease_end - schedule.warmup_steps
    budgets = [schedule.budget(schedule.warmup_steps + k) for k in range(length + 1)]
    assert budgets == [4 + int(4 * cosine(k / length) + 1e-9) for k in range(length + 1)]
    assert budgets != [trained().schedule.budget(schedule.warmup_steps + k) for k in range(length + 1)]

    average = adalora.core.importance.SmoothedImportance(torch.tensor([3.0, 2.0]), torch.tensor([2.0, 0.5]))
    assert average.score(lower_bound).tolist() == [1.0, 1.5]
    scores = [trained(importance=name).history.last("allocation")["scores"] for name in ("lower-bound", "ratio")]
    assert scores[0] != scores[1]


@pytest.mark.usefixtures("installed")
def test_the_settings_survive_the_way_to_a_file():
    config = adalora.AdaLoraConfig(importance="lower-bound", schedule="cosine")
    assert adalora.AdaLoraConfig(**config.to_dict()) == config


@pytest.mark.usefixtures("installed")
def test_a_message_names_what_is_registered():
    with pytest.raises(errors.ConfigError, match="'random' or 'lower-bound'"):
        adalora.AdaLoraConfig(importance="upper-bound")


def test_without_the_package_the_names_are_unknown():
    with pytest.raises(errors.ConfigError, match="schedule='cosine'"):
        adalora.AdaLoraConfig(schedule="cosine")


@pytest.mark.usefixtures("installed")
def test_the_block_of_its_readme():
    base = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    names = {"adalora": adalora, "model": get_peft_model(base, LoraConfig(r=12, target_modules=["0", "2"]))}
    (block,) = (text for _, language, text in blocks("examples/plugin-package/README.md") if language == "python")
    run(block, names, where="README.md")
    (controller,) = adalora.controllers(names["model"]).values()
    assert controller.config.importance == "lower-bound"
    assert controller.config.schedule == "cosine"
