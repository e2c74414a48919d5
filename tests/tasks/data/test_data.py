"""From a recipe's `data:` part to rows: formats, names of splits, splits by seed, columns, limits, streams."""

import json

import pandas as pd
import pytest
from datasets import Dataset, IterableDataset

from adalora.errors import DataError, RecipeError
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


def stream(folder, task, **data):
    return make_recipe(folder, "m", task=task, data={"streaming": True, **data}, training={"max_steps": 2})


def test_a_built_in_set_and_squads_json_are_streams_where_that_is_wanted(tmp_path, monkeypatch):
    """They are in memory by then."""
    table = Dataset.from_list(ROWS)
    monkeypatch.setattr(rows, "load_builtin", lambda name: {"train": table, "test": table})
    labelled = {"name": "classification", "labels": ["a", "b"]}
    train, _, test = load_splits(stream(tmp_path, labelled, name="airline", limit={"train": 30}))
    assert isinstance(train, IterableDataset)
    assert len({row["text"] for row in train}) == 30
    assert len(test) == 40

    answers = [{"id": n, "question": "who?", "answers": [{"text": "Ann", "answer_start": 0}]} for n in range(5)]
    paragraph = {"context": "Ann was here", "qas": answers}
    (tmp_path / "train.json").write_text(json.dumps({"data": [{"title": "t", "paragraphs": [paragraph]}]}))
    train, _, test = load_splits(stream(tmp_path, "question-answering", files=str(tmp_path / "train.json")))
    assert isinstance(train, IterableDataset)
    assert [row["answers"]["text"] for row in train] == [["Ann"]] * 5


@pytest.mark.parametrize(
    ("field", "value", "undo"),
    [("test_fraction", 0.1, "0"), ("validation_fraction", 0.1, "0"), ("group_by", "who", "null")],
)
def test_rows_are_not_taken_out_of_a_stream(field, value, undo, tmp_path):
    data = {"files": "rows.csv", field: value}
    with pytest.raises(RecipeError, match=rf"data\.{field}={value!r}: .* a stream .*: --set data\.{field}={undo}, "):
        stream(tmp_path, "regression", **data)
    assert stream(tmp_path, "regression", **{**data, field: 0 if undo == "0" else None}).data.streaming


def test_a_file_of_no_split_is_not_left_out_unseen(tmp_path):
    files = {"train": "a.csv", "tests": "b.csv"}
    with pytest.raises(RecipeError, match=r"recipe: data\.files\.tests: unknown; did you mean 'test'\?"):
        make_recipe(tmp_path, "m", task="regression", data={"files": files})
    made = make_recipe(tmp_path, "m", task="regression", data={"files": files, "splits": {"test": "tests"}})
    assert made.data.files == files


@pytest.mark.parametrize("name", ["text", "label"])
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_an_empty_cell_is_named_before_anything_is_trained(name, ending, tmp_path):
    columns = {"text": "message", "label": "intent"}
    empty = {"message": "good bag", "intent": "x", columns[name]: None}
    file = write(tmp_path / f"rows.{ending}", [{"message": f"w{n}", "intent": "xy"[n % 2]} for n in range(8)] + [empty])
    beside = repr(empty["message"] or empty["intent"])
    words = rf"column '{columns[name]}' is empty in 1 of 9 rows of train, beside {beside}: drop or mend"
    with pytest.raises(DataError, match=words):
        splits(tmp_path, files=file, columns=columns)
    with pytest.raises(DataError, match=rf"column '{columns[name]}' is empty in 1 of"):
        splits(tmp_path, files=file, columns=columns, test_fraction=0.4)
    kept = splits(tmp_path, files={"train": file}, columns=columns, limit={"train": 4}, seed=1).train
    assert None not in kept["text"][:] + kept["label"][:]  # the row is not among the four


def test_words_that_pandas_takes_for_empty_cells_are_texts_and_labels(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\nNA,None\nnull,n/a\n")
    train = splits(tmp_path, files=str(tmp_path / "rows.csv")).train
    assert train.to_list() == [{"text": "NA", "label": "None"}, {"text": "null", "label": "n/a"}]


def test_a_row_may_have_none_of_several_labels(tmp_path):
    (tmp_path / "rows.csv").write_text('text,labels\nw1,"a,b"\nw2,\n')
    assert splits(tmp_path, "multi-label", files=str(tmp_path / "rows.csv")).train["labels"][:] == ["a,b", None]


@pytest.mark.parametrize(
    ("fraction", "words"),
    [(0.01, "of 40 rows is none: 1 row is 0.025"), (0.99, "of 40 rows leaves none to train on")],
)
def test_a_fraction_of_no_rows_is_refused(fraction, words, tmp_path):
    with pytest.raises(DataError, match=rf"data\.test_fraction={fraction} {words}"):
        splits(tmp_path, files=write(tmp_path / "rows.jsonl"), test_fraction=fraction)


def test_a_split_without_rows_is_named(tmp_path, monkeypatch):
    table = Dataset.from_list(ROWS)
    monkeypatch.setattr(rows, "load_builtin", lambda name: {"train": table, "test": table.select([])})
    with pytest.raises(DataError, match="data: the test split has no rows"):
        splits(tmp_path, name="airline")


def test_a_class_too_small_for_a_small_training_part_is_not_in_the_way(tmp_path):
    rows = [{"text": f"w{n}", "label": "abc"[n % 3]} for n in range(12)]
    train, _, test = splits(tmp_path, files=write(tmp_path / "rows.jsonl", rows), test_fraction=0.85)
    assert (len(train), len(test)) == (2, 10)


@pytest.mark.parametrize(("who", "words"), [("p", "all 4 rows are of one group"), (None, "4 of 4 rows have no group")])
def test_groups_that_cannot_be_split_are_refused(who, words, tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"text": "w", "label": "a", "who": who}] * 4)
    with pytest.raises(DataError, match=rf"data\.group_by='who': {words}"):
        splits(tmp_path, files=file, test_fraction=0.5, group_by="who")
