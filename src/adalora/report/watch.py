"""A running job in the terminal: its history is read as it grows, and only what changed is drawn."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.live import Live

from adalora.errors import HistoryError
from adalora.report.history import Record
from adalora.report.terminal import WatchState, frame, plain_line


class Tail:
    """New records of a `history.jsonl` that another process appends to.

    Args:
        source: The file, or the run's folder; it need not exist yet.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        path = Path(source)
        self.path = path if path.suffix == ".jsonl" else path / "history.jsonl"
        self._offset = 0
        self.restarted = False

    def read(self) -> list[Record]:
        """Records completed since the last call; a line still being written waits for the next.

        `restarted` tells whether the file had become shorter: a new run, read from its start.

        Raises:
            HistoryError: A complete line is not a record.
        """
        self.restarted = False
        try:
            size = self.path.stat().st_size
            if size < self._offset:
                self._offset, self.restarted = 0, True
            with self.path.open("rb") as file:
                file.seek(self._offset)
                text = file.read(size - self._offset)
        except FileNotFoundError:
            return []
        complete = text[: text.rfind(b"\n") + 1]
        records = [self._record(line) for line in complete.splitlines() if line.strip()]
        self._offset += len(complete)
        return records

    def _record(self, line: bytes) -> Record:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise HistoryError(f"{self.path}: not a JSON record ({error.msg}): {line[:60]!r}") from error
        if not isinstance(record, dict) or "event" not in record:
            raise HistoryError(f"{self.path}: not a record with `event`: {line[:60]!r}")
        return dict(record)


def watch(
    source: str | os.PathLike[str],
    *,
    once: bool = False,
    interval: float = 2.0,
    console: Console | None = None,
) -> None:
    """Show a run until it has finished.

    A terminal gets one frame that is redrawn in place when something changed; anything else gets a plain line
    per change.

    Args:
        source: The run's folder or its `history.jsonl`.
        once: Show what there is now and return.
        interval: Seconds between two looks at the file.
        console: Where to draw; standard output if None.

    Raises:
        HistoryError: With `once`, there is no run yet; or the history is malformed.
    """
    console = console or Console()
    tail, state = Tail(source), WatchState()
    if once:
        _take(tail, state)
        if not state.start:
            raise HistoryError(f"no run at {str(tail.path)!r} yet: give a run's folder that holds history.jsonl")
        if console.is_terminal:
            console.print(frame(state, width=console.width))
        else:
            console.print(plain_line(state), soft_wrap=True)
        return
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for _ in _changes(tail, state, interval=interval):
                live.update(frame(state, width=console.width), refresh=True)
    else:
        for _ in _changes(tail, state, interval=interval):
            console.print(plain_line(state), soft_wrap=True)


def _changes(tail: Tail, state: WatchState, *, interval: float) -> Iterator[None]:
    """Wait for the file to grow; ends when the run has finished or its reader interrupts."""
    first = True
    try:
        while True:
            if _take(tail, state) or first:
                first = False
                yield
            if state.finished:
                return
            time.sleep(interval)
    except KeyboardInterrupt:
        return


def _take(tail: Tail, state: WatchState) -> bool:
    records = tail.read()
    if tail.restarted:
        state.clear()
    for record in records:
        state.update(record)
    return bool(records)
