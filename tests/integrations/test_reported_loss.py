"""The loss that a trainer reports is the task's: at a learning rate of nearly 0, that of the same run on plain LoRA.

Weights then stay where they are, so that anything else in the loss, a regulariser or other random numbers, would show.
"""

import copy

import datasets
import pytest
import torch
from accelerate import Accelerator
from bert_runs import lora, make
from llamas import llama, sentence, tokenizer
from peft import LoraConfig
from plain_adapter import assert_saved_equals_live
from test_environments import VARIANTS, Summed
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, set_seed

import adalora
from helpers.tiny_bert import Tokens, bert

STILL = 1e-9
STEPS = 12


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def task_loss(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs.logits, labels)


@pytest.mark.parametrize("name", [*VARIANTS, "custom_loss", "compute_loss_func"])
@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:.*use_reentrant.*:UserWarning", "ignore:None of the inputs"
)
def test_trainer(tmp_path, name):
    settings = {"save_strategy": "no", "learning_rate": STILL, "max_steps": STEPS, **VARIANTS.get(name, {})}
    model = lora()
    for module in model.modules():  # modules of rank 0 draw nothing, which moves the random numbers of the others
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trainer, controller = make(tmp_path / "out", model=copy.deepcopy(model), **settings)
    plain = Trainer(model=model, args=trainer.args, train_dataset=trainer.train_dataset)
    for each in (plain, trainer):
        if name == "custom_loss":
            each.__class__ = Summed
        if name == "compute_loss_func":
            each.compute_loss_func = task_loss
        set_seed(trainer.args.seed)
        each.train()
    assert controller.step == trainer.state.global_step == STEPS
    assert controller.live == controller.target_budget
    assert len(losses(trainer)) == STEPS
    assert losses(trainer) == pytest.approx(losses(plain), abs=2e-4)
    inputs = {"input_ids": Tokens(8).inputs}
    assert_saved_equals_live(trainer.model, bert(), inputs, tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.filterwarnings("ignore")
def test_trl(tmp_path, kind):
    columns = {"text": [sentence(i) for i in range(32)]}
    if kind == "dpo":
        columns = {
            name: [sentence(i + n) for i in range(32)] for n, name in enumerate(("prompt", "chosen", "rejected"))
        }
    trl = pytest.importorskip("trl")
    config, trainer_type = (trl.SFTConfig, trl.SFTTrainer) if kind == "sft" else (trl.DPOConfig, trl.DPOTrainer)
    base, found = llama(), {}
    for callbacks in ([], [adalora.AdaLoraCallback(target_rank=2, allocation_interval=1)]):
        trainer = trainer_type(
            model=copy.deepcopy(base),
            args=config(
                output_dir=str(tmp_path / str(len(callbacks))), max_length=64, max_steps=STEPS, learning_rate=STILL,
                per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
                logging_steps=1, dataloader_pin_memory=False, bf16=False,
            ),
            train_dataset=datasets.Dataset.from_dict(columns),
            processing_class=tokenizer(),
            peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=callbacks,
        )  # fmt: skip
        trainer.train()
        found[len(callbacks)] = losses(trainer)
    assert callbacks[0].controller.step == len(found[1]) == STEPS
    assert found[1] == pytest.approx(found[0], abs=2e-4)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_own_loop(tmp_path, accumulated):
    """One hook call per real step, the task's loss, and a true saved adapter: during the decrease and at the end."""
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=STEPS, allocation_interval=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    inputs = {"input_ids": Tokens(8).inputs}
    for number, batch in enumerate(DataLoader(Tokens(4 * STEPS * accumulated), batch_size=4)):
        outputs = model.train()(**batch)
        task = nn.functional.cross_entropy(outputs.logits, batch["labels"])
        assert outputs.loss.item() == pytest.approx(task.item(), abs=1e-6)
        outputs.loss.backward()
        if (number + 1) % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
            if controller.step == STEPS // 3:
                assert controller.phase == "decrease"
                assert_saved_equals_live(model, bert(), inputs, tmp_path / "third")
        assert controller.step == (number + 1) // accumulated
    controller.finalize()
    assert controller.step == STEPS
    assert controller.live == sum(h.rank for h in controller.handles) == controller.target_budget
    assert_saved_equals_live(model, bert(), inputs, tmp_path / "adapter")


@pytest.mark.parametrize("accumulated", [1, 3])
def test_accelerate(tmp_path, accumulated):
    """The same, in a loop that Accelerate wraps."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=STEPS, allocation_interval=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    loader = DataLoader(Tokens(4 * STEPS * accumulated), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for number, batch in enumerate(loader):
        with accelerator.accumulate(model):
            outputs = model(**batch)
            assert outputs.loss.item() == pytest.approx(
                nn.functional.cross_entropy(outputs.logits, batch["labels"]).item(), abs=1e-6
            )
            accelerator.backward(outputs.loss)
            optimizer.step()
            optimizer.zero_grad()
        assert controller.step == (number + 1) // accumulated
    assert controller.step == STEPS
    assert controller.live == sum(h.rank for h in controller.handles) == controller.target_budget
    inputs = {"input_ids": Tokens(8).inputs}
    assert_saved_equals_live(accelerator.unwrap_model(model), bert(), inputs, tmp_path / "adapter")
