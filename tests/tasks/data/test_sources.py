import json
import os
from pathlib import Path

import pytest

from adalora.errors import DataError
from adalora.tasks.data.rows import load_splits
from adalora.tasks.data.sources import SQUAD_TEST, SQUAD_TRAIN, SQUAD_VALIDATION, load_builtin

from ..tiny import make_recipe


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("ADALORA_DATA", str(tmp_path))
    return tmp_path


def folder(root, name, **files):
    (root / name).mkdir()
    for file, text in files.items():
        (root / name / file.replace("__", "-").replace("_", ".", 1)).write_text(text)


def test_airline_tweets_have_fixed_splits():
    splits = load_builtin("airline")
    assert {name: len(split) for name, split in splits.items()} == {"train": 10506, "validation": 1313, "test": 1314}
    texts = [set(split["text"]) for split in splits.values()]
    assert not texts[0] & texts[1]
    assert not texts[0] & texts[2]
    assert set(splits["test"]["label"]) == {"negative", "neutral", "positive"}


def test_e2e_facts_and_text(root):
    folder(root, "e2e", valid_txt="name : A | area : b||A is in b .\n", test_txt="name : C||C .\nno bars\n")
    splits = load_builtin("e2e")
    assert splits["train"][0] == {"facts": "name : A | area : b", "text": "A is in b ."}
    assert len(splits["test"]) == 1


def test_scitldr_keeps_every_summary(root):
    row = json.dumps({"source": ["One.", "Two."], "target": ["a", "b"], "title": "x"}) + "\n"
    folder(root, "scitldr", train_jsonl=row, dev_jsonl=row, test_jsonl=row)
    assert load_builtin("scitldr")["test"][0] == {"source": "One. Two.", "target": ["a", "b"]}


def test_gsm8k(root):
    row = json.dumps({"question": "1+1?", "answer": "2 #### 2"}) + "\n"
    folder(root, "gsm8k", train_jsonl=row * 3, test_jsonl=row)
    splits = load_builtin("gsm8k")
    assert len(splits["train"]) == 3
    assert splits["test"][0]["question"] == "1+1?"


def squad(titles):
    question = {"question": "q", "id": 1, "answers": [{"text": "b", "answer_start": 2}]}
    empty = {"question": "r", "id": 2, "answers": []}
    paragraphs = [{"context": "a b", "qas": [question, empty]}]
    return json.dumps({"version": "v2.0", "data": [{"title": title, "paragraphs": paragraphs} for title in titles]})


def test_squad_is_split_by_article(root):
    (root / "squad2").mkdir()
    titles = [*SQUAD_TRAIN, *SQUAD_VALIDATION, *SQUAD_TEST, "Other"]
    (root / "squad2" / "dev-v2.0.json").write_text(squad(titles))
    splits = load_builtin("squad2-half")
    assert {name: len(split) for name, split in splits.items()} == {"train": 20, "validation": 4, "test": 8}
    assert splits["train"][0]["answers"] == {"text": ["b"], "answer_start": [2]}


def test_a_squad_file_of_ones_own(tmp_path):
    (tmp_path / "mine.json").write_text(squad(["x", "y"]))
    recipe = make_recipe(tmp_path, "m", task="question-answering", data={"files": str(tmp_path / "mine.json")})
    assert len(load_splits(recipe).train) == 4


def test_any_name_is_looked_up_in_the_folder(root):
    folder(root, "mine", train_csv="text,label\na,x\nb,y\n", dev_csv="text,label\nc,x\n")
    recipe = make_recipe(root, "m", task="classification", data={"name": "someone/mine"})
    splits = load_splits(recipe)
    assert (len(splits.train), len(splits.validation)) == (2, 1)


def test_without_folder_and_hub_the_message_says_what_to_do(root):
    with pytest.raises(DataError, match="ADALORA_DATA"):
        load_builtin("gsm8k")


SHARED = Path(os.environ.get("ADALORA_DATA", ""))


@pytest.mark.skipif(not (SHARED / "squad2").is_dir(), reason="ADALORA_DATA is not set to the real data sets")
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("banking77", {"train": 10003, "test": 3080}),
        ("stsb", {"train": 5749, "validation": 1500, "test": 1379}),
        ("e2e", {"train": 4672, "test": 4693}),
        ("gsm8k", {"train": 7473, "test": 1319}),
        ("squad2-half", {"train": 3560, "validation": 889, "test": 1629}),
    ],
)
def test_real_sets_are_read_whole(name, rows):
    assert {split: len(table) for split, table in load_builtin(name).items()} == rows
