"""Ctrl-C as a wish that is granted at the next whole step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

TRAINING_LOOP = "_inner_training_loop"  # of the Trainer


class Interrupt:
    """Listens for SIGINT; the first one sets `requested`, the second one acts as it always does.

    Attributes:
        requested: Ctrl-C was pressed while listening.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None
        self._listening = False

    def listen(self) -> None:
        """Start; does nothing outside the main thread, where Python allows no handlers."""
        if self._listening or threading.current_thread() is not threading.main_thread():
            return
        self.requested = False
        before = signal.getsignal(signal.SIGINT)
        left_behind = getattr(before, "__self__", None)  # by a training that an exception ended
        self._before = left_behind._before if isinstance(left_behind, Interrupt) else before
        signal.signal(signal.SIGINT, self._on_signal)
        self._listening = True

    def close(self) -> None:
        """Give the signal back to whoever had it."""
        if self._listening:
            signal.signal(signal.SIGINT, self._before if self._before is not None else signal.default_int_handler)
            self._listening = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.close()
        if _in_training(frame):
            self.requested = True
        else:  # an exception ended the training and nobody could close us
            signal.raise_signal(signal.SIGINT)


def _in_training(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_name != TRAINING_LOOP:
        frame = frame.f_back
    return frame is not None
