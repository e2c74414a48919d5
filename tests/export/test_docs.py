"""docs/serving.md says what the code does."""

import re
from pathlib import Path

import pytest

from adalora.export import FORMATS
from adalora.export.stacks import STACKS

from .test_stacks import MATRIX

DOCS = Path(__file__).parents[2] / "docs/serving.md"


@pytest.fixture(scope="module")
def text():
    return DOCS.read_text(encoding="utf-8")


def test_the_table_is_the_tested_matrix(text):
    rows = {}
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")]
        if len(cells) == 6 and cells[0] in {s.name for s in STACKS}:
            rows[cells[0]] = cells[1:]
    for i, stack in enumerate(STACKS):
        wanted = [MATRIX[f][i] for f in ("portable", "ragged", "gguf-ragged", "peft-adalora")]
        assert rows[stack.name] == [stack.version, *wanted]


def test_every_stack_and_every_format_has_its_place(text):
    headings = re.findall(r"^### (.+)$", text, re.MULTILINE)
    for stack in STACKS:
        assert stack.name.split(" ≥")[0].split(" ≤")[0] in headings
    for format in FORMATS:
        assert f"`{format}`" in text


def test_every_section_of_commands_has_a_command(text):
    for section in text.split("\n### ")[1:]:
        assert "```" in section.split("\n## ")[0]


def test_options_in_the_text_exist(text):
    import typer
    from typer.main import get_command

    from adalora.cli import export as commands

    app = typer.Typer()
    commands.register(app)
    for line in re.findall(r"^adalora (\w+) (.*?)(?:  +#.*)?$", text, re.MULTILINE):
        name, rest = line
        command = get_command(app).commands.get(name)
        if command is None:
            continue
        known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known
