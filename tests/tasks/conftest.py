import json

import pytest

from helpers.tiny_bert import WORDS, mood, save_encoder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with a random BERT and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    save_encoder(folder)
    return folder


def rows(count):
    """Texts whose label is their first word's mood."""
    for n in range(count):
        text, label = mood(n)
        yield {
            "text": text,
            "text_pair": f"the {WORDS[4 + n % 3]}",
            "label": label,
            "labels": f"{label}, long" if n % 3 else label,
            "number": float(n % 4),
        }


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(120)))
    return path
