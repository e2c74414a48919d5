"""Which runs a report is about: folders, history files or histories, each with a name of its own."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from adalora.errors import HistoryError
from adalora.report.frames import start_of
from adalora.report.history import History

Source: TypeAlias = History | str | os.PathLike[str]


@dataclass(frozen=True)
class NamedRun:
    """A history and the name that the report shows for it."""

    name: str
    history: History


def load_runs(runs: Source | Iterable[Source], *, names: Sequence[str] | None = None) -> list[NamedRun]:
    """Read runs and give each a short unique name.

    Args:
        runs: One run or several: a `History`, a run's folder, or a `history.jsonl`.
        names: A name per run; by default its folder's.

    Returns:
        At least one run, in the given order.

    Raises:
        HistoryError: There is no run, a file is missing or malformed, or a history has no `start` record.
    """
    sources: list[Source] = [runs] if isinstance(runs, History | str | os.PathLike) else list(runs)
    if not sources:
        raise HistoryError("no run given: name at least one run folder or history.jsonl")
    histories = [source if isinstance(source, History) else read_history(source) for source in sources]
    for history in histories:
        start_of(history)
    given = [_name(source, at) for at, source in enumerate(sources)] if names is None else list(names)
    if len(given) != len(sources):
        raise HistoryError(f"{len(given)} names for {len(sources)} runs: give one name per run")
    seen: Counter[str] = Counter()
    named = []
    for name, history in zip(given, histories):
        seen[name] += 1
        named.append(NamedRun(f"{name} ({seen[name]})" if seen[name] > 1 else name, history))
    return named


def folder_of(sources: Sequence[Source]) -> Path:
    """Folder of the first run's history.

    Raises:
        HistoryError: There is no run, or the first one is in memory only.
    """
    if not sources:
        raise HistoryError("no run given: name at least one run folder or history.jsonl")
    first = sources[0]
    path = first.path if isinstance(first, History) else Path(first)
    if path is None:
        raise HistoryError('this history is in memory only: say where to write, e.g. out="report.html"')
    return path.parent if path.suffix == ".jsonl" else path


def write_atomically(path: Path, text: str) -> None:
    """Write a text file in one go, so that no reader sees half of it; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_history(source: str | os.PathLike[str]) -> History:
    """`History.read` with an error that names the file and what is expected.

    Raises:
        HistoryError: The file is missing or malformed.
    """
    try:
        history = History.read(source)
    except FileNotFoundError:
        raise HistoryError(
            f"no history at {os.fspath(source)!r}: give a run's folder that holds history.jsonl, or that file"
        ) from None
    except (ValueError, OSError) as error:
        raise HistoryError(str(error)) from error
    bad = next((i for i, r in enumerate(history.records) if not isinstance(r, dict) or "event" not in r), None)
    if bad is not None:
        raise HistoryError(f"{os.fspath(source)}: record {bad + 1} is not an object with `event`")
    return history


def _name(source: Source, at: int) -> str:
    path = source.path if isinstance(source, History) else Path(source)
    if path is None:
        return f"run {at + 1}"
    path = path.resolve()
    return path.parent.name if path.suffix == ".jsonl" else path.name
