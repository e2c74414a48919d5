"""The record of a run: what was decided, when, on which scores.

One run is a list of flat JSON records, in memory and, if a path is given, one JSON line each in
`history.jsonl`. Every record has `event`; steps are optimizer steps counted from 0. Events:

`start`       version, versions{}, machine{}, config{}, model, total_steps, warmup_steps, decrease_end,
              initial_budget, target_budget, modules[{name, kind, d_out, d_in, groups, rank, parameters_per_triplet}]
              (LoRA's r is groups · rank; groups are those of a convolution)
`step`        step, phase, budget, live; loss, learning_rate, seconds where known
`handover`    step, ranks[], update_ratio        (re-parametrised at the end of warm-up)
`allocation`  step, phase, budget, live, threshold, pruned, revived, ranks[], scores{min, q05, q25, q50, q75,
              q95, max, histogram[32], edges_log10[33], below_threshold}, module_scores[], orthogonality,
              skipped_steps, update_ratio (‖ΔW‖ / ‖W‖ of the median module; where known),
              triplet_scores[][] (of the triplets kept, once the budget has reached its target),
              revived_triplets[[module, triplet]] (numbers from 0; a triplet keeps its number until the compaction)
`compaction`  step, ranks[], parameters_before, parameters_after, bytes_before, bytes_after (of the adapter in memory),
              optimizer_bytes_before, optimizer_bytes_after (of the optimizer's state for it)
`pruned`      step, file, triplets, parameters, bytes      (what was pruned, in a file beside this one)
`restored`    step, of_step, checkpoint, ranks[]   (the adapter of the best checkpoint came back: what was trained and
              allocated from `of_step` on is not in it)
`metric`      step, split, values{}
`diagnostic`  step, code, message, cause, cure
`thresholds`  the fields of `DiagnosticThresholds` that are not the defaults; after `start`
`finish`      step, ranks[], singular_values[][], orthogonality, seconds, allocations

`ranks`, `module_scores` and `singular_values` are in the order of `start.modules`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adalora.errors import AdaLoraWarning
from adalora.faults import storage_fault

if TYPE_CHECKING:
    import pandas as pd

Record = dict[str, Any]


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


class History:
    """Append-only list of records, mirrored to a JSON-lines file when a path is set.

    A file that cannot be written to, on a full disk, ends no run: the records stay in memory, which is told once, and
    go into the file as soon as it takes them.

    Args:
        path: File to append to; its folder is made. None keeps the records in memory only.

    Attributes:
        listeners: Called with every new record, after it was written.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.records: list[Record] = []
        self.listeners: list[Callable[[Record], None]] = []
        self.path: Path | None = None
        self._in_file = self._bytes = 0  # records and bytes that are in the file
        self._told = False
        self._started = time.monotonic()
        if path is not None:
            self.write_to(path)

    def write_to(self, path: str | os.PathLike[str]) -> None:
        """Mirror to `path` from now on; records already held are written first."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(b"")
        self._in_file = self._bytes = 0
        self._catch_up()

    def add(self, event: str, **fields: Any) -> Record:
        """Append one record and return it. `seconds` since the start is added where it is not given."""
        record: Record = _finite({"event": event, **fields})
        record.setdefault("seconds", round(self.seconds, 3))
        self.records.append(record)
        self._catch_up()
        for listener in self.listeners:
            listener(record)
        return record

    def _catch_up(self) -> None:
        """Append what is not in the file yet."""
        if self.path is None:
            return
        lines = "".join(json.dumps(record) + "\n" for record in self.records[self._in_file :]).encode()
        try:
            with self.path.open("ab") as file:
                file.write(lines)
        except OSError as error:
            with contextlib.suppress(OSError):  # half a line would spoil the file for readers
                os.truncate(self.path, min(self._bytes, self.path.stat().st_size))
            if not self._told:
                self._told = True
                fault = storage_fault(error) or error.strerror
                warnings.warn(
                    f"{self.path}: {fault}. The run goes on, its history in memory until the file can be written to",
                    AdaLoraWarning,
                    stacklevel=2,
                )
        else:
            self._in_file, self._bytes = len(self.records), self._bytes + len(lines)

    def restore(self, records: list[Record]) -> None:
        """Go on from the records of an interrupted run: they replace those held, in the file too."""
        self.records = [dict(record) for record in records]
        self._started = time.monotonic() - max((r.get("seconds") or 0.0 for r in records), default=0.0)
        if self.path is not None:
            self.write_to(self.path)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since this history was made."""
        return time.monotonic() - self._started

    def of(self, event: str) -> list[Record]:
        """All records of one event, oldest first."""
        return [r for r in self.records if r["event"] == event]

    def last(self, event: str) -> Record | None:
        """The newest record of one event, or None."""
        return next((r for r in reversed(self.records) if r["event"] == event), None)

    def to_frame(self, name: str = "steps") -> pd.DataFrame:
        """One part of the history as a pandas frame.

        Args:
            name: `steps` (budget, live, loss, … by step), `allocations`, `ranks` and `module_scores` (a column per
                module), `modules` (a row per module), or `metrics`.

        Raises:
            HistoryError: No such part, or the history has no `start` record.
        """
        from adalora.report.frames import frame_of  # pandas only where a frame is wanted

        return frame_of(self, name)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> History:
        """Read a `history.jsonl`, or the one in a run's folder.

        A last line cut off by a killed process is dropped; any other malformed line is an error.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: A line is not JSON; the message names file and line.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "history.jsonl"
        history = cls()
        lines = file.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                history.records.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number == len(lines):  # no newline after it: the writer was killed in the middle
                    break
                raise ValueError(f"{file}:{number}: not a JSON record ({error.msg})") from error
        return history
