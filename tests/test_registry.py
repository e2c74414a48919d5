"""`attach` and what a process keeps of it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import adalora
from adalora.errors import AttachError, ConfigError


def lora(**settings):
    """A LoRA model of one layer."""
    return get_peft_model(nn.Sequential(nn.Linear(6, 6)), LoraConfig(r=4, target_modules=["0"], **settings))


def test_config_or_keywords():
    """Both at once would leave open which holds; either alone gives the same run."""
    with pytest.raises(ConfigError, match=r"not both.*target_rank"):
        adalora.attach(lora(), adalora.AdaLoraConfig(), target_rank=2, total_steps=10)
    by_config = adalora.attach(model := lora(), adalora.AdaLoraConfig(target_rank=2), total_steps=10)
    by_keyword = adalora.attach(other := lora(), target_rank=2, total_steps=10)
    assert by_config.config == by_keyword.config
    assert adalora.controllers(model) == {"default": by_config}
    assert adalora.controllers(other) == {"default": by_keyword}


def test_history_by_path_and_by_object(tmp_path):
    """A path is written to; an object is used as it is."""
    adalora.attach(lora(), target_rank=2, total_steps=10, history=str(tmp_path / "run" / "history.jsonl"))
    assert adalora.History.read(tmp_path / "run").last("start")["total_steps"] == 10
    history = adalora.History()
    assert adalora.attach(lora(), target_rank=2, total_steps=10, history=history).history is history


@pytest.mark.parametrize(
    ("make", "adapter", "message"),
    [
        (lambda: nn.Linear(3, 3), None, r"Linear has no LoRA layer.*get_peft_model"),
        (lora, "other", r"no LoRA layer carries an adapter named 'other'; the model has 'default'"),
        (lambda: lora(use_dora=True), None, r"DoraLinearVariant is not plain LoRA"),
        (lambda: lora(lora_bias=True), None, r"lora_bias=True is not supported"),
    ],
)
def test_models_that_do_not_fit_are_refused(make, adapter, message):
    """The message names what is there and what to do."""
    model = make()
    with pytest.raises(AttachError, match=message):
        adalora.attach(model, adapter=adapter, target_rank=2, total_steps=10)
    assert adalora.controllers(model) == {}


def test_a_merged_adapter_is_refused():
    """Its factors are in the base weight already."""
    model = lora()
    model.merge_adapter()
    with pytest.raises(AttachError, match=r"unmerge_adapter\(\)"):
        adalora.attach(model, target_rank=2, total_steps=10)
    model.unmerge_adapter()
    adalora.attach(model, target_rank=2, total_steps=10)


def test_controllers_of_several_models_run_side_by_side():
    """One hook serves them all, each at its own step."""
    models = [lora(), lora()]
    controllers = [adalora.attach(m, target_rank=1, total_steps=10) for m in models]
    for model, steps in zip(models, (3, 10), strict=True):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(steps):
            model(torch.randn(4, 6)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [c.step for c in controllers] == [3, 10]
    assert [c.live for c in controllers] == [2, 1]


def test_a_rehearsal_is_no_step():
    """torch steps an untouched optimizer once, at a learning rate of 0, to see what state it will have."""
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=10)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # wraps `step`
    assert get_optimizer_state_dict(model, optimizer)["state"]
    assert controller.step == 0
    for _ in range(2):
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
        scheduler.step()
    assert controller.step == 2
    get_optimizer_state_dict(model, optimizer)
    assert controller.step == 2
