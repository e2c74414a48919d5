"""Text that scripts write into pages, between two lines that name it."""

from __future__ import annotations

from pathlib import Path


def marks(name: str) -> tuple[str, str]:
    """The lines before and after the text of this name."""
    return f"<!-- {name} -->", f"<!-- end of {name} -->"


def put(page: Path, name: str, text: str) -> None:
    """Replace the text of this name."""
    start, end = marks(name)
    before, rest = page.read_text(encoding="utf-8").split(start, 1)
    page.write_text(f"{before}{start}\n\n{text}\n\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")
