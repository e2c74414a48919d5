"""The report's file: what is in it without a browser."""

import os
import re

import pytest

from adalora.errors import HistoryError
from adalora.report.html import build_report
from adalora.report.html.page import number
from adalora.report.style import SHADES, rank_classes, shade
from helpers.synthetic import LLAMA, run


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "night"
    run(path=folder / "history.jsonl", layers=3, steps=200)
    return build_report(folder, folder / "out" / "report.html")


def test_it_is_named_after_the_folder_and_self_contained(written):
    html = written.read_text()
    assert '<h2 id="r0-title">night</h2>' in html
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', html)
    assert "url(http" not in html
    assert re.findall(r"https?://[^\"'< ]+", html) == [] or all(
        u.startswith("http://www.w3.org/") for u in re.findall(r"https?://[^\"'< ]+", html)
    )


def test_ids_are_unique(written):
    ids = re.findall(r'\bid="([^"]+)"', written.read_text())
    assert len(ids) == len(set(ids))


def test_ids_are_unique_with_several_runs(tmp_path):
    path = build_report([run(layers=2, steps=100, seed=s) for s in range(2)], tmp_path / "r.html")
    ids = re.findall(r'\bid="([^"]+)"', path.read_text())
    assert len(ids) == len(set(ids))


def test_every_reference_to_an_id_has_one(written):
    html = written.read_text()
    ids = set(re.findall(r'\bid="([^"]+)"', html))
    assert set(re.findall(r'href="#([^"]+)"', html)) | set(re.findall(r"url\(#([^)]+)\)", html)) <= ids


def test_same_history_same_bytes(tmp_path):
    history = run(layers=2, steps=100)
    first = build_report(history, tmp_path / "a.html").read_bytes()
    assert build_report(history, tmp_path / "b.html").read_bytes() == first


def test_only_the_report_is_left_in_the_folder(written):
    assert os.listdir(written.parent) == ["report.html"]


def test_text_from_the_history_is_escaped(tmp_path):
    history = run(layers=1, steps=60, model="<script>alert(1)</script>")
    history.add("diagnostic", step=1, code="x", message="<b>bold</b>", cure="</p>")
    html = build_report(history, tmp_path / "r.html", names=["a<b"]).read_text()
    assert "<script>alert" not in html
    assert "<b>bold</b>" not in html
    assert "a&lt;b" in html


@pytest.mark.parametrize("stop_at", [0, 1, 30, 100])
def test_a_run_that_is_still_going(tmp_path, stop_at):
    html = build_report(run(layers=2, steps=200, stop_at=stop_at), tmp_path / "r.html").read_text()
    assert "The run is not finished" in html


def test_one_module_and_rank_one(tmp_path):
    history = run(layers=1, types={"q_proj": LLAMA["self_attn.q_proj"]}, rank=2, target=1, steps=50)
    assert "1 modules" in build_report(history, tmp_path / "r.html").read_text()


def test_all_ranks_zero(tmp_path):
    html = build_report(run(layers=2, steps=100, target=0.1), tmp_path / "r.html").read_text()
    assert "11 modules need no rank at all" in html


def test_records_without_scores(tmp_path):
    history = run(layers=1, steps=100)
    for record in history.of("allocation"):
        record["scores"] = record["threshold"] = None
        record["module_scores"] = [None] * 6
    assert build_report(history, tmp_path / "r.html").stat().st_size > 50_000


def test_missing_folder(tmp_path):
    with pytest.raises(HistoryError, match=r"no history at .*nowhere.*history.jsonl"):
        build_report(tmp_path / "nowhere", tmp_path / "r.html")


def test_no_runs(tmp_path):
    with pytest.raises(HistoryError, match="no run given"):
        build_report([], tmp_path / "r.html")


def test_malformed_line(tmp_path):
    file = tmp_path / "history.jsonl"
    file.write_text('{"event": "start"\n{"event": "step"}\n')
    with pytest.raises(HistoryError, match=r"history.jsonl:1: not a JSON record"):
        build_report(tmp_path, tmp_path / "r.html")


def test_a_json_line_that_is_no_record(tmp_path):
    (tmp_path / "history.jsonl").write_text("[1, 2]\n")
    with pytest.raises(HistoryError, match="record 1 is not an object with `event`"):
        build_report(tmp_path, tmp_path / "r.html")


def test_colours_of_ranks():
    assert (shade(0, 12), shade(12, 12), shade(6, 12), shade(3, 0)) == (0, SHADES, SHADES // 2, 0)
    rules = re.findall(r"background:#(..)(..)(..);color:#(fff|000)}", rank_classes())
    assert len(rules) == SHADES + 1
    for *channels, text in rules:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (int(x, 16) / 255 for x in channels)
        ]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        contrast = 1.05 / (luminance + 0.05) if text == "fff" else (luminance + 0.05) / 0.05
        assert contrast >= 4.5  # WCAG AA


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (2.0, "2"),
        ("warmup", "warmup"),
    ],
)
def test_number(value, text):
    assert number(value) == text
