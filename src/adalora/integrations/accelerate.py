"""Accelerate: the exact training state with `save_state` and `load_state`."""

from __future__ import annotations

from typing import Any

from accelerate.utils import DistributedType

from adalora.controller import RankController
from adalora.lora.checkpoint import read_state, write_state
from adalora.lora.engines import refuse_deepspeed


def register(accelerator: Any, controller: RankController) -> None:
    """Make `accelerator.save_state` write the controller's state, and `load_state` go on from it.

    Layers are brought to the checkpoint's ranks before Accelerate loads weights and optimizer. Unlike with
    `accelerator.register_for_checkpointing(controller)`, which works as well, no pickle is written or read for it.

    Args:
        accelerator: An `accelerate.Accelerator`.
        controller: From `adalora.attach`.

    Raises:
        ConfigError: The accelerator runs DeepSpeed.
    """
    refuse_deepspeed(configured=accelerator.distributed_type == DistributedType.DEEPSPEED)

    def save(models: list[Any], weights: list[Any], output_dir: str) -> None:
        state = controller.state_dict()
        if accelerator.is_main_process:
            write_state(output_dir, state)

    def load(models: list[Any], input_dir: str) -> None:
        controller.load_state_dict(read_state(input_dir))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
