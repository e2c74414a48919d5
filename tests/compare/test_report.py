"""Tables and pages from rows whose outcome is known."""

import dataclasses
import io
import re

import pytest
from rich.console import Console

from adalora.compare.cells import RESULTS, Results, cells_of_rate, dev_cells, groups
from adalora.compare.plots import plot_all_curves, plot_curves, plot_differences, plot_rates
from adalora.compare.report import html, markdown, write_report
from adalora.compare.stability import dev_drop, loss_variance, stability
from adalora.compare.suite import Rate
from adalora.compare.summary import summarize
from adalora.compare.tables import overall, pace, rich_tables, sentences

SCORES = {"lora": 0.70, "ours": 0.75, "rslora": 0.70, "head": 0.5}


@pytest.fixture
def summary(make_suite, tmp_path):
    suite = make_suite(methods=list(SCORES), learning_rates=[0.1, 0.01], seeds=[1, 2, 3, 4, 5], budgets=[2, 4])
    results = Results(tmp_path / RESULTS)
    for group in groups(suite):
        for cell in [*dev_cells(suite, *group), *cells_of_rate(suite, *group, rate=Rate(0.01))]:
            wobble = 0.01 * cell.seed + (0.004 * (-1) ** cell.seed if cell.method != "lora" else 0)
            score = SCORES[cell.method] + wobble - (0.1 if cell.rate.learning_rate == 0.1 else 0)
            row = {"key": cell.key, "status": "ok", "metric": "accuracy", "score": score, "seconds": 3.0}
            slower = 10 if cell.method == "ours" else 20
            curve = [[slower, score - 0.01], [2 * slower, score], [40, score]]
            row |= {"parameters": 1000 * cell.budget, "loss_curve": [[1, 2.0], [2, 1.0]], "dev_curve": curve}
            row |= {
                "learning_rate": cell.rate.learning_rate,
                "seed": cell.seed,
                "machine": "m",
                "versions": {"torch": "x"},
            }
            results.add(row)
    return summarize(suite, results)


def test_rows_say_better_worse_and_no_difference(summary):
    by = {(line.method, line.budget): line for line in summary.lines}
    assert by["ours", 2].comparison.difference.mean == pytest.approx(0.05, abs=0.002)
    assert by["ours", 2].comparison.difference.verdict == "better"
    assert by["rslora", 4].comparison.difference.verdict == "no difference shown"
    assert by["head", 0].comparison.difference.verdict == "worse"
    assert by["lora", 2].comparison is None
    assert by["lora", 2].rate == Rate(0.01)
    assert by["ours", 2].comparison.corrected > by["ours", 2].comparison.p_value
    assert summary.overall["ours"][1] == 2
    assert summary.overall["ours"][0].verdict == "better"
    assert summary.overall["ours"][0].mean == pytest.approx(100 * 0.05 / 0.73, abs=0.3)  # percent of the score
    assert any("rslora" in text and "no difference shown" in text for text in sentences(summary))


def test_rates_of_the_head_are_curves_of_their_own(summary):
    line = next(line for line in summary.lines if line.method == "lora" and line.budget == 2)
    line.dev.extend([row | {"head_learning_rate": 0.3, "score": 1.0} for row in line.dev])
    (axes,) = plot_rates(summary, "moods", 2).axes
    curves = {curve.get_label(): curve for curve in axes.get_lines()}
    assert {"lora", "lora, head 0.3", "ours"} <= set(curves)
    assert list(curves["lora, head 0.3"].get_ydata()) == [1.0, 1.0]
    assert list(curves["lora"].get_xdata()) == [0.01, 0.1]
    assert len({(curve.get_color(), curve.get_linestyle()) for curve in curves.values()}) == len(curves)


def test_differences_are_drawn_in_percent_with_every_seed(summary):
    figure = plot_differences(summary)
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["rank 2, ours", "rank 2, rslora", "head", "rank 4, ours", "rank 4, rslora"]
    lines = [line for line in summary.lines if line.comparison is not None]
    drawn = {len(found.get_xdata()): found.get_xdata() for found in axes.lines if set(found.get_ydata()) == {0}}
    first = lines[0].comparison.difference
    seeds, (low, high), (mean,) = (drawn[count] for count in (5, 2, 1))
    base = next(x for x in summary.lines if x.method == "lora" and x.budget == lines[0].budget)
    for seed, value in zip(sorted(base.tests), seeds):
        gap = lines[0].tests[seed]["score"] - base.tests[seed]["score"]
        assert value == pytest.approx(100 * gap / base.mean())
    wanted = [100 * value / base.mean() for value in (first.low, first.mean, first.high)]
    assert [low, mean, high] == pytest.approx(wanted)


