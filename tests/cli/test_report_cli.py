"""`adalora report`: files, messages, exit codes."""

import sys

import pandas as pd
import pytest

from adalora import cli
from helpers.synthetic import run


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command line in this process; returns exit code, stdout, stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["adalora", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        output = capsys.readouterr()
        return end.value.code, output.out, output.err

    return call


@pytest.fixture
def runs(tmp_path):
    for seed in (0, 1):
        run(path=tmp_path / f"seed{seed}" / "history.jsonl", layers=2, steps=100, seed=seed)
    return tmp_path


def test_report_goes_beside_the_history(call, runs):
    code, out, _ = call("report", runs / "seed0")
    assert code == 0
    assert out.strip() == f"report: {runs / 'seed0' / 'report.html'}"
    assert (runs / "seed0" / "report.html").stat().st_size > 100_000


def test_several_runs_and_a_file(call, runs):
    code, _, _ = call("report", runs / "seed0", runs / "seed1" / "history.jsonl", "--out", runs / "new" / "r.html")
    assert code == 0
    html = (runs / "new" / "r.html").read_text()
    assert "2 runs compared" in html
    assert '<h2 id="r1-title">seed1</h2>' in html


def test_csv(call, runs):
    code, out, _ = call("report", runs / "seed0", "--csv", runs / "csv")
    assert code == 0
    assert "seed0-modules.csv" in out
    frame = pd.read_csv(runs / "csv" / "seed0-modules.csv")
    assert frame["rank"].sum() == 12 * 8


def test_no_history(call, tmp_path):
    code, _, err = call("report", tmp_path)
    assert code == 2
    assert err.startswith("error: no history at ")


def test_watch_once(call, runs):
    code, out, _ = call("watch", runs / "seed0", "--once")
    assert code == 0
    assert out.startswith("step 100/100 | finished | budget 96 | live 96 | loss ")
    assert len(out.splitlines()) == 1


def test_watch_once_without_a_run(call, tmp_path):
    code, _, err = call("watch", tmp_path, "--once")
    assert code == 2
    assert err.startswith("error: no run at ")
