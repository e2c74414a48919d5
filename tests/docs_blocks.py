"""Python blocks of Markdown pages, by section. Used by the tests that run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


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
