"""The Trainer as each of two processes runs it, whatever wraps its model."""

import torch
from bert_runs import arguments, lora, make
from peft import PeftModel
from transformers import Trainer, TrainerCallback

import adalora
from helpers.tiny_bert import Tokens, bert

TARGETS = "query|dense"


class Watch(TrainerCallback):
    """Controller steps beside the trainer's, and whether parameters are sharded."""

    def __init__(self):
        self.steps, self.sharded = [], []

    def on_step_end(self, args, state, control, **kwargs):
        (controller,) = adalora.controllers(kwargs["model"]).values()
        self.steps.append([state.global_step, controller.step])
        self.sharded.append(controller.is_sharded)


def make_of_pair(folder, *, target_rank, **more):
    """Trainer, controller and what was seen at its steps; four steps an epoch, no dropout."""
    watch, model = Watch(), lora(TARGETS, dropout=0.0)
    more = {"max_steps": 16, "save_steps": 4, "logging_steps": 4, **more}
    trainer, controller = make(folder, watch, model=model, settings={"target_rank": target_rank}, rows=64, **more)
    return trainer, controller, watch


def distance_to_saved(trainer, folder):
    """How far the live model's outputs are from those of a saved adapter in stock PEFT, at most."""
    inputs = Tokens(8).inputs
    stock = PeftModel.from_pretrained(bert(), folder).eval()
    with torch.no_grad():
        return float((stock(input_ids=inputs).logits - trainer.model.eval()(input_ids=inputs).logits).abs().max())


def still_losses(folder, **more):
    """What the Trainer reports where the weights stay where they are: by our callback, and without."""
    found = {}
    for name in ("ours", "plain"):
        trainer = Trainer(
            model=lora(TARGETS, dropout=0.0),
            args=arguments(folder / "still", max_steps=8, save_strategy="no", learning_rate=1e-9, **more),
            train_dataset=Tokens(64),
            callbacks=[adalora.AdaLoraCallback(target_rank=2, allocation_interval=1)] if name == "ours" else [],
        )
        trainer.train()
        found[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return found
