"""The documentation site: complete, true to the source, and built without a warning."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import adalora
from adalora.tasks.recipe.options import TASKS, task_names

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def source():
    """All of the package's code, with neighbouring string literals joined as Python joins them."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src" / "adalora").rglob("*.py"))
    return re.sub(r"""["']\s*\n\s*f?["']""", "", text)


def test_every_quoted_message_is_one_that_we_print():
    quoted = re.findall(r"^> (.+)$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(quoted) >= 30
    printed = source()
    assert [message for message in quoted if message not in printed] == []


def test_every_public_name_has_a_reference_entry():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    entries = set(re.findall(r"^::: adalora\.(\w+)$", text, re.MULTILINE))
    assert set(adalora.__all__) - {"__version__"} <= entries
    assert "`adalora.__version__`" in text
    for name in entries:
        assert getattr(adalora, name).__doc__


def test_the_recipes_page_has_every_task_with_its_columns():
    fields, scores = (DOCS / "recipes.md").read_text(encoding="utf-8").split("## What they reach")
    assert scores
    rows = re.findall(r"^\| `([\w-]+)` \| (.+?) \|", fields, re.MULTILINE)
    columns = {task: set(re.findall(r"`(\w+)`", told)) for task, told in rows}
    assert columns == {name: set(cls.ROLES) for name, cls in zip(task_names(), TASKS, strict=True)}


def test_the_picture_and_the_page_show_the_layers_that_are_enforced():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    layers = [layer.replace("adalora.", "") for layer in reversed(contracts[0]["layers"])]
    assert layers[0] == "errors | faults | plugins | version"  # not drawn: everything may import them
    drawn = re.findall(r'<text class="layer"[^>]*>([^<]+)<', (DOCS / "architecture.svg").read_text(encoding="utf-8"))
    assert drawn == layers[1:]
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    for layer in layers:
        for name in layer.split(" | "):
            assert f"`{name}/`" in page or f"`{name}.py`" in page
    for contract, folder in zip(contracts[1:], ("lora", "tasks")):  # a table each, in the contract's order
        assert contract["containers"] == [f"adalora.{folder}"]
        inner = [name for layer in contract["layers"] for name in layer.split(" | ")]
        table = page.partition(f"| `{folder}/…` | what |\n|---|---|\n")[2].partition("\n\n")[0]
        assert re.findall(r"^\| `(\w+)(?:/|\.py)` \| [^|]+ \|$", table, re.MULTILINE) == inner


def test_the_method_card_repeats_what_was_measured():
    found = json.loads((ROOT / "benchmarks" / "results" / "nested.json").read_text(encoding="utf-8"))

    def mean(*, nested, budget):
        runs = [r["curves"]["score"] for r in found["runs"] if r["nested"] is nested]
        points = [point["accuracy"] for curve in runs for point in curve if point["budget"] == budget]
        return sum(points) / len(points)

    lost = [mean(nested=nested, budget=1.0) - mean(nested=nested, budget=0.6) for nested in (False, True)]
    text = (DOCS / "method-card.md").read_text(encoding="utf-8")
    told = re.search(r"cut to 60 % lost ([\d.]+) of accuracy where\s+`nested=True` lost ([\d.]+)", text)
    assert [float(number) for number in told.groups()] == pytest.approx(lost, abs=1e-3)
    own = [r["accuracy"] for r in found["trained_at_the_budget"] if r["budget"] == 0.6]
    assert sum(own) / len(own) > mean(nested=True, budget=0.6)


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    for name in adalora.__all__:
        assert name in reference
    assert "target_rank" in reference
    assert (tmp_path / "benchmarks" / "results" / "nested.png").is_file()
    navigation = (tmp_path / "index.html").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert page.stem == "index" or f'href="{page.stem}/"' in navigation
