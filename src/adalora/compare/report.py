"""The report of a comparison as Markdown and as one HTML file that needs nothing else."""

from __future__ import annotations

from pathlib import Path

import jinja2

from adalora.compare.plots import plot_curves, plot_differences, plot_parameters, plot_rates
from adalora.compare.stability import STABILITY, stability
from adalora.compare.summary import Summary
from adalora.compare.tables import COLUMNS, OVERALL, overall, sentences, tables
from adalora.report.style import GRID, INK, MUTED, PHASES, SERIES, SURFACE, to_svg
from adalora.tasks.runs.outputs import write_text

NOTE = (
    "Differences are of test scores on the same seeds, better is positive, with {confidence:.0%} bootstrap intervals; "
    "P(better) is the chance that a run of the method beats one of {baseline}; p is of the paired t-test, corrected "
    "by Holm for all comparisons of this page; pace is the median number of steps until the dev score is what "
    "{baseline} ends with on that seed, and {baseline}'s own; of the runs of a method that is as good as {baseline} "
    "about half keep that pace, and beside their number is the interval of the share. Every learning rate was picked "
    "on the dev split with seeds {tuning}; the test split was touched once per seed ({seeds}). Parameters are those in "
    "use at the end, without a new head."
)
STABILITY_NOTE = (
    "Stability, means over the seeds: variance of the logged loss around its trend in the second half; mean loss of "
    "dev score from one evaluation to the next, rises counted as 0; triplets that came back of those pruned, and the "
    "smallest and largest rank of a module at the end, all seeds together."
)


def write_report(summary: Summary, folder: Path) -> list[Path]:
    """Write `report.md` and `report.html`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {"report.md": markdown(summary), "report.html": html(summary)}
    for name, text in made.items():
        write_text(folder / name, text)
    return [folder / name for name in made]


def note(summary: Summary) -> str:
    """How the figures came about."""
    suite = summary.suite
    text = f"{NOTE} {STABILITY_NOTE}" if stability(summary) else NOTE
    return text.format(
        confidence=suite.confidence,
        baseline=suite.baseline,
        tuning=", ".join(map(str, suite.tuning_seeds)),
        seeds=", ".join(map(str, suite.seeds)),
    )


def markdown(summary: Summary) -> str:
    """The report as Markdown."""
    parts = [f"# {summary.suite.name}", summary.suite.description, note(summary)]
    for title, rows in tables(summary):
        parts += [f"## {title}", _markdown_table(COLUMNS, rows)]
    if summary.overall:
        parts += [f"## Mean over tasks, against {summary.suite.baseline}", _markdown_table(OVERALL, overall(summary))]
    for title, rows in stability(summary):
        parts += [f"## Stability on {title}", _markdown_table(STABILITY, rows)]
    parts += ["\n".join(f"- {sentence}" for sentence in sentences(summary))]
    parts += ["\n".join(f"- {text}" for text in summary.environments)]
    return "\n\n".join(part for part in parts if part) + "\n"


def html(summary: Summary) -> str:
    """The report as one HTML page with its figures inside."""
    found = list(tables(summary))
    figures = []
    if any(line.comparison is not None for line in summary.lines):
        figures.append((f"Difference to {summary.suite.baseline}", plot_differences(summary)))
    for task in dict.fromkeys(line.task for line in summary.lines):
        budgets = list(dict.fromkeys(x.budget for x in summary.lines if x.task == task and x.budget)) or [0]
        figures.append((f"{task}: score against parameters", plot_parameters(summary, task)))
        for budget in budgets:
            figures.append((f"{task}: learning curves, rank {budget}", plot_curves(summary, task, budget)))
            figures.append((f"{task}: score against learning rate, rank {budget}", plot_rates(summary, task, budget)))
    loader = jinja2.PackageLoader("adalora.compare", "templates")
    page = jinja2.Environment(loader=loader, autoescape=True).get_template("report.html.j2")
    return page.render(
        suite=summary.suite,
        note=note(summary),
        columns=COLUMNS,
        tables=found,
        overall_columns=OVERALL,
        overall=overall(summary),
        stability_columns=STABILITY,
        stability=stability(summary),
        sentences=sentences(summary),
        figures=[to_svg(figure, label=label, key=f"f{number}") for number, (label, figure) in enumerate(figures)],
        palette=palette(),
        environments=summary.environments,
    )


def palette() -> str:
    """The CSS variables that the figures' colours refer to."""
    colours = {f"s{n}": colour for n, colour in enumerate(SERIES)} | {f"phase{n}": c for n, c in enumerate(PHASES)}
    colours |= {"ink": INK, "muted": MUTED, "grid": GRID, "surface": SURFACE}
    return ":root{" + "".join(f"--{name}:{colour};" for name, colour in colours.items()) + "}"


def _markdown_table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
