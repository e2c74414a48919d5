"""SQuAD's own nested JSON as flat rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HEAD_CHARACTERS = 500


def is_squad(path: Path) -> bool:
    """Whether a JSON file looks like SQuAD's: articles below `data`."""
    if path.suffix != ".json":
        return False
    with path.open(encoding="utf-8") as file:
        head = file.read(HEAD_CHARACTERS)
    return '"data"' in head and ('"title"' in head or '"paragraphs"' in head)


def read_squad(path: Path) -> list[dict[str, Any]]:
    """Rows with id, title, context, question and answers{text, answer_start}, as the hub has them."""
    return [
        {
            "id": str(question["id"]),
            "title": article.get("title", ""),
            "context": paragraph["context"],
            "question": question["question"],
            "answers": {
                "text": [answer["text"] for answer in question.get("answers", [])],
                "answer_start": [answer["answer_start"] for answer in question.get("answers", [])],
            },
        }
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
