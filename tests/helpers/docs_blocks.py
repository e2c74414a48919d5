"""Blocks of Markdown pages, by section. Used by the tests that run them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def pages() -> list[str]:
    """README, guides, and the pages beside examples."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
    return [path.relative_to(ROOT).as_posix() for path in found]


def blocks(page: str) -> list[tuple[str, str, str]]:
    """Second- or third-level title, language and text of every block. Before the first title it is the page's path."""
    text = (ROOT / page).read_text(encoding="utf-8")
    parts = re.split(r"^###? (.+?)\n", text, flags=re.MULTILINE)
    titled = [(page, parts[0]), *zip(parts[1::2], parts[2::2])]
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [(title, *found.groups()) for title, body in titled for found in fence.finditer(body)]


def sections(page: str) -> dict[str, list[str]]:
    """Title of a second-level section -> its Python blocks. What comes before the first one has the page as title."""
    text = (ROOT / page).read_text(encoding="utf-8")
    parts = re.split(r"^## (.+?)\n", text, flags=re.MULTILINE)
    titled = {page: parts[0], **dict(zip(parts[1::2], parts[2::2]))}
    found = {title: re.findall(r"```python\n(.*?)```", body, re.DOTALL) for title, body in titled.items()}
    return {title: blocks for title, blocks in found.items() if blocks}


def run(block: str, names: dict[str, Any], *, where: str) -> None:
    """Run one block with `names`, which it may change."""
    exec(compile(block, where, "exec"), names)


def commands(page: str) -> list[list[str]]:
    """Words of every line of the page's shell blocks, in order; comments are left out."""
    lines = [line for _, language, text in blocks(page) if language == "bash" for line in text.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]
