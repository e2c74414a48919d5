"""Which labels a task has, and what is said of one that it has not."""

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from adalora.errors import DataError
from adalora.tasks.data.rows import Splits, load_splits
from adalora.tasks.kinds.base import find_labels, label_number, make_task
from adalora.tasks.runs.models import build_processor

from ..tiny import make_recipe, write_rows


def table(*labels, names=None):
    features = Features({"label": ClassLabel(names=names)}) if names else None
    return Dataset.from_dict({"label": list(labels)}, features=features)


def found(folder, train, test=None, **task):
    fields = {"name": "classification", **task}
    recipe = make_recipe(folder, "m", task=fields, data={"files": "rows.csv"})
    return find_labels(recipe, Splits(train, None, test), role="label")


def test_labels_are_the_recipes_the_sets_or_all_that_occur(tmp_path):
    assert found(tmp_path, table("b", "a", "b")) == ["a", "b"]
    assert found(tmp_path, table(3, 1)) == ["1", "3"]
    assert found(tmp_path, table(1, names=["no", "yes"])) == ["no", "yes"]
    assert found(tmp_path, table("b"), labels=["b", "a"]) == ["b", "a"]


def test_a_label_of_held_out_rows_alone_is_named_before_training(tmp_path):
    with pytest.raises(DataError, match=r"label 'c' is not among the 2 labels of training \(a, b\): .*task\.labels"):
        found(tmp_path, table("a", "b"), table("a", "c"))
    assert found(tmp_path, table("a", "b"), table("c"), labels=["a", "b", "c"]) == ["a", "b", "c"]


def test_lists_of_labels(tmp_path):
    rows = Dataset.from_dict({"label": [["B-x", "O"], ["O"]]}, features=Features({"label": [Value("string")]}))
    assert found(tmp_path, rows) == ["B-x", "O"]


@pytest.mark.parametrize("cell", [None, ["O", None]])
def test_a_label_that_is_missing_is_no_class(cell, tmp_path):
    with pytest.raises(DataError, match="column 'label': a label of a row of train is missing"):
        found(tmp_path, table(["O"] if cell else "O", cell))


def test_an_empty_cell_of_a_stream_is_named_when_it_is_read(tiny_model, tmp_path):
    rows = [{"text": "good bag", "label": "a"}, {"text": "bad bag", "label": None}]
    recipe = make_recipe(
        tmp_path, tiny_model, task={"name": "classification", "labels": ["a", "b"]},
        data={"files": write_rows(tmp_path / "rows.jsonl", rows), "streaming": True, "columns": {"text": "text"}},
        training={"max_steps": 1},
    )  # fmt: skip
    splits = load_splits(recipe)
    task = make_task(recipe, splits)
    with pytest.raises(DataError, match="column 'label' is empty in a row of the stream, beside 'bad bag': drop"):
        list(task.features(splits.train, build_processor(recipe, task)))


def test_a_number_stands_for_an_output_and_many_labels_are_not_all_shown():
    assert label_number(1, ["no", "yes"]) == label_number("yes", ["no", "yes"]) == 1
    for bad in (2, True, "maybe"):
        with pytest.raises(DataError, match="not among the 2 labels"):
            label_number(bad, ["no", "yes"])
    with pytest.raises(DataError, match=r"among the 77 labels of training \(l0, .*, l9, …\)"):
        label_number("x", [f"l{n}" for n in range(77)])


def test_labels_in_one_text_are_told_apart_in_every_split(tmp_path):
    tables = [Dataset.from_dict({"text": ["x"] * len(cells), "labels": cells}) for cells in (["a, b", "c"], ["b, c"])]
    recipe = make_recipe(tmp_path, "m", task="multi-label", data={"files": "rows.csv"})
    assert make_task(recipe, Splits(tables[0], None, tables[1])).labels == ["a", "b", "c"]
    with pytest.raises(DataError, match="label 'a' is not among"):
        make_task(recipe, Splits(tables[1], None, tables[0]))
