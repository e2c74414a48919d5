"""Puts the outcome of `adalora compare` into the repository: its rows, its tables into docs/results.md, its figures.

    python -m benchmarks.publish SUITE FOLDER

FOLDER is the suite's output folder. Only rows that the suite asks for are kept.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from adalora.compare.cells import RESULTS, Results, dev_cells, groups, picked_cells
from adalora.compare.files import load_suite
from adalora.compare.plots import plot_all_curves, plot_differences
from adalora.compare.report import markdown
from adalora.compare.suite import Rate, Suite
from adalora.compare.summary import Summary, summarize
from adalora.report.style import SERIES, STYLE
from benchmarks import pages

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"
FIGURES = ROOT / "docs" / "figures"


def wanted_rows(suite: Suite, results: Results) -> list[dict[str, object]]:
    """The rows of the suite's cells, in its order."""
    rows = []
    for group in groups(suite):
        cells = dev_cells(suite, *group) + picked_cells(suite, *group, results=results)
        # Another suite may have run the same cell under its own name.
        rows += [results.rows[cell.key] | {"method": cell.method} for cell in cells if cell.key in results.rows]
    return rows


def published(suite: Suite, path: Path) -> tuple[Suite, Results]:
    """A published file's rows under the keys that the suite's cells have today, and the suite's methods that it has.

    A key is made of every setting, so it changes when a default does; task, budget, method, rate, seed and stage stay.
    A method that was given another name since is found by its kind, where no other has it.
    """
    results, rows = Results(path), {}
    for row in results.rows.values():
        named = [m.name for m in suite.methods if m.name == row["method"]]
        (method,) = named or [m.name for m in suite.methods if m.kind == row["kind"]]
        rows[row["task"], row["budget"], method, Rate.of(row), row["seed"], row["stage"]] = row
    here = {method for _, _, method, *_ in rows}
    suite = suite.model_copy(update={"methods": [m for m in suite.methods if m.name in here]})
    results.rows = {}
    for cells in (dev_cells, partial(picked_cells, results=results)):
        for group in groups(suite):
            for c in cells(suite, *group):
                row = rows.get((c.task, c.budget, c.method, c.rate, c.seed, c.stage))
                results.rows |= {} if row is None else {c.key: row}
    return suite, results


def rendered(suite: Suite, results: Results) -> tuple[str, dict[str, Figure]]:
    """The suite's part of the page, without the two lines around it, and the figures that it shows."""
    summary = summarize(suite, results)
    drawn = figures(summary)
    tables = re.sub(r"^#", "##", markdown(summary), flags=re.MULTILINE)
    text = "\n".join(line for line in tables.splitlines() if not re.match(r"## \S+$", line)).strip()
    return f"{linked(suite, drawn)}\n\n{text}", drawn


def figures(summary: Summary) -> dict[str, Figure]:
    """The suite's figures by file name: differences, and learning curves if they can be told apart."""
    suite = summary.suite
    found = {f"{suite.name}-differences.svg": plot_differences(summary)}
    if len(suite.methods) <= len(SERIES):
        found[f"{suite.name}-curves.svg"] = plot_all_curves(summary)
    return found


def svg(figure: Figure, name: str) -> str:
    """A figure as its file has it: the same rows give the same text."""
    buffer = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def linked(suite: Suite, names: Iterable[str]) -> str:
    """The figures as the page shows them."""
    told = {
        "differences": "difference to the baseline, each seed and the mean with its interval",
        "curves": "dev score or training loss over the steps, means over the seeds",
    }
    return "\n".join(f"![{suite.name}: {told[Path(n).stem.rpartition('-')[2]]}](figures/{n})" for n in names)


def main() -> None:
    """Write `benchmarks/results/SUITE.jsonl`, the suite's part of the page, and its figures."""
    suite = load_suite(sys.argv[1], output=sys.argv[2])
    results = Results(suite.folder / RESULTS)
    start, end = pages.marks(suite.name)
    if start not in PAGE.read_text(encoding="utf-8"):
        raise SystemExit(f"{PAGE.name} has no place for {suite.name}: add the two lines {start} and {end}")
    lines = [json.dumps(row) + "\n" for row in wanted_rows(suite, results)]
    (ROOT / "benchmarks" / "results" / f"{suite.name}.jsonl").write_text("".join(lines), encoding="utf-8")
    text, drawn = rendered(suite, results)
    for name, figure in drawn.items():
        (FIGURES / name).write_text(svg(figure, name), encoding="utf-8")
    pages.put(PAGE, suite.name, text)
    print(f"{len(lines)} rows, {PAGE}")


if __name__ == "__main__":
    main()
