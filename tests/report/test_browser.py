"""The report as a person meets it: in headless Chromium, by mouse and by keyboard, wide, narrow and dark."""

import time

import pandas as pd
import pytest
from browser import chromium, resize, scheme

from adalora.report.diagnostics import diagnose
from adalora.report.frames import modules_frame, ranks_frame
from adalora.report.history import History
from adalora.report.html import build_report
from adalora.report.tables import csv_frames
from helpers.synthetic import LLAMA, run

LISTED = "return [...document.querySelectorAll('{}')].map(e => {})"
CELLS = "[...e.cells].map(c => c.textContent)"
HEAT = LISTED.format("#r0 [data-slider] tbody td[data-m]", "[e.title, +e.textContent]")
FOOT = LISTED.format("#r0 [data-slider] tfoot td", "+e.textContent.replace(',', '')")
TABLE = LISTED.format("#r0 .sortable tbody tr", CELLS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def page(folder):
    with chromium(folder / "profile", downloads=folder) as page:
        yield page


@pytest.fixture(scope="module")
def history(folder):
    run(path=folder / "run" / "history.jsonl", layers=6)
    return History.read(folder / "run")


@pytest.fixture(scope="module")
def one(folder, history):
    assert history
    return build_report(folder / "run", folder / "one.html")


@pytest.fixture(scope="module")
def three(folder):
    bad = run(layers=6, final=0.04, dead_modules=(3, 9))
    names = ["a_rather_long_name_of_a_run-learning_rate-1e-3", "b", "c"]
    return build_report([bad, run(seed=1), run(seed=2)], folder / "three.html", names=names)


def show(page, path, *, width=1280, colours="light"):
    resize(page, width)
    scheme(page, colours)
    page.get(path.as_uri())


def complaints(page):
    return [entry for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 375, 1280])
def test_no_complaint_no_network_and_no_sideways_scrolling(page, one, three, width, colours):
    for path in (one, three):
        show(page, path, width=width, colours=colours)
        assert complaints(page) == []
        assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
        assert page.execute_script("return document.documentElement.scrollWidth") <= width


def test_heatmap_holds_the_ranks_of_the_history(page, one, history):
    show(page, one)
    ranks = dict(zip([m["name"] for m in history.last("start")["modules"]], history.last("finish")["ranks"]))
    assert dict(page.execute_script(HEAT)) == ranks
    modules = modules_frame(history)
    assert page.execute_script(FOOT) == [
        *modules.groupby("type", sort=False)["rank"].sum(),
        sum(ranks.values()),
    ]


def test_module_table_holds_the_numbers_of_the_history(page, one, history):
    show(page, one)
    shown = pd.DataFrame(page.execute_script(TABLE)).set_index(10)
    modules = modules_frame(history).set_index("module")
    assert shown[2].astype(int).to_dict() == modules["rank"].to_dict()
    assert shown[8].str.replace(",", "").astype(int).to_dict() == modules["parameters"].to_dict()
    assert shown[5].astype(float).to_numpy() == pytest.approx(modules.loc[shown.index, "score"].to_numpy(), rel=1e-3)


def test_tiles_hold_the_numbers_of_the_history(page, one, history):
    show(page, one)
    tiles = dict(page.execute_script(
        "return [...document.querySelectorAll('.tiles div')].map(d => [d.querySelector('dt').textContent,"
        " d.querySelector('b').textContent])"
    ))  # fmt: skip
    done = history.last("compaction")
    assert tiles["Rank, all modules"] == f"{sum(done['ranks']):,}"
    assert tiles["Adapter parameters"] == f"{done['parameters_after']:,}"
    assert tiles["Adapter bytes"] == f"{done['bytes_after']:,}"
    assert tiles["accuracy (dev)"] == f"{history.last('metric')['values']['accuracy']:.4g}"


def test_numbers_beside_the_plots(page, one, history):
    show(page, one)
    rows = page.execute_script(LISTED.format("#r0-churn tbody tr", CELLS))
    by_step = {r["step"]: r for r in history.of("allocation")}
    assert len(rows) == 24
    for step, budget, live, pruned, revived in rows:
        record = by_step[int(step)]
        assert [int(budget), int(live), int(pruned), int(revived)] == [
            record[k] for k in ("budget", "live", "pruned", "revived")
        ]


def test_findings_are_those_of_the_diagnostics(page, three):
    show(page, three)
    cards = page.execute_script(LISTED.format("#r0 .finding", "e.innerText"))
    found = diagnose(run(layers=6, final=0.04, dead_modules=(3, 9)))
    assert len(cards) == len(found) == 2
    for card, finding in zip(cards, found):
        assert finding["code"] in card
        assert finding["message"][1:] in card
        assert finding["cure"] in card
    assert page.execute_script(LISTED.format("#r1 .finding", "e.innerText")) == []


