"""Ctrl-C as a wish that is granted at the next whole step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


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
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        self._listening = True

    def close(self) -> None:
        """Give the signal back to whoever had it."""
        if self._listening:
            signal.signal(signal.SIGINT, self._before if self._before is not None else signal.default_int_handler)
            self._listening = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.close()
        self.requested = True
