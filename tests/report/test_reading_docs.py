"""docs/reading-the-report.md: its Python runs, and it names every diagnostic and limit with its default."""

import re
from pathlib import Path

import matplotlib as mpl

from adalora.report.thresholds import CODES, DiagnosticThresholds
from helpers.synthetic import run

DOC = Path(__file__).parents[2] / "docs" / "reading-the-report.md"


def test_the_notebook_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")
    run(path="runs/demo/history.jsonl", layers=2, steps=100, final=0.04)
    (block,) = re.findall(r"```python\n(.*?)```", DOC.read_text(), flags=re.S)
    exec(compile(block, str(DOC), "exec"), {})
    assert "final-phase-too-short" in capsys.readouterr().out
    assert (tmp_path / "report.html").stat().st_size > 100_000


def test_every_diagnostic_and_limit_is_listed():
    rows = {row.split("`")[1]: row for row in DOC.read_text().splitlines() if row.startswith("| `")}
    assert list(rows) == list(CODES)
    for name, field in DiagnosticThresholds.model_fields.items():
        if name != "ignore":
            found = re.findall(rf"`{name}` ([\d.e-]+)", DOC.read_text())
            assert found, name
            assert {float(value) for value in found} == {field.default}
