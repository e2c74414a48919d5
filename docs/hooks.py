"""Two things that MkDocs does not do by itself.

Links to files of the repository outside `docs/` work on the site as they do in the tree, and a page that `nav` does not
name is put at its end instead of being unreachable.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

DOCS = Path(__file__).parent
OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([\w./-]+)\)")


def on_config(config: Any) -> None:
    """Add the pages that `nav` leaves out."""
    named = re.findall(r"[\w-]+\.md", str(config.nav))
    config.nav += sorted(page.name for page in DOCS.glob("*.md") if page.name not in named)


def on_files(files: Any, *, config: Any) -> None:
    """Publish files outside `docs/` that a page links to."""
    for page in DOCS.glob("*.md"):
        for _, target in OUTSIDE.findall(page.read_text(encoding="utf-8")):
            source = DOCS.parent / target
            if source.is_file() and files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=str(source)))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links to where `on_files` has put the files; a folder has no page and becomes plain text."""

    def point(found: re.Match[str]) -> str:
        text, target = found.groups()
        return f"[{text}]({target})" if (DOCS.parent / target).is_file() else text

    return OUTSIDE.sub(point, markdown)
