"""Refuses training engines whose optimizer steps cannot be seen."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from adalora.errors import ConfigError

NO_DEEPSPEED = (
    "DeepSpeed is not supported: its engine steps inside backward on flat partitions of all parameters, so no torch "
    "optimizer steps and gradients of single triplets do not exist. Train with DDP or FSDP2 instead; an adapter's "
    "optimizer state is small"
)


def refuse_deepspeed(model: nn.Module | None = None, *, configured: Any = None) -> None:
    """Stop before anything is trained that would never be allocated. DeepSpeed is looked for, never imported.

    Args:
        model: A DeepSpeed engine, or a model with parameters that ZeRO-3 has partitioned (they carry a `ds_id`).
        configured: What says that DeepSpeed will be used: `TrainingArguments.deepspeed`, for example. So does
            `accelerate launch --use_deepspeed`, by an environment variable.

    Raises:
        ConfigError: DeepSpeed is at work or about to be.
    """
    engine = model is not None and any(kind.__module__.split(".")[0] == "deepspeed" for kind in type(model).__mro__)
    partitioned = model is not None and any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true", "yes")
    if engine or partitioned or launched or configured:
        raise ConfigError(NO_DEEPSPEED)
