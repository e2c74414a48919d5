"""The reference pages are complete: recipe fields, commands, suites, and what the guides import."""

import ast
import importlib.util
import inspect
import re

import pytest
import typer
from pydantic import BaseModel
from typer.testing import CliRunner

from adalora import export
from adalora.cli import commands
from adalora.report import figures
from adalora.tasks.recipe import fields, options
from helpers.docs_blocks import ROOT, blocks, pages

DOCS = ROOT / "docs"
SUITES = {file.stem for file in (ROOT / "src" / "adalora" / "recipes" / "suites").glob("*.yaml")}


def script():
    """The script that writes the tables, which lies beside the pages."""
    spec = importlib.util.spec_from_file_location("docs_tables", DOCS / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = script()


def section(page, title):
    """The lines under a second-level title."""
    return (DOCS / page).read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("page", TABLES.PAGES)
def test_tables_are_as_the_script_writes_them(page):
    assert TABLES.updated(DOCS / page) == (DOCS / page).read_text(encoding="utf-8"), "run: python docs/tables.py"


def test_every_part_of_a_recipe_has_its_table():
    """Found in the modules, not in the script: a new part or task is missed otherwise."""
    bases = {fields.Part, options.Options}
    found = {
        model
        for module in (fields, options)
        for _, model in inspect.getmembers(module, inspect.isclass)
        if issubclass(model, BaseModel) and model not in {BaseModel, *bases}
    }
    assert found == set(TABLES.PARTS.values())


@pytest.mark.parametrize(("title", "model"), TABLES.PARTS.items())
def test_every_field_is_in_its_table_with_a_description(title, model):
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (.*?) \|$", section("recipe-fields.md", title), re.MULTILINE))
    assert rows.keys() == model.model_fields.keys() - ({"name"} if model in options.TASKS else set())
    assert all(rows.values())


def command_line(*words):
    app = typer.Typer()
    commands.register(app)
    done = CliRunner().invoke(app, list(words), env={"COLUMNS": "300", "TERM": "dumb", "NO_COLOR": "1"})
    assert done.exit_code == 0, done.output
    return done.output


def registered():
    app = typer.Typer()
    commands.register(app)
    return [found.name for found in app.registered_commands]


@pytest.mark.parametrize("name", registered())
def test_every_option_that_help_has_is_on_the_page(name):
    told = set(re.findall(r"--?[a-z][\w-]*", section("commands.md", f"`adalora {name}`")))
    shown = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", command_line(name, "--help"))) - {"--help"}
    assert {option for option in told if option.startswith("--")} == {o for o in shown if o.startswith("--")}


def test_every_command_is_on_the_page_and_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^## `adalora (\w+)`$", (DOCS / "commands.md").read_text(), re.MULTILINE)) == set(
        registered()
    )
    assert set(re.findall(r"^\| `adalora (\w+)", text, re.MULTILINE)) == set(registered())


def test_every_suite_is_told_of():
    rows = re.findall(r"^\| `(\w+)` \|", section("comparing.md", "Suites"), re.MULTILINE)
    assert set(rows) == SUITES
    assert set(command_line("compare", "--help").replace(",", " ").replace(".", " ").split()) >= SUITES


def used():
    """Names of the package that Python blocks of pages use -> a page."""
    found = {}
    for page in pages():
        for _, language, text in blocks(page):
            for node in ast.walk(ast.parse(text)) if language == "python" else ():
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "adalora":
                    found |= {f"{node.module}.{name.name}": page for name in node.names}
                elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("adalora."):
                    found[ast.unparse(node)] = page
    return found


def test_what_blocks_use_is_in_the_reference():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    entries = re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
    names = used()
    assert {"adalora.attach", "adalora.report", "adalora.integrations.fsdp.save_adapter"} <= names.keys()
    covered = [name for name in names if f"`{name}(" in text or any(f"{name}.".startswith(f"{e}.") for e in entries)]
    assert {name: names[name] for name in names.keys() - set(covered)} == {}


def test_adapters_as_files_and_figures_are_in_the_reference_whole():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^::: adalora\.export\.(\w+)$", text, re.MULTILINE)) | {"FORMATS"}
    assert told == set(export.__all__)
    assert "`adalora.export.FORMATS`" in text
    assert re.findall(r"^        - (plot_\w+)$", text, re.MULTILINE) == figures.__all__


def test_the_entry_points_of_the_page_are_the_example_s():
    (told,) = (text for _, language, text in blocks("docs/method.md") if language == "toml")
    example = (ROOT / "examples" / "plugin-package" / "pyproject.toml").read_text(encoding="utf-8")
    assert told.strip() in example
