"""Refuses training engines under which the adapter would never be allocated, before anything is trained.

Other packages' engines are told by what their objects carry; none of them is imported.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from adalora.errors import ConfigError
from adalora.lora.layers.triplets import TripletHandle

INSTEAD = "Train with DDP or FSDP2 (fully_shard) instead; an adapter's optimizer state is small"
NO_DEEPSPEED = (
    "DeepSpeed is not supported: its engine steps inside backward on flat partitions of all parameters, so no torch "
    f"optimizer steps and gradients of single triplets do not exist. {INSTEAD}"
)
NO_FSDP1 = (
    "FSDP1 (FullyShardedDataParallel) is not supported: it lays the parameters of many layers into one flat one, cut "
    "anywhere, in which single triplets have no gradients of their own. Use FSDP2: "
    "torch.distributed.fsdp.fully_shard(model), fsdp_version=2 of Accelerate's plugin, fsdp_config={'version': 2} of "
    "the Trainer"
)
NO_MEGATRON = (
    f"Megatron-LM is not supported: it builds the model and its optimizer anew, without PEFT's layers. {INSTEAD}"
)
NO_STRATEGY = (
    "Lightning's {name} is not supported: it cuts the model before the callback can prepare it, and loads and saves by "
    "its own formats. Use Trainer(strategy='ddp'), or fully_shard in a loop of your own"
)
NO_SHARDED_RECIPE = (
    "{flag} of accelerate launch is not supported for recipes: every process trains and saves a whole model. Leave it "
    "out (accelerate launch --multi_gpu --num_processes 2 -m adalora train …), or use fully_shard in a loop of your "
    "own, Accelerate's plugin or the Trainer's fsdp"
)
SHARDING_LAUNCHERS = {"ACCELERATE_USE_FSDP": "--use_fsdp", "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm"}
REFUSED_STRATEGIES = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def refuse_launcher() -> None:
    """Stop a recipe whose launcher will cut the model into shards.

    Raises:
        ConfigError: It will.
    """
    refuse_deepspeed()
    for variable, flag in SHARDING_LAUNCHERS.items():
        if _asked(variable):
            raise ConfigError(NO_SHARDED_RECIPE.format(flag=flag))


def refuse_deepspeed(model: nn.Module | None = None, *, configured: Any = None) -> None:
    """Stop where DeepSpeed is at work or about to be.

    Args:
        model: A DeepSpeed engine, or a model with parameters that ZeRO-3 has partitioned (they carry a `ds_id`).
        configured: What says that DeepSpeed will be used: `TrainingArguments.deepspeed`, for example. So does
            `accelerate launch --use_deepspeed`, by an environment variable.

    Raises:
        ConfigError: It is.
    """
    engine = model is not None and any(kind.__module__.split(".")[0] == "deepspeed" for kind in type(model).__mro__)
    partitioned = model is not None and any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    if engine or partitioned or _asked("ACCELERATE_USE_DEEPSPEED") or configured:
        raise ConfigError(NO_DEEPSPEED)


def refuse_model(model: nn.Module) -> None:
    """Stop where a model is in the hands of an engine that is not supported.

    Raises:
        ConfigError: DeepSpeed or FSDP1 has wrapped it.
    """
    refuse_deepspeed(model)
    if any(hasattr(m, "_fsdp_wrapped_module") for m in model.modules()):
        raise ConfigError(NO_FSDP1)


def refuse_flattened(handles: Sequence[TripletHandle], optimizer: Optimizer) -> None:
    """Stop where FSDP1 was put around the model after `attach`, and an optimizer is about to step in it.

    Raises:
        ConfigError: It holds the layers' parameters as parts of a flat one, or as views of it.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    flat = {id(info.module) for p in parameters for info in getattr(p, "_param_infos", ())}
    views = {id(p) for p in parameters if getattr(p, "_fsdp_flattened", False)}
    if not (flat or views):
        return
    for h in handles:
        if any(id(m) in flat for m in h.layer.modules()) or any(id(p) in views for p, _ in h.factors.values()):
            raise ConfigError(NO_FSDP1)


def refuse_accelerator(accelerator: Any) -> None:
    """Stop where Accelerate runs an engine that is not supported.

    Args:
        accelerator: An `accelerate.Accelerator`.

    Raises:
        ConfigError: It does.
    """
    kind = getattr(accelerator.distributed_type, "value", accelerator.distributed_type)
    refuse_deepspeed(configured=kind == "DEEPSPEED")
    if kind == "MEGATRON_LM":
        raise ConfigError(NO_MEGATRON)
    plugin = getattr(getattr(accelerator, "state", None), "fsdp_plugin", None)
    if kind == "FSDP" and getattr(plugin, "fsdp_version", 1) == 1:
        raise ConfigError(NO_FSDP1)


def refuse_arguments(args: Any) -> None:
    """Stop where a Trainer is told to use an engine that is not supported.

    Args:
        args: `transformers.TrainingArguments`.

    Raises:
        ConfigError: It is.
    """
    refuse_deepspeed(configured=getattr(args, "deepspeed", None))
    plugin = getattr(args, "fsdp_plugin_args", None) or {}
    if int(plugin.get("fsdp_version", 2)) == 1:
        raise ConfigError(NO_FSDP1)


def refuse_strategy(strategy: Any) -> None:
    """Stop where Lightning uses a strategy that is not supported.

    Args:
        strategy: A `lightning.pytorch.strategies.Strategy`.

    Raises:
        ConfigError: It does.
    """
    name = next((kind.__name__ for kind in type(strategy).__mro__ if kind.__name__ in REFUSED_STRATEGIES), None)
    if name == "DeepSpeedStrategy":
        raise ConfigError(NO_DEEPSPEED)
    if name is not None:
        raise ConfigError(NO_STRATEGY.format(name=name))
