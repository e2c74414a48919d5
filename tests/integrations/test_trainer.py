"""The Hugging Face Trainer with `AdaLoraCallback`."""

import copy

import pytest
import torch
from bert_runs import MAX_STEPS, arguments
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback

import adalora
from helpers.tiny_bert import Tokens, bert

# PEFT still asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SAVE_STEPS = 8


class Watch(TrainerCallback):
    """Notes the logits of the live model whenever a checkpoint was written."""

    def __init__(self, inputs):
        self.inputs = inputs
        self.logits = {}
        self.steps = []

    def on_step_end(self, args, state, control, **kwargs):
        (controller,) = adalora.controllers(kwargs["model"]).values()
        self.steps.append((state.global_step, controller.step))

    def on_save(self, args, state, control, **kwargs):
        model = kwargs["model"]
        training = model.training
        model.eval()
        with torch.no_grad():
            self.logits[state.global_step] = model(input_ids=self.inputs).logits
        model.train(training)


@pytest.fixture
def base():
    """A tiny random BERT."""
    return bert()


def trainer_for(base, folder, *callbacks, **settings):
    """A Trainer with two micro-batches per optimizer step."""
    model = get_peft_model(
        base,
        LoraConfig(r=6, lora_alpha=12, task_type="SEQ_CLS", target_modules=r".*encoder.*\.(query|key|value|dense)"),
    )
    return Trainer(
        model=model,
        args=arguments(folder, **{"save_steps": SAVE_STEPS, "logging_steps": 4, **settings}),
        train_dataset=Tokens(64),
        eval_dataset=Tokens(16),
        callbacks=list(callbacks),
    )


def test_a_run(base, tmp_path):
    """Steps, target, checkpoints and history of one ordinary run."""
    pristine = copy.deepcopy(base)
    callback = adalora.AdaLoraCallback(target_rank=2, allocation_interval=2, history=tmp_path / "history.jsonl")
    watch = Watch(Tokens(8).inputs)
    trainer = trainer_for(base, tmp_path / "out", callback, watch, eval_strategy="steps", eval_steps=12)
    trainer.train()

    controller = callback.controller
    assert controller is adalora.controllers(trainer.model)["default"]
    assert controller.finished
    assert controller.schedule.total_steps == MAX_STEPS
    assert controller.step == MAX_STEPS
    assert watch.steps == [(n, n) for n in range(1, MAX_STEPS + 1)]
    assert controller.live == controller.target_budget == 2 * len(controller.handles)
    assert sum(h.rank for h in controller.handles) == controller.target_budget
    assert controller.allocations > 2

    assert sorted(watch.logits) == [8, 16, 24]
    assert controller.schedule.decrease_end < 16
    for step, logits in watch.logits.items():
        loaded = PeftModel.from_pretrained(copy.deepcopy(pristine), tmp_path / "out" / f"checkpoint-{step}").eval()
        with torch.no_grad():
            difference = loaded(input_ids=watch.inputs).logits - logits
        assert difference.abs().max() <= 1e-5

    history = adalora.History.read(tmp_path / "history.jsonl")
    losses = [r for r in history.of("step") if "loss" in r]
    assert [r["step"] for r in losses] == [3, 7, 11, 15, 19, 23]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [r["loss"] for r in losses] == logged
    assert [r["step"] for r in history.of("metric")] == [11, 23]
    assert all(r["values"]["loss"] > 0 for r in history.of("metric"))
    assert len(history.of("start")) == len(history.of("finish")) == 1
    assert history.last("start")["total_steps"] == MAX_STEPS


def test_total_steps_follow_from_epochs(base, tmp_path):
    """64 sentences by 4 by 2 are 8 steps an epoch."""
    callback = adalora.AdaLoraCallback(target_rank=2)
    trainer_for(base, tmp_path, callback, max_steps=-1, num_train_epochs=2, save_strategy="no").train()
    assert callback.controller.schedule.total_steps == callback.controller.step == 16
    assert callback.controller.live == callback.controller.target_budget


def test_a_run_stopped_early_still_reaches_its_target(base, tmp_path):
    """It says so, and what is left is a valid adapter."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 6

    callback = adalora.AdaLoraCallback(target_rank=2)
    trainer = trainer_for(base, tmp_path, callback, Stop(), save_strategy="no")
    with pytest.warns(adalora.AdaLoraWarning, match=r"training ended after 6 of 24 steps.*total_steps=6"):
        trainer.train()
    assert sum(h.rank for h in callback.controller.handles) == callback.controller.target_budget


def test_callback_takes_config_or_keywords():
    """Both at once would leave open which holds."""
    with pytest.raises(adalora.AdaLoraError, match="target_rank"):
        adalora.AdaLoraCallback(adalora.AdaLoraConfig(), target_rank=2)


def test_training_again_leaves_a_finished_adapter_alone(base, tmp_path):
    """A second `train()` goes on at the ranks that the first one found."""
    callback = adalora.AdaLoraCallback(target_rank=1)
    trainer = trainer_for(base, tmp_path, callback, save_strategy="no")
    trainer.train()
    ranks = callback.controller.ranks
    assert 0 in ranks.values()
    trainer.train()
    assert callback.controller.ranks == ranks
    assert callback.controller.step == MAX_STEPS
    assert len(callback.controller.history.of("start")) == 1
