"""The figures show the numbers of the history, in the caller's axes or their own, without touching pyplot."""

import sys

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

import adalora.report
from adalora.errors import HistoryError
from adalora.report import figures
from adalora.report.frames import steps_frame, thin
from adalora.report.style import DASHES, SERIES, to_svg
from helpers.synthetic import run

ON_AXES = [
    "plot_ranks",
    "plot_budget",
    "plot_loss",
    "plot_metrics",
    "plot_scores",
    "plot_score_quantiles",
    "plot_churn",
    "plot_orthogonality",
]
OWN_FIGURE = ["plot_ranks_over_time", "plot_singular_values"]


@pytest.fixture(scope="module")
def history():
    return run(layers=4)


@pytest.mark.parametrize("name", ON_AXES + OWN_FIGURE)
@pytest.mark.parametrize("stop_at", [0, 30, 400])
def test_every_figure_at_every_stage(name, stop_at):
    figure = getattr(figures, name)(run(layers=2, stop_at=stop_at))
    assert isinstance(figure, Figure)
    assert "<svg" in to_svg(figure, label=name, key="k")


@pytest.mark.parametrize("name", ON_AXES)
def test_draws_on_the_axes_it_is_given(history, name):
    ax = Figure().subplots()
    assert getattr(figures, name)(history, ax=ax) is ax.figure
    assert ax.has_data()


def test_settings_of_the_caller_stay(history):
    before = dict(mpl.rcParams)
    figures.plot_ranks(history)
    assert dict(mpl.rcParams) == before


def lines(figure):
    return {line.get_label(): line.get_xydata() for line in figure.axes[0].get_lines()}


def test_budget_and_live(history):
    drawn, records = lines(figures.plot_budget(history)), history.of("step")
    assert drawn["budget"].tolist() == [[r["step"], r["budget"]] for r in records]
    assert drawn["live"].tolist() == [[r["step"], r["live"]] for r in records]


def test_ranks(history):
    image = figures.plot_ranks(history).axes[0].get_images()[0]
    assert image.get_array().ravel().tolist() == history.last("finish")["ranks"]
    assert image.get_cmap().name == "viridis"


def test_scores(history):
    figure = figures.plot_scores(history)
    record = history.of("allocation")[-1]
    assert figure.axes[0].patches[0].get_data().values.tolist() == record["scores"]["histogram"]
    threshold = next(xy for label, xy in lines(figure).items() if str(label).startswith("threshold"))
    assert threshold[0][0] == record["threshold"]


def test_churn_and_metrics(history):
    drawn = lines(figures.plot_churn(history))
    assert drawn["revived"][:, 1].tolist() == [r["revived"] for r in history.of("allocation")]
    drawn = lines(figures.plot_metrics(history))
    assert drawn["accuracy (dev)"][:, 1].tolist() == [r["values"]["accuracy"] for r in history.of("metric")]


def test_a_spike_does_not_flatten_the_loss(history):
    spiked = run(layers=4)
    spiked.of("step")[200]["loss"] = 1e4
    assert figures.plot_loss(spiked).axes[0].get_ylim()[1] < 2


def test_thinning_keeps_both_ends(history):
    frame = steps_frame(history)
    assert thin(frame, 7).index[[0, -1]].tolist() == [0, 399]
    assert len(thin(frame, 7)) == 7
    assert thin(frame, 10_000) is frame


def test_colours_become_the_pages(history):
    svg = to_svg(figures.plot_loss(history), label='a "b" <c>', key="k")
    assert "var(--s0)" in svg
    assert "var(--ink)" in svg
    assert not any(colour in svg for colour in SERIES)
    assert 'aria-label="a &quot;b&quot; &lt;c>"' in svg


def test_colours_keep_their_distance_for_the_colour_blind():
    """Lightness alone (CIE L*) tells the series that share a chart apart, or their dashes do."""

    def lightness(colour):
        c = np.array(mpl.colors.to_rgb(colour))
        c = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return 116 * np.cbrt(c @ [0.2126, 0.7152, 0.0722]) - 16

    assert abs(lightness(SERIES[0]) - lightness(SERIES[1])) > 8
    assert len({str(d) for d in DASHES}) == len(SERIES)


def test_the_module_can_be_called(tmp_path):
    history = run(path=tmp_path / "night" / "history.jsonl", layers=1, steps=60)
    assert adalora.report(history) == tmp_path / "night" / "report.html"
    assert adalora.report(tmp_path / "night", out=tmp_path / "x.html") == tmp_path / "x.html"
    assert adalora.report.write is sys.modules["adalora.report"].write
    with pytest.raises(HistoryError, match="in memory only"):
        adalora.report(run(stop_at=0))
