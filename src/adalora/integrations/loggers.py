"""The Trainer's `report_to` loggers: budget, live triplets, phase, orthogonality, and the ranks as a picture."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from adalora.controller import RankController
from adalora.errors import AdaLoraWarning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASES = ("warmup", "decrease", "final")
PICTURES = 10  # heatmaps a run at most, beside the last one
NAME = "adalora/ranks"


class LoggerBridge:
    """Adds scalars to what the trainer logs, and gives pictures to the loggers that take them.

    Args:
        controller: Whose numbers; None: nothing is added.
        callbacks: The trainer's callbacks, the loggers among them.
    """

    def __init__(self, controller: RankController | None, callbacks: list[TrainerCallback]) -> None:
        self.controller = controller
        self._callbacks = callbacks
        self._shown: list[int] = []
        self._shown_at = -1

    @classmethod
    def beside(cls, callback: TrainerCallback, controller: RankController) -> LoggerBridge:
        """Bridge to the loggers of the trainer that is calling `callback`, which is put in front of them.

        A trainer hands its callbacks everything but itself, so its list of callbacks is looked up among the callers.
        In front of the loggers, numbers added to a log reach them, and a last picture comes before they close.
        """
        handler = _calling_handler()
        if handler is None:
            return cls(controller, [])
        others = [c for c in handler.callbacks if c is not callback]
        at = sum(isinstance(c, DefaultFlowCallback) for c in others)
        handler.callbacks = [*others[:at], callback, *others[at:]]  # a new list: the old one is being walked
        return cls(controller, others)

    def scalars(self, logs: dict[str, Any]) -> None:
        """Add this moment's numbers to what the trainer is about to log; the phase as 0, 1 or 2."""
        controller = self.controller
        if controller is None or controller.finished:
            return
        step = max(controller.step - 1, 0)
        schedule = controller.schedule
        logs["adalora/budget"] = schedule.budget(step)
        logs["adalora/live"] = controller.live
        logs["adalora/phase"] = PHASES.index(schedule.phase(step))
        last = controller.history.last("allocation")
        if last is not None and last["orthogonality"] is not None:
            logs["adalora/orthogonality"] = last["orthogonality"]

    def picture(self, state: TrainerState) -> None:
        """Log the rank heatmap where ranks have changed since the last one, at most `PICTURES` times and at the end."""
        controller = self.controller
        if controller is None or not state.is_world_process_zero:
            return
        senders = [send for c in self._callbacks if (send := _sender(c)) is not None]
        ranks = list(controller.ranks.values())
        soon = state.global_step - self._shown_at < state.max_steps / PICTURES and self._shown_at >= 0
        if not senders or ranks == self._shown or (soon and not controller.finished):
            return
        self._shown, self._shown_at = ranks, state.global_step
        for send in senders:
            try:
                send(controller.plot_ranks(), state.global_step)
            except Exception as error:  # each logger has errors of its own; none may end a training
                warnings.warn(f"a logger did not take the picture of the ranks: {error}", AdaLoraWarning, stacklevel=2)


def _calling_handler() -> CallbackHandler | None:
    """The trainer's list of callbacks that is being walked right now."""
    frame = sys._getframe(1)
    for _ in range(6):
        owner = frame.f_locals.get("self")
        if isinstance(owner, CallbackHandler):
            return owner
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None


def _sender(callback: TrainerCallback) -> Callable[[Figure, int], None] | None:
    """How this logger takes a picture; None for one that takes none, or is not at work."""
    names = [cls.__name__ for cls in type(callback).__mro__]
    logger: Any = callback
    if "TensorBoardCallback" in names and logger.tb_writer is not None:
        return lambda figure, step: logger.tb_writer.add_figure(NAME, figure, step)
    if "MLflowCallback" in names and logger._initialized:
        return lambda figure, step: logger._ml_flow.log_figure(figure, f"{NAME}-{step:06d}.png")
    for name, module in (("WandbCallback", "_wandb"), ("TrackioCallback", "_trackio")):
        if name in names and logger._initialized and getattr(logger, module) is not None:
            return _image_logger(getattr(logger, module))
    return None


def _image_logger(module: Any) -> Callable[[Figure, int], None]:
    """W&B and trackio share their calls: `log` with an `Image`."""

    def send(figure: Figure, step: int) -> None:
        module.log({NAME: module.Image(_pixels(figure)), "train/global_step": step})

    return send


def _pixels(figure: Figure) -> Any:
    """The figure as an array [height, width, 3] of uint8."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
