import json

import pytest
import typer
from typer.testing import CliRunner

from adalora.cli import commands

RUN = CliRunner()


@pytest.fixture
def app():
    made = typer.Typer()
    commands.register(made)
    return made


def test_dry_run_trains_nothing_and_then_the_suite_runs(app, tmp_path, recipe_file):
    suite = tmp_path / "suite.yaml"
    fields = {"tasks": [{"recipe": str(recipe_file), "seconds": 30}], "methods": ["lora", "ours"]}
    suite.write_text(json.dumps({**fields, "learning_rates": [0.01], "seeds": [1], "steps": 6, "budgets": [2]}))
    command = ["compare", str(suite), "--out", str(tmp_path / "out")]
    plan = RUN.invoke(app, [*command, "--dry-run"])
    assert plan.exit_code == 0, plan.output
    assert "2 cells to run, about 1.0 minutes" in plan.output
    assert not (tmp_path / "out").exists()
    done = RUN.invoke(app, command)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "report.html").is_file()
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 2
    assert "0 cells to run" in RUN.invoke(app, [*command, "--dry-run"]).output
    assert RUN.invoke(app, [*command, "--report-only"]).exit_code == 0
