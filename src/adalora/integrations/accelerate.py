"""Accelerate: the exact training state with `save_state` and `load_state`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from adalora.controller import RankController
from adalora.lora.processes.engines import refuse_accelerator
from adalora.lora.state.checkpoint import read_state, write_state


def register(accelerator: Any, controller: RankController) -> None:
    """Make `accelerator.save_state` write the controller's state, and `load_state` go on from it.

    The state is written last and holds the checksums of all that Accelerate has written, so that a process killed at
    any moment leaves a whole checkpoint or one that is refused; `adalora.latest_checkpoint` finds the newest whole one.
    Layers are brought to the checkpoint's ranks before Accelerate loads weights and optimizer. Unlike with
    `accelerator.register_for_checkpointing(controller)`, which works as well, no pickle is written or read for it.

    Args:
        accelerator: An `accelerate.Accelerator`.
        controller: From `adalora.attach`.

    Raises:
        ConfigError: The accelerator runs an engine that is not supported.
    """
    refuse_accelerator(accelerator)
    gathered: dict[str, Any] = {}
    save = accelerator.save_state

    def gather(models: list[Any], weights: list[Any], output_dir: str) -> None:
        gathered.update(folder=Path(output_dir), state=controller.state_dict())

    @functools.wraps(save)
    def save_state(*args: Any, **kwargs: Any) -> Any:
        refuse_accelerator(accelerator)
        place = save(*args, **kwargs)
        accelerator.wait_for_everyone()  # every process has files of its own there
        if accelerator.is_main_process:
            write_state(gathered["folder"], gathered["state"])
        accelerator.wait_for_everyone()
        gathered.clear()
        return place

    def load(models: list[Any], input_dir: str) -> None:
        controller.load_state_dict(read_state(input_dir))

    accelerator.register_save_state_pre_hook(gather)
    accelerator.register_load_state_pre_hook(load)
    accelerator.save_state = save_state
