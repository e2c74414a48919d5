"""The page itself: one self-contained HTML file for one run or several side by side."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from adalora.report.html.context import compared_context, run_context
from adalora.report.runs import NamedRun, Source, load_runs, write_atomically
from adalora.report.style import rank_classes
from adalora.version import __version__

_ASSETS = resources.files("adalora.report.html") / "assets"


def build_report(
    runs: Source | Iterable[Source], out: str | os.PathLike[str], *, names: Sequence[str] | None = None
) -> Path:
    """Write the HTML report of one run, or of several side by side.

    The file holds everything it shows: no network, no second file. Runs that are still training are fine.

    Args:
        runs: One run or several: a `History`, a run's folder, or a `history.jsonl`.
        out: File to write; its folder is made. Written in one go, so that no reader sees half of it.
        names: A name per run; by default its folder's.

    Returns:
        Path of the written file.

    Raises:
        HistoryError: A run has no readable history.
    """
    html = render_report(load_runs(runs, names=names))
    path = Path(out)
    write_atomically(path, html)
    return path


def render_report(runs: list[NamedRun]) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = number
    contexts = [run_context(run, key=f"r{i}") for i, run in enumerate(runs)]
    return environment.get_template("report.html.j2").render(
        title=" · ".join(run.name for run in runs[:3]) + (" …" if len(runs) > 3 else ""),
        runs=contexts,
        compared=compared_context(runs, contexts) if len(runs) > 1 else None,
        css=Markup(_asset("report.css") + rank_classes()),
        js=Markup(_asset("report.js")),
        version=__version__,
    )


def number(value: Any) -> str:
    """A number as a person reads it: thousands apart, four significant digits, `–` where there is none."""
    if value is None or value != value:
        return "–"
    if isinstance(value, str):
        return value
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
