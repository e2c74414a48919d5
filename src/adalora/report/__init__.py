"""What a run did: its history, the HTML report, diagnostics.

The module can be called: `adalora.report(run)` writes the HTML report.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from adalora.report.history import History

__all__ = ["History", "write"]


def write(
    runs: History | str | os.PathLike[str] | Iterable[History | str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
) -> Path:
    """Write one self-contained HTML report of one run, or of several side by side.

    Args:
        runs: One run or several: a `History`, a run's folder, or a `history.jsonl`.
        out: File to write; by default `report.html` beside the (first) run's history.

    Returns:
        Path of the written file.

    Raises:
        HistoryError: A run has no readable history, or a history in memory is given without `out`.
    """
    from adalora.report.html import build_report  # matplotlib and pandas only where a report is wanted
    from adalora.report.runs import folder_of

    sources = [runs] if isinstance(runs, History | str | os.PathLike) else list(runs)
    return build_report(sources, folder_of(sources) / "report.html" if out is None else out)


class _CallableModule(ModuleType):
    def __call__(
        self,
        runs: History | str | os.PathLike[str] | Iterable[History | str | os.PathLike[str]],
        out: str | os.PathLike[str] | None = None,
    ) -> Path:
        return write(runs, out)


sys.modules[__name__].__class__ = _CallableModule
