"""A learning rate of its own for the new head."""

import pytest
import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from adalora.errors import RecipeError
from adalora.tasks.runs.head import MARK, check_rate, mark_whole, set_rate, whole_parameters

from ..tiny import make_recipe, run

RATE, HEAD_RATE = 1e-3, 2e-2


def recipe_of(tmp_path, tiny_model, data_file, **changes):
    training = {"max_steps": 8, "batch_size": 8, "learning_rate": RATE, **changes}
    data = {"files": str(data_file)}
    return make_recipe(tmp_path, tiny_model, task="classification", data=data, training=training)


def rates_by_name(trainer):
    """Peak learning rate of every trained parameter."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    return {
        names[id(p)]: group["initial_lr"]
        for group in trainer.optimizer.param_groups
        for p in group["params"]
        if id(p) in names
    }


def test_the_new_head_has_it_and_the_adapter_does_not(tiny_model, data_file, tmp_path):
    result = run(recipe_of(tmp_path, tiny_model, data_file, head_learning_rate=HEAD_RATE))
    rates = rates_by_name(result.trainer)
    head = {name for name in rates if "modules_to_save" in name}
    assert {rates[name] for name in head} == {HEAD_RATE}
    assert {rates[name] for name in rates.keys() - head} == {RATE}
    assert len(head) == 2
    # The controller reads the adapter's rate off the first group.
    assert result.trainer.optimizer.param_groups[0]["initial_lr"] == RATE
    assert result.metrics["final_rank_total"] == result.metrics["target_rank_total"]


def test_by_default_there_is_one_rate(tiny_model, data_file, tmp_path):
    result = run(recipe_of(tmp_path, tiny_model, data_file))
    assert set(rates_by_name(result.trainer).values()) == {RATE}


def test_the_first_update_is_of_that_size(tiny_model, data_file, tmp_path):
    """Adam's first step is the learning rate, whatever the gradient."""
    changes = {"max_steps": 1, "lr_schedule": "constant", "lr_warmup": 0, "head_learning_rate": HEAD_RATE}
    torch.manual_seed(0)
    result = run(recipe_of(tmp_path, tiny_model, data_file, **changes))
    head = next(m for m in result.trainer.model.modules() if isinstance(m, ModulesToSaveWrapper))
    trained, original = head.modules_to_save["default"], head.original_module
    step = (trained.weight - original.weight).abs()
    torch.testing.assert_close(step.median(), torch.tensor(HEAD_RATE), rtol=1e-3, atol=0)


def test_a_model_without_a_head_is_refused():
    model = nn.Linear(2, 2)
    assert whole_parameters(model) == []
    assert check_rate(None, model) is None
    with pytest.raises(
        RecipeError, match=r"head_learning_rate=0.02: .* leave it out: --set training.head_learning_rate"
    ):
        check_rate(HEAD_RATE, model)


def test_groups_split_and_whole_groups_only_change_their_rate():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 1))
    mark_whole(model, ["1"])
    assert getattr(model[1], MARK)
    model[1].bias.requires_grad_(False)
    assert [id(p) for p in whole_parameters(model)] == [id(model[1].weight)]
    groups = [
        {"params": [model[0].weight, model[1].weight], "weight_decay": 0.1},
        {"params": [model[1].bias], "weight_decay": 0.0},
        {"params": [model[2].weight]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    set_rate(optimizer, list(model[1].parameters()), HEAD_RATE)
    found = [(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found[:2] == [(1, RATE, 0.1), (1, HEAD_RATE, 0.0)]
    assert found[3:] == [(1, HEAD_RATE, 0.1)]
    assert optimizer.param_groups[2]["lr"] == RATE
