import json

import pytest

from helpers.tiny_bert import mood, save_encoder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with a random BERT and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    save_encoder(folder)
    return folder


@pytest.fixture
def recipe_file(tmp_path, tiny_model):
    """A recipe on sentences whose first word decides the label."""
    rows = [dict(zip(("text", "label"), mood(n))) for n in range(96)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {
        "model": str(tiny_model),
        "task": "classification",
        "data": {"files": str(data), "validation_fraction": 0.25, "test_fraction": 0.25},
        "lora": {"r": 3, "lora_alpha": 8, "target_modules": "all-linear"},
        "adalora": {"target_rank": 2},
        "training": {"batch_size": 8, "max_length": 16},
    }
    file = tmp_path / "moods.yaml"
    file.write_text(json.dumps(fields))
    return file


@pytest.fixture
def make_suite(tmp_path, recipe_file):
    from adalora.compare.files import load_suite

    def make(**changes):
        fields = {
            "tasks": [{"recipe": str(recipe_file), "name": "moods"}],
            "methods": ["lora", "ours"],
            "learning_rates": [0.01],
            "seeds": [1, 2],
            "steps": 6,
            "budgets": [2],
            "output": str(tmp_path / "out"),
        }
        file = tmp_path / "suite.yaml"
        file.write_text(json.dumps({**fields, **changes}))
        return load_suite(file)

    return make
