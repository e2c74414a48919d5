"""Adaptive-rank fine-tuning on PEFT's LoRA: `adalora.attach(model, target_rank=8, total_steps=3000)`.

Names are imported at their first use: `adalora --help` need not wait for torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from adalora.version import __version__

if TYPE_CHECKING:
    from adalora.config import AdaLoraConfig
    from adalora.controller import RankController
    from adalora.errors import AdaLoraError, AdaLoraWarning
    from adalora.integrations.trainer import AdaLoraCallback
    from adalora.lora.starts.gradient_sketch import GradientSketch
    from adalora.lora.state.checkpoint import latest_checkpoint
    from adalora.registry import attach, controllers
    from adalora.report.history import History

__all__ = [
    "AdaLoraCallback",
    "AdaLoraConfig",
    "AdaLoraError",
    "AdaLoraWarning",
    "GradientSketch",
    "History",
    "RankController",
    "__version__",
    "attach",
    "controllers",
    "latest_checkpoint",
]

_HOME = {
    "AdaLoraCallback": "adalora.integrations.trainer",
    "AdaLoraConfig": "adalora.config",
    "AdaLoraError": "adalora.errors",
    "AdaLoraWarning": "adalora.errors",
    "GradientSketch": "adalora.lora.starts.gradient_sketch",
    "History": "adalora.report.history",
    "RankController": "adalora.controller",
    "attach": "adalora.registry",
    "controllers": "adalora.registry",
    "latest_checkpoint": "adalora.lora.state.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"adalora.{name}") is not None:
        return importlib.import_module(f"adalora.{name}")  # e.g. `adalora.report(run)`
    raise AttributeError(f"module 'adalora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
