"""Adaptive-rank fine-tuning on PEFT's LoRA: `adalora.attach(model, target_rank=8, total_steps=3000)`."""

from adalora.config import AdaLoraConfig
from adalora.controller import RankController
from adalora.errors import AdaLoraError, AdaLoraWarning
from adalora.integrations.trainer import AdaLoraCallback
from adalora.lora.checkpoint import latest_checkpoint
from adalora.registry import attach, controllers
from adalora.report.history import History
from adalora.version import __version__

__all__ = [
    "AdaLoraCallback",
    "AdaLoraConfig",
    "AdaLoraError",
    "AdaLoraWarning",
    "History",
    "RankController",
    "__version__",
    "attach",
    "controllers",
    "latest_checkpoint",
]