def test_the_slider_by_keyboard_shows_earlier_ranks(page, one, history):
    from selenium.webdriver.common.keys import Keys

    show(page, one)
    slider = page.find_element("id", "r0-time-slider")
    slider.send_keys(Keys.HOME)
    assert {rank for _, rank in page.execute_script(HEAT)} == {12}
    slider.send_keys(Keys.ARROW_RIGHT * 12)
    step = int(page.find_element("css selector", "#r0 output").text)
    assert [rank for _, rank in page.execute_script(HEAT)] == ranks_frame(history).loc[step].tolist()
    assert page.execute_script(FOOT)[-1] == ranks_frame(history).loc[step].sum()


def test_sorting_by_keyboard(page, one):
    from selenium.webdriver.common.keys import Keys

    show(page, one)
    head = page.find_element("css selector", "#r0 .sortable th:nth-child(3)")
    head.find_element("tag name", "button").send_keys(Keys.ENTER)
    ranks = [int(row[2]) for row in page.execute_script(TABLE)]
    assert ranks == sorted(ranks, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    head.find_element("tag name", "button").send_keys(Keys.SPACE)
    ranks = [int(row[2]) for row in page.execute_script(TABLE)]
    assert ranks == sorted(ranks)
    page.find_element("css selector", "#r0 .sortable th:nth-child(2) button").click()
    types = [row[1] for row in page.execute_script(TABLE)]
    assert types == sorted(types)
    assert head.get_attribute("aria-sort") == "none"
    page.find_element("css selector", "#r0 .sortable th:nth-child(1) button").click()
    assert [row[0] for row in page.execute_script(TABLE)] == sorted(str(i) for i in range(6) for _ in range(6))


def test_filter(page, one):
    show(page, one)
    page.find_element("id", "r0-filter").send_keys("layer.3 key")
    shown = page.execute_script("return [...document.querySelectorAll('#r0 .sortable tbody tr:not([hidden])')].length")
    assert shown == 1
    assert page.find_element("css selector", "[data-count]").text == "1 of 36 modules"


def test_csv_is_the_frame(page, one, history, folder):
    show(page, one)
    for name, frame in csv_frames(history).items():
        page.find_element("css selector", f'[data-csv="r0-csv-{name}"]').click()
        file = folder / f"run-{name}.csv"
        end = time.monotonic() + 10
        while not file.exists() and time.monotonic() < end:
            time.sleep(0.05)
        back = pd.read_csv(file, index_col=0)
        assert back.shape == frame.shape
        numbers = frame.select_dtypes("number").astype(float)
        expected = back[numbers.columns].astype(float).to_numpy()
        assert expected == pytest.approx(numbers.to_numpy(), rel=1e-5, nan_ok=True)
    assert complaints(page) == []


def test_everything_that_scrolls_or_acts_can_be_reached_by_keyboard(page, one):
    show(page, one)
    assert page.execute_script("return [...document.querySelectorAll('.scroll')].every(e => e.tabIndex === 0)")
    assert page.execute_script(
        "return [...document.querySelectorAll('svg')].every(e => e.getAttribute('role') === 'img'"
        " && e.getAttribute('aria-label'))"
    )
    assert page.execute_script(
        "return [...document.querySelectorAll('input')].every(e => document.querySelector(`label[for=\"${e.id}\"]`))"
    )


CONTRAST = """
const channel = (c) => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
const light = (s) => { const [r, g, b] = s.match(/[\\d.]+/g).map(Number).map(channel);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const back = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
  if (!c.startsWith("rgba(0, 0, 0, 0")) return c; } return "rgb(255, 255, 255)"; };
const bad = [];
for (const e of document.querySelectorAll("h1,h2,h3,h4,p,li,dt,b,small,th,td,button,summary,svg text")) {
  if (!e.textContent.trim() || !e.checkVisibility()) continue;
  const style = getComputedStyle(e), ink = e instanceof SVGElement ? style.fill : style.color;
  const [a, b] = [light(ink), light(back(e))].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) bad.push([e.textContent.slice(0, 30), ink, back(e), ratio]);
}
return bad;
"""


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_text_can_be_read(page, three, colours):
    show(page, three, colours=colours)
    assert page.execute_script(CONTRAST) == []


def test_dark_is_dark(page, one):
    show(page, one, colours="dark")
    assert page.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)"


def test_a_very_large_run_is_small(page, folder):
    history = run(layers=100, types=LLAMA, steps=10_000, interval=40, prefix="base_model.model.model.layers")
    assert (len(history.last("start")["modules"]), len(history.of("step"))) == (700, 10_000)
    path = build_report(history, folder / "large.html")
    assert path.stat().st_size < 5_000_000
    show(page, path)
    assert complaints(page) == []
    # What its opening takes, about a second, goes by these; 13,600 today, most of them the heat map's and the table's.
    assert page.execute_script("return document.getElementsByTagName('*').length") < 20_000
    assert sum(rank for _, rank in page.execute_script(HEAT)) == 5600
