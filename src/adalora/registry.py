"""`attach`, and which controllers a process has: one hook on all optimizers serves them all."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from types import FrameType, MethodType
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from adalora.config import AdaLoraConfig
from adalora.controller import RankController
from adalora.errors import AttachError, ConfigError
from adalora.report.history import History
from adalora.report.live import diagnose_live
from adalora.report.thresholds import DiagnosticThresholds

# By model, then by adapter name. The model's end is the controllers' end: they hold it weakly.
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, dict[str, RankController]] = weakref.WeakKeyDictionary()


# The frame of the outermost `step` of an optimizer that is running. Where a subclass calls `super().step()` torch runs
# the hooks for both; only the outer one is a real step. A frame left behind by an exception is no longer on the stack.
_RUNNING: weakref.WeakKeyDictionary[Optimizer, FrameType] = weakref.WeakKeyDictionary()


def _before_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    caller = sys._getframe(1)
    outer, frame = _RUNNING.get(optimizer), caller.f_back
    while outer is not None and frame is not None and frame is not outer:
        frame = frame.f_back
    if outer is None or frame is None:
        _RUNNING[optimizer] = caller


def _on_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _RUNNING.get(optimizer) is not sys._getframe(1):
        return
    del _RUNNING[optimizer]
    for controller in [c for of_model in list(_ATTACHED.values()) for c in of_model.values()]:
        if not controller.finished and controller.owns(optimizer):
            controller.after_step(optimizer)


def _before_load_state_dict(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    """Bring the layers to the ranks of the weights that come.

    Only layers whose weights are there are touched, unless they should all be: then a layer without any has left the
    adapter.
    """
    strict = bool(rest[1])
    names = {id(module): name for name, module in model.named_modules()}
    for controller in controllers(model).values():
        ranks = []
        for h in controller.handles:
            keys = [f"{prefix}{names[id(h.layer)]}.{key}" for key in h.Q_keys]
            found = next((state_dict[key] for key in keys if key in state_dict), None)
            gone = 0 if strict or controller.expects_all_layers else h.rank
            ranks.append(gone if found is None else found.shape[h.Q_dim])
        if any(ranks):
            controller.fit_to(ranks)


def _load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    """PEFT's `load_adapter`: for an attached adapter a checkpoint is verified before anything of it is used."""
    controller = controllers(self).get(adapter_name)
    if controller is None:
        return type(self).load_adapter(self, model_id, adapter_name, *args, **kwargs)
    with controller.loading(model_id):
        return type(self).load_adapter(self, model_id, adapter_name, *args, **kwargs)


register_optimizer_step_pre_hook(_before_optimizer_step)
register_optimizer_step_post_hook(_on_optimizer_step)


def attach(
    model: nn.Module,
    config: AdaLoraConfig | None = None,
    *,
    total_steps: int | None = None,
    adapter: str | None = None,
    history: History | str | None = None,
    thresholds: DiagnosticThresholds | None = None,
    **fields: Any,
) -> RankController:
    """Make a PEFT LoRA model adaptive. The one line.

    Args:
        model: From `peft.get_peft_model(model, LoraConfig(...))`; its `r` is the initial rank.
        config: Settings; or give them as keywords, e.g. `target_rank=8`.
        total_steps: Optimizer steps of the whole run. Left out only where someone else sets it later
            (`AdaLoraCallback` does).
        adapter: Adapter to make adaptive; the active one by default.
        history: Where to record: a `History` or a path for a JSON-lines file.
        thresholds: When a diagnostic of the run speaks up: an `AdaLoraWarning` and a record in the history.
        **fields: Fields of `AdaLoraConfig`, instead of `config`.

    Returns:
        The controller. Keeping it is not needed: it lives as long as the model.

    Raises:
        ConfigError: A setting is wrong.
        AttachError: The model has no LoRA layer that fits, or is attached already.
    """
    if config is not None and fields:
        raise ConfigError(f"give config or keywords, not both: config={config!r} and {', '.join(fields)}")
    config = config or AdaLoraConfig(**fields)
    if adapter is None:
        active = getattr(model, "active_adapter", "default")
        adapter = active if isinstance(active, str) else "default"
    taken = controllers(model)
    if adapter in taken:
        raise AttachError(f"adapter {adapter!r} of this model is attached already; call attach once")
    record = history if isinstance(history, History) else History(history)
    diagnose_live(record, thresholds)
    controller = RankController(model, config, adapter=adapter, history=record, total_steps=total_steps)
    if model not in _ATTACHED:
        cast(Any, model).register_load_state_dict_pre_hook(_before_load_state_dict)
        if hasattr(model, "load_adapter"):
            # A bound method, not a closure: a deep copy of the model gets one bound to itself.
            cast(Any, model).load_adapter = MethodType(_load_adapter, model)
    _ATTACHED.setdefault(model, {})[adapter] = controller
    return controller


def controllers(model: nn.Module) -> dict[str, RankController]:
    """The controllers of a model, by adapter name; empty if none was attached."""
    return dict(_ATTACHED.get(model, {}))
