"""How the Trainer trains the small BERT."""

from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import adalora
from helpers.tiny_bert import Tokens, bert

MAX_STEPS = 24


def lora(targets="query|key|value|dense", seed=3, dropout=0.1):
    """A LoRA model whose head is trained too."""
    config = LoraConfig(
        r=6, lora_alpha=12, task_type="SEQ_CLS", lora_dropout=dropout, target_modules=rf".*encoder.*\.({targets})"
    )
    return get_peft_model(bert(seed), config)


def arguments(folder, **settings):
    """A run on the CPU that shows nothing."""
    given = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": MAX_STEPS, "save_steps": 1,
        "logging_steps": 1, "learning_rate": 5e-3, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False, **settings,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **given)


def make(folder, *callbacks, model=None, settings=None, rows=40, **more):
    """Trainer and controller; one allocation every two steps."""
    callback = adalora.AdaLoraCallback(**{"target_rank": 2, "allocation_interval": 2, **(settings or {})})
    trainer = Trainer(
        model=model or lora(),
        args=arguments(folder, **more),
        train_dataset=Tokens(rows),  # five steps an epoch: resumes fall inside and between epochs
        eval_dataset=Tokens(16),
        callbacks=[callback, *callbacks],
    )
    return trainer, callback.controller
