"""A pair's second text is read, not only its first."""

import pytest

from adalora.tasks.data.rows import load_splits
from adalora.tasks.kinds.base import make_task

from ..tiny import make_recipe, write_rows


def read(recipe):
    """The rows, and of each the text that its token ids stand for with the part that each token belongs to."""
    splits = load_splits(recipe)
    task = make_task(recipe, splits)
    tokenizer = task.processor(recipe.model.name)
    features = task.features(splits.train, tokenizer)
    return list(splits.train), [(tokenizer.decode(row["input_ids"]), row["token_type_ids"]) for row in features]


@pytest.mark.parametrize("task", ["classification", "sentence-pair", "multi-label", "regression"])
def test_both_texts_of_a_pair_are_in_the_models_input(task, tiny_model, data_file, tmp_path):
    columns = {"label": "number"} if task == "regression" else {}
    data = {"files": str(data_file), "columns": columns}
    rows, found = read(make_recipe(tmp_path, tiny_model, task=task, data=data))
    assert len(found) == 120
    assert len({row["text_pair"] for row in rows}) == 3
    for row, (text, parts) in zip(rows, found, strict=True):
        assert text == f"[CLS] {row['text']} [SEP] {row['text_pair']} [SEP]"
        second = len(row["text_pair"].split()) + 1
        assert parts == [0] * (len(parts) - second) + [1] * second


def test_a_single_text_stands_alone(tiny_model, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "good flight", "label": "a"}])
    _, found = read(make_recipe(tmp_path, tiny_model, task="classification", data={"files": file}))
    assert found == [("[CLS] good flight [SEP]", [0, 0, 0, 0])]