def test_curves_side_by_side_are_those_of_each_task_and_budget(summary):
    panels = [axes for axes in plot_all_curves(summary).axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left").partition(", ")[2] for axes in panels] == ["rank 2", "rank 4"]
    for axes, budget in zip(panels, (2, 4)):
        (single,) = plot_curves(summary, summary.lines[0].task, budget).axes
        for one, other in zip(axes.lines, single.lines, strict=True):
            assert one.get_label() == other.get_label()
            assert one.get_xydata().tolist() == other.get_xydata().tolist()


def test_pace_counts_steps_to_the_baselines_last_score(summary):
    by = {(line.method, line.budget): line for line in summary.lines}
    assert by["ours", 2].pace == [(10, 40)] * 5
    assert pace(by["ours", 2]) == "10 / 40"
    assert by["head", 0].pace == [(None, 40)] * 5
    assert pace(by["head", 0]) == "not reached / 40"
    assert pace(dataclasses.replace(by["ours", 2], pace=[(10, 40), (30, 40), (None, 40)])) == "30 / 40 (2 of 3 seeds)"
    assert pace(by["lora", 2]) == ""
    assert {row[0]: row[-1] for row in overall(summary)} == {
        "ours": "10 of 10 (72% to 100%)",
        "rslora": "4 of 10 (17% to 69%)",
        "head": "0 of 5 (0% to 43%)",
    }


def test_stability_counts_jumps_and_not_the_trend(summary):
    falling = [[n, 10.0 - 0.1 * n] for n in range(20)]
    jumping = [[n, loss + (-1) ** n] for n, loss in falling]
    assert loss_variance({"loss_curve": falling}) == pytest.approx(0.1**2 / 2)
    assert loss_variance({"loss_curve": jumping}) > 1.0  # the jumps' own variance is 1; successive ones are opposed
    assert loss_variance({"loss_curve": falling[:2]}) is loss_variance({}) is None
    curve = [[1, 0.5], [2, 0.7], [3, 0.6], [4, 0.8]]
    assert dev_drop({"dev_curve": curve}, 1) == pytest.approx(0.1 / 3)
    assert dev_drop({"dev_curve": curve}, -1) == pytest.approx(0.4 / 3)
    assert dev_drop({"dev_curve": curve[:1]}, 1) is None
    titles, tables = zip(*stability(summary))
    assert titles == ("moods, target rank 2", "moods", "moods, target rank 4")  # head has no size
    assert [row[0] for row in tables[0]] == ["lora", "ours", "rslora"]
    assert "Stability on moods, target rank 2" in markdown(summary)
    assert "Stability on moods, target rank 2" in html(summary)


def test_allocations_are_told_of_methods_that_have_them(summary):
    line = next(line for line in summary.lines if line.method == "ours")
    rows = {seed: {**row, "pruned": 40, "revived": 3, "ranks": {"a": seed, "b": 0}} for seed, row in line.tests.items()}
    changed = dataclasses.replace(summary, lines=[dataclasses.replace(line, tests=rows)])
    assert stability(changed)[0][1][0][3:] == ["15 / 200", "0 to 5"]


def test_narrow_terminals_still_have_the_verdict(summary):
    stream = io.StringIO()
    for table in rich_tables(summary, wide=False):
        Console(file=stream, width=100).print(table)
    assert "verdict" in stream.getvalue()
    assert "no difference shown" in stream.getvalue()


def test_terminal_and_markdown_hold_every_method(summary):
    stream = io.StringIO()
    for table in rich_tables(summary):
        Console(file=stream, width=220).print(table)
    text, page = stream.getvalue(), markdown(summary)
    for method in SCORES:
        assert method in text
        assert f"| {method} |" in page
    assert "5–0" in page
    assert "target rank 2: accuracy (higher is better)" in page


def test_html_stands_alone_and_has_its_figures(summary, tmp_path):
    page = html(summary)
    assert page.count("<svg") == 6  # differences, parameters, and two for each of two budgets
    assert not re.search(r'(src|href)="(https?:)?//', page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {f"--s{n}:" in page for n in range(6)} == {True}
    assert {path.name for path in write_report(summary, tmp_path / "r")} == {"report.md", "report.html"}


def test_report_of_nothing_says_so(make_suite, tmp_path):
    empty = summarize(make_suite(), Results(tmp_path / "none.jsonl"))
    assert "no score yet" in markdown(empty)
    assert "<svg" in html(empty)
