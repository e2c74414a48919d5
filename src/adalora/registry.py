"""`attach`, and which controllers a process has: one hook on all optimizers serves them all."""

from __future__ import annotations

import atexit
import os
import sys
import weakref
from collections.abc import Mapping
from types import FrameType
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from adalora.config import AdaLoraConfig
from adalora.controller import RankController
from adalora.errors import AttachError
from adalora.lora.layers.triplets import adapter_name
from adalora.lora.processes.engines import refuse_flattened, refuse_model
from adalora.report.history import History
from adalora.report.live import diagnose_live
from adalora.report.thresholds import DiagnosticThresholds

REHEARSED_BY, REHEARSAL = "torch.distributed.checkpoint.state_dict", "_init_optim_state"
REHEARSAL_DEPTH = 6  # frames between it and the hook: subclasses' and schedulers' wrappers of `step`

# By model, then by adapter name. The model's end is the controllers' end: they hold it weakly.
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, dict[str, RankController]] = weakref.WeakKeyDictionary()


# The frame of the outermost `step` of an optimizer that is running. Where a subclass calls `super().step()` torch runs
# the hooks for both; only the outer one is a real step. A frame left behind by an exception is no longer on the stack.
_RUNNING: weakref.WeakKeyDictionary[Optimizer, FrameType] = weakref.WeakKeyDictionary()


def _rehearsed(frame: FrameType | None) -> bool:
    """Whether torch makes this step to see an optimizer's state: without gradients, at a learning rate of 0.

    `torch.distributed.checkpoint.state_dict` does, for an optimizer that has not stepped yet.
    """
    for _ in range(REHEARSAL_DEPTH):
        if frame is None:
            return False
        if frame.f_code.co_name == REHEARSAL and frame.f_globals.get("__name__") == REHEARSED_BY:
            return True
        frame = frame.f_back
    return False


def _before_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    caller = sys._getframe(1)
    if _rehearsed(caller.f_back):
        return None
    outer, frame = _RUNNING.get(optimizer), caller.f_back
    while outer is not None and frame is not None and frame is not outer:
        frame = frame.f_back
    if outer is not None and frame is not None:
        return None
    _RUNNING[optimizer] = caller
    living = [c for c in _all_controllers() if not c.finished]
    for controller in living:
        if controller.step == 0:  # whoever wrapped the model has done so by now
            refuse_flattened(controller.handles, optimizer)
    mine = [c for c in living if c.owns(optimizer)]
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if not mine:
        return None
    if closure is None:
        for controller in mine:
            controller.before_step(optimizer)
        return None
    # The gradients come to be inside the closure (Lightning, L-BFGS).
    wrapped = _Closure(closure, mine, optimizer)
    return ((args[0], wrapped, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": wrapped})


class _Closure:
    """A closure of the user's, and what has to happen to the gradients once it has run."""

    def __init__(self, closure: Any, controllers: list[RankController], optimizer: Optimizer) -> None:
        self._closure, self._controllers, self._optimizer = closure, controllers, optimizer

    def __call__(self) -> Any:
        loss = self._closure()
        for controller in self._controllers:
            controller.before_step(self._optimizer)
        return loss


def _all_controllers() -> list[RankController]:
    return [c for of_model in list(_ATTACHED.values()) for c in of_model.values()]


def _on_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _RUNNING.get(optimizer) is not sys._getframe(1):
        return
    del _RUNNING[optimizer]
    for controller in _all_controllers():
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
            ranks.append(gone if found is None else h.rank_of(found.shape))
        if any(ranks):
            controller.fit_to(ranks)


def _after_load_state_dict(model: nn.Module, incompatible: Any) -> None:
    for controller in controllers(model).values():
        controller.note_weights()


def _before_state_dict(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    """What is saved starts here, whoever saves: the last moment to say that nothing was allocated."""
    for controller in controllers(model).values():
        controller.warn_if_idle()


@atexit.register
def _at_exit() -> None:
    """Training is over for every model that is left."""
    for of_model in list(_ATTACHED.values()):
        for controller in of_model.values():
            controller.warn_if_idle(over=True)


class _AdapterLoader:
    """PEFT's `load_adapter`: for an attached adapter a checkpoint is verified before anything of it is used.

    An object, not a closure or bound method: a deep copy of the model gets one of its own, and it can be pickled.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        load = type(self.model).load_adapter
        controller = controllers(self.model).get(adapter_name)
        if controller is None:
            return load(self.model, model_id, adapter_name, *args, **kwargs)
        with controller.loading(model_id):
            return load(self.model, model_id, adapter_name, *args, **kwargs)


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
    pruned: str | os.PathLike[str] | None = None,
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
        pruned: A safetensors file that `finalize` writes every pruned triplet to, as it was when it was pruned, for
            budget curves above 100 %. None keeps nothing.
        **fields: Fields of `AdaLoraConfig`, instead of `config`.

    Returns:
        The controller. Keeping it is not needed: it lives as long as the model.

    Raises:
        ConfigError: A setting is wrong, or an engine that is not supported has the model.
        AttachError: The model has no LoRA layer that fits, or is attached already.
    """
    refuse_model(model)
    config = AdaLoraConfig.given(config, fields)
    adapter = adapter_name(model, adapter)
    taken = controllers(model)
    if adapter in taken:
        raise AttachError(f"adapter {adapter!r} of this model is attached already; call attach once")
    record = history if isinstance(history, History) else History(history)
    diagnose_live(record, thresholds)
    controller = RankController(model, config, adapter=adapter, history=record, total_steps=total_steps, pruned=pruned)
    if model not in _ATTACHED:
        cast(Any, model).register_load_state_dict_pre_hook(_before_load_state_dict)
        cast(Any, model).register_load_state_dict_post_hook(_after_load_state_dict)
        cast(Any, model).register_state_dict_pre_hook(_before_state_dict)
        if hasattr(model, "load_adapter"):
            cast(Any, model).load_adapter = _AdapterLoader(model)
    _ATTACHED.setdefault(model, {})[adapter] = controller
    return controller


def controllers(model: nn.Module) -> dict[str, RankController]:
    """The controllers of a model, by adapter name; empty if none was attached."""
    return dict(_ATTACHED.get(model, {}))
