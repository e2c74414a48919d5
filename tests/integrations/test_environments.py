"""The training environments, each by running it: one hook call per real step, the task's loss, a true saved adapter."""

import copy

import datasets
import lightning.pytorch as lightning
import pytest
import torch
from bert_runs import make
from lightning_runs import lightning_module
from llamas import llama, sentence, tokenizer
from peft import LoraConfig
from plain_adapter import assert_saved_equals_live
from torch import nn
from transformers import Trainer

import adalora
from adalora.integrations.lightning import AdaLoraLightning
from helpers.tiny_bert import Tokens, bert


class Summed(Trainer):
    """A custom loss with nothing of the model's own."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.multi_margin_loss(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


VARIANTS = {
    "clipping": {"max_grad_norm": 0.01},
    "label_smoothing": {"label_smoothing_factor": 0.1},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "checkpointing_reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "accumulation": {"gradient_accumulation_steps": 4},
    "bf16": {"bf16": True},
    "adafactor": {"optim": "adafactor"},
}


@pytest.mark.parametrize("name", [*VARIANTS, "custom_loss", "compute_loss_func"])
@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:.*use_reentrant.*:UserWarning", "ignore:None of the inputs"
)
def test_trainer_variants(tmp_path, name):
    """Steps counted once; evaluation's loss is that of the model without any regulariser."""
    trainer, controller = make(tmp_path / "out", save_strategy="no", logging_steps=4, **VARIANTS.get(name, {}))
    if name == "custom_loss":
        trainer.__class__ = Summed
    if name == "compute_loss_func":
        trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: nn.functional.cross_entropy(
            outputs.logits, labels
        )
    trainer.train()
    assert controller.step == trainer.state.global_step == 24
    assert controller.live == sum(h.rank for h in controller.handles) == controller.target_budget
    assert controller.history.last("allocation")["skipped_steps"] == 0
    if name in ("clipping", "adafactor", "accumulation"):
        rows = Tokens(16)
        trainer.model.eval()
        with torch.no_grad():
            logits = trainer.model(input_ids=rows.inputs).logits
        wanted = nn.functional.cross_entropy(logits, (rows.inputs[:, 0] > 50).long())
        assert trainer.evaluate()["eval_loss"] == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.filterwarnings("ignore")
def test_trl(tmp_path, kind):
    """`peft_config=LoraConfig(…)` and our callback; TRL makes the PEFT model itself."""
    callback = adalora.AdaLoraCallback(target_rank=2, allocation_interval=1)
    common = {
        "output_dir": str(tmp_path / "out"), "max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 5e-3,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 4,
        "gradient_accumulation_steps": 2, "dataloader_pin_memory": False, "bf16": False,
    }  # fmt: skip
    if kind == "sft":
        data = datasets.Dataset.from_dict({"text": [sentence(i) for i in range(32)]})
        trl = pytest.importorskip("trl")
        arguments, trainer_type = trl.SFTConfig(max_length=32, **common), trl.SFTTrainer
    else:
        columns = {
            "prompt": [sentence(i) for i in range(32)],
            "chosen": [sentence(i + 1) for i in range(32)],
            "rejected": [sentence(i + 2) for i in range(32)],
        }
        data = datasets.Dataset.from_dict(columns)
        trl = pytest.importorskip("trl")
        arguments, trainer_type = trl.DPOConfig(max_length=64, **common), trl.DPOTrainer
    base = llama()
    trainer = trainer_type(
        model=copy.deepcopy(base),
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[callback],
    )
    trainer.train()
    controller = callback.controller
    assert controller.step == trainer.state.global_step == 12
    assert controller.live == sum(h.rank for h in controller.handles) == controller.target_budget
    model = trainer.accelerator.unwrap_model(trainer.model)
    inputs = {"input_ids": torch.randint(4, 64, (2, 10))}
    assert_saved_equals_live(model, base, inputs, tmp_path / "adapter")


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("moment", [4, 12])
@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path, manual, moment):
    """Automatic and manual optimisation, resumed before and after compaction, bit for bit."""

    def fit(steps, path=None, name="whole"):
        lightning.seed_everything(1, verbose=False)
        callback = AdaLoraLightning(target_rank=2, allocation_interval=1, warmup=2, final=6)
        trainer = lightning.Trainer(
            max_steps=16, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path / name, callbacks=[callback, Save()],
        )  # fmt: skip
        module = lightning_module(manual=manual)
        loader = torch.utils.data.DataLoader(Tokens(128), batch_size=4)
        trainer.fit(module, loader, ckpt_path=path)
        assert trainer.global_step == callback.controller.step == 16
        assert_saved_equals_live(module.model, bert(), {"input_ids": Tokens(8).inputs}, tmp_path / name / "adapter")
        assert float(trainer.callback_metrics["loss"]) == pytest.approx(module.task_loss, abs=1e-6)
        return callback.controller, {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}

    class Save(lightning.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == moment:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    whole, weights = fit(16)
    assert whole.live == sum(h.rank for h in whole.handles) == whole.target_budget
    again, resumed = fit(16, path=tmp_path / "saved.ckpt", name="resumed")
    assert again.ranks == whole.ranks
    assert weights.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())
