"""From a recipe's `data:` part to rows: formats, names of splits, splits by seed, columns, limits, streams."""

import json

import pandas as pd
import pytest
from datasets import Dataset

from adalora.errors import DataError
from adalora.tasks.data import rows
from adalora.tasks.data.rows import load_splits, load_table_columns

from ..tiny import make_recipe

ROWS = [{"text": f"w{n}", "label": "ab"[n % 2], "who": f"p{n // 4}"} for n in range(40)]


def splits(folder, task="classification", **part):
    return load_splits(make_recipe(folder, "m", task=task, data=part))


def write(path, rows=ROWS):
    frame = pd.DataFrame(rows)
    writers = {
        ".csv": lambda: frame.to_csv(path, index=False),
        ".tsv": lambda: frame.to_csv(path, index=False, sep="\t"),
        ".jsonl": lambda: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
        ".parquet": lambda: frame.to_parquet(path),
    }
    writers[path.suffix]()
    return str(path)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows(ending, tmp_path):
    file = write(tmp_path / f"rows.{ending}")
    train = splits(tmp_path, files=file).train
    assert train.to_list() == [{"text": row["text"], "label": row["label"]} for row in ROWS]
    assert load_table_columns(file) == ["text", "label", "who"]


def test_plain_text_is_a_row_a_line(tmp_path):
    (tmp_path / "lines.txt").write_text("one two\nthree\n")
    file = str(tmp_path / "lines.txt")
    assert splits(tmp_path, "causal-lm", files=file, columns={"text": "text"}).train["text"][:] == ["one two", "three"]


def test_csv_without_a_header_and_with_another_delimiter(tmp_path):
    (tmp_path / "rows.data").write_text("a;x\nb;y\n")
    part = {"format": "csv", "delimiter": ";", "header": ["message", "intent"]}
    columns = {"text": "message", "label": "intent"}
    train = splits(tmp_path, files=str(tmp_path / "rows.data"), columns=columns, **part).train
    assert train.to_list() == [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]


def test_several_files_make_one_split(tmp_path):
    files = {"train": [write(tmp_path / f"{n}.csv", ROWS[n : n + 4]) for n in (0, 4)], "dev": write(tmp_path / "d.csv")}
    found = splits(tmp_path, files=files)
    assert (len(found.train), len(found.validation), found.test) == (8, 40, None)
    assert found.measured[0] == "validation"


@pytest.mark.parametrize(
    ("name", "words"), [("none.csv", "no file"), ("rows.bin", "data.format"), ("broken.parquet", "not readable as")]
)
def test_files_that_cannot_be_read_are_named(name, words, tmp_path):
    for bad in ("rows.bin", "broken.parquet"):
        (tmp_path / bad).write_bytes(b"\x00\x01")
    with pytest.raises(DataError, match=words) as caught:
        splits(tmp_path, files=str(tmp_path / name))
    assert name in str(caught.value)


def test_splits_by_seed_are_disjoint_whole_and_the_same_again(tmp_path):
    file = write(tmp_path / "rows.jsonl")
    first, again, other = (
        splits(tmp_path, files=file, validation_fraction=0.1, test_fraction=0.2, seed=seed) for seed in (0, 0, 1)
    )
    parts = [set(split["text"]) for split in first]
    assert [len(part) for part in parts] == [28, 4, 8]
    assert set.union(*parts) == {row["text"] for row in ROWS}
    assert [split["text"][:] for split in first] == [split["text"][:] for split in again]
    assert first.test["text"][:] != other.test["text"][:]
    assert sorted(first.test["label"]) == ["a"] * 4 + ["b"] * 4  # each label in its share


def test_rows_of_a_group_stay_together(tmp_path):
    part = {"files": write(tmp_path / "rows.jsonl"), "test_fraction": 0.3, "group_by": "who"}
    group = {row["text"]: row["who"] for row in ROWS}
    train, _, test = splits(tmp_path, **part)
    assert len(test) == 12
    assert not {group[text] for text in train["text"]} & {group[text] for text in test["text"]}
    with pytest.raises(DataError, match=r"data\.group_by='whom': unknown; did you mean 'who'"):
        splits(tmp_path, **{**part, "group_by": "whom"})


def test_a_hub_sets_own_splits_columns_and_limits(tmp_path, monkeypatch):
    table = Dataset.from_list([{"sentence": row["text"], "kind": row["label"], "id": 0} for row in ROWS])
    asked = []

    def load_hub(*names, streaming):
        asked.append((*names, streaming))
        return {"train": table, "validation_matched": table, "test": table}

    monkeypatch.delenv("ADALORA_DATA", raising=False)
    monkeypatch.setattr(rows, "load_hub", load_hub)
    part = {
        "name": "someone/set",
        "config": "mnli",
        "columns": {"text": "sentence", "label": "kind"},
        "splits": {"validation": "validation_matched", "test": None},
        "limit": {"train": 10},
    }
    found = splits(tmp_path, **part)
    assert asked == [("someone/set", "mnli", False)]
    assert (len(found.train), len(found.validation), found.test) == (10, 40, None)
    assert set(found.train.column_names) == {"text", "label"}
    assert found.train["text"][:] == splits(tmp_path, **part).train["text"][:]
    with pytest.raises(DataError, match=r"data\.splits\.train='trian'"):
        splits(tmp_path, **{**part, "splits": {"train": "trian"}})
    with pytest.raises(DataError, match=r"data\.columns\.label='knid' \(train\): unknown; did you mean 'kind'"):
        splits(tmp_path, **{**part, "columns": {"text": "sentence", "label": "knid"}})


def test_a_stream_is_shuffled_limited_and_never_whole_in_memory(tmp_path):
    file = write(tmp_path / "rows.jsonl")
    recipe = make_recipe(
        tmp_path,
        "m",
        task={"name": "classification", "labels": ["a", "b"]},
        data={"files": {"train": file, "test": file}, "streaming": True, "limit": {"train": 30, "test": 5}},
        training={"max_steps": 2},
    )
    train, _, test = load_splits(recipe)
    texts = [row["text"] for row in train]
    assert not hasattr(train, "__len__")
    assert len(set(texts)) == len(texts) == 30
    assert texts != [row["text"] for row in ROWS][:30]
    assert len(test) == 5
