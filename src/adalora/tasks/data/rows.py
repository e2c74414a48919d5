"""From a recipe's `data:` part to train, validation and test rows with the task's column names."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from adalora.errors import DataError
from adalora.tasks.data.gaps import refuse_gaps
from adalora.tasks.data.hub import load_hub
from adalora.tasks.data.sources import DATA_VARIABLE, SOURCES, load_builtin, local_folder
from adalora.tasks.data.squad_files import is_squad, read_squad
from adalora.tasks.recipe.checks import SPLIT_NAMES
from adalora.tasks.recipe.fields import DataPart, Recipe
from adalora.tasks.recipe.problems import suggest

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

FORMATS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text",
}  # fmt: skip
SHUFFLE_BUFFER = 10_000
STREAM_SAMPLE = 1_000  # training rows that a stream without held-out rows is measured on


class Splits(NamedTuple):
    """Rows of a run; `validation` and `test` may be missing. Only `train` is ever a stream."""

    train: Dataset | IterableDataset
    validation: Dataset | None
    test: Dataset | None

    @property
    def measured(self) -> tuple[str, Dataset]:
        """Rows that the final metrics are measured on, and their split: test, else validation, else train."""
        if self.test is not None:
            return "test", self.test
        if self.validation is not None:
            return "validation", self.validation
        if hasattr(self.train, "__len__"):
            return "train", self.train
        return "train", _in_memory(self.train.take(STREAM_SAMPLE))


def load_splits(recipe: Recipe) -> Splits:
    """Read, split, rename and limit the rows of a recipe.

    Raises:
        DataError: A source, split or column is missing, and the message says what there is; a split is empty, or some
            of its cells.
    """
    data = recipe.data
    tables = _choose(data, _read(data))
    if not data.streaming:
        if empty := [name for name, table in tables.items() if len(table) == 0]:
            raise DataError(f"data: the {' and '.join(empty)} split has no rows")
        tables = _split_by_seed(data, tables, _label_column(recipe))
    tables = {name: _rename(recipe, table, name) for name, table in tables.items()}
    for name, table in tables.items():
        tables[name] = _limited(data, table, name)
        if name != "train" or not data.streaming:
            refuse_gaps(recipe, tables[name], name)
    return Splits(tables["train"], tables.get("validation"), tables.get("test"))


def columns_of(table: Any) -> list[str]:
    """Column names; of a stream without a schema, those of its first row."""
    return list(table.column_names or next(iter(table)))


def load_table_columns(path: str) -> list[str]:
    """Column names of one local file.

    Raises:
        DataError: It cannot be read.
    """
    return columns_of(_read_files(DataPart(files=path), {"train": [path]})["train"])


def _read(data: DataPart) -> dict[str, Any]:
    if data.files is not None:
        return _read_files(data, _files_by_split(data.files))
    name = str(data.name)
    if name in SOURCES:
        return _as_asked(data, load_builtin(name))
    folder = local_folder(name)
    if folder is not None:
        if data.config is not None and (folder / data.config).is_dir():
            folder = folder / data.config
        files = _files_of_folder(folder)
        if files:
            return _read_files(data, files)
        raise DataError(
            f"{folder} (from {DATA_VARIABLE}) has no train, validation or test file in CSV, JSON lines, Parquet or text"
        )
    return load_hub(name, data.config, streaming=data.streaming)


def _files_by_split(files: str | list[str] | dict[str, str | list[str]]) -> dict[str, list[str]]:
    by_split = files if isinstance(files, dict) else {"train": files}
    return {split: [paths] if isinstance(paths, str) else list(paths) for split, paths in by_split.items()}


def _files_of_folder(folder: Path) -> dict[str, list[str]]:
    names = [name for group in SPLIT_NAMES.values() for name in group]
    found: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in FORMATS and path.stem in names:
            found.setdefault(path.stem, []).append(str(path))
    return found


def _read_files(data: DataPart, files: dict[str, list[str]]) -> dict[str, Any]:
    import datasets

    for path in (path for paths in files.values() for path in paths):
        if not Path(path).is_file():
            raise DataError(f"data.files: no file {path!r} here ({Path.cwd()})")
    first = Path(next(iter(files.values()))[0])
    kind = data.format or FORMATS.get(first.suffix)
    if kind is None:
        raise DataError(
            f"data.files: {first.name!r} does not tell its format; set data.format to csv, json, parquet or text"
        )
    if kind == "json" and is_squad(first):
        rows = {split: [row for path in paths for row in read_squad(Path(path))] for split, paths in files.items()}
        return _as_asked(data, {split: datasets.Dataset.from_list(part) for split, part in rows.items()})
    options: dict[str, Any] = {}
    if kind == "csv":
        options = {
            "sep": "\t" if first.suffix == ".tsv" else data.delimiter,
            "column_names": data.header,
            "keep_default_na": False,  # or "None", "NA" and "null", which are texts or labels, are taken for empty
            "na_values": [""],
        }
    try:
        return dict(datasets.load_dataset(kind, data_files=files, streaming=data.streaming, **options))
    except Exception as error:  # the reader of each format raises its own classes
        cause = error.__cause__ or error
        raise DataError(f"data.files: {first.name}: not readable as {kind}: {cause}") from error


def _as_asked(data: DataPart, tables: Mapping[str, Dataset]) -> dict[str, Any]:
    """Tables that are in memory anyway, as streams where the recipe wants those."""
    return {split: table.to_iterable_dataset() if data.streaming else table for split, table in tables.items()}


def _choose(data: DataPart, tables: dict[str, Any]) -> dict[str, Any]:
    """Give the source's splits our names."""
    chosen: dict[str, Any] = {}
    for split, names in SPLIT_NAMES.items():
        if split in data.splits:
            wanted = data.splits[split]
            if wanted is None:
                continue
            if wanted not in tables:
                raise DataError(f"data.splits.{split}={wanted!r}: {suggest(wanted, tables, 'splits of this data set')}")
            chosen[split] = tables[wanted]
        elif name := next((n for n in names if n in tables), None):
            chosen[split] = tables[name]
    if "train" not in chosen:
        raise DataError(f"no split to train on; there is {', '.join(tables)}: name one in data.splits.train")
    return chosen


def _split_by_seed(data: DataPart, tables: dict[str, Any], label: str | None) -> dict[str, Any]:
    """Take missing test and validation rows out of the training rows."""
    total = len(tables["train"])
    for split, fraction in (("test", data.test_fraction), ("validation", data.validation_fraction)):
        if fraction and split not in tables and data.splits.get(split, "") is not None:  # type: ignore[call-overload]
            count = round(fraction * total)
            if not 0 < count < len(tables["train"]):
                what = "is none" if count == 0 else "leaves none to train on"
                raise DataError(
                    f"data.{split}_fraction={fraction} of {total} rows {what}: 1 row is {1 / total:.2g}; change it, or "
                    f"name held-out rows by themselves, as data.files.{split}"
                )
            tables["train"], tables[split] = _take(data, tables["train"], count, label)
    return tables


def _take(data: DataPart, table: Dataset, count: int, label: str | None) -> tuple[Dataset, Dataset]:
    from sklearn.model_selection import GroupShuffleSplit, train_test_split

    rows = list(range(len(table)))
    if data.group_by is not None:
        splitter = GroupShuffleSplit(1, test_size=count / len(rows), random_state=data.seed)
        kept, taken = next(splitter.split(rows, groups=_groups(data.group_by, table)))
    else:
        strata = table[label] if label in table.column_names else None
        if strata is not None and not _can_stratify(list(strata), smaller=min(count, len(rows) - count)):
            strata = None
        kept, taken = train_test_split(rows, test_size=count, random_state=data.seed, stratify=strata)
    return table.select(sorted(kept)), table.select(sorted(taken))


def _groups(column: str, table: Dataset) -> list[Any]:
    if column not in table.column_names:
        raise DataError(f"data.group_by={column!r}: {suggest(column, table.column_names, 'columns')}")
    groups = list(table[column])
    if None in groups:
        raise DataError(f"data.group_by={column!r}: {groups.count(None)} of {len(groups)} rows have no group")
    if len(set(groups)) < 2:
        raise DataError(f"data.group_by={column!r}: all {len(groups)} rows are of one group, which cannot be split")
    return groups


def _can_stratify(labels: list[Any], *, smaller: int) -> bool:
    """Whether each label has a row for both parts; labels that are missing are refused later, by name."""
    counts = Counter(labels)
    return None not in counts and min(counts.values()) > 1 and len(counts) <= smaller


def _label_column(recipe: Recipe) -> str | None:
    classes = ("classification", "sentence-pair", "image-classification")
    return recipe.column("label") if recipe.task.name in classes else None


def _rename(recipe: Recipe, table: Any, split: str) -> Any:
    """Keep the task's columns and give them the names of their roles."""
    names = columns_of(table)
    wanted: dict[str, str] = {}
    for role, needed in recipe.roles.items():
        column = recipe.column(role)
        if column in names:
            wanted[role] = column
        elif needed or role in recipe.data.columns:
            raise DataError(
                f"data.columns.{role}={column!r} ({split}): {suggest(column, names, 'columns of this data set')}"
            )
    for column in _template_columns(recipe, names):
        wanted.setdefault(column, column)
    table = table.select_columns(list(dict.fromkeys(wanted.values())))
    changes = {column: role for role, column in wanted.items() if role != column}
    return table.rename_columns(changes) if changes else table


def _template_columns(recipe: Recipe, names: list[str]) -> list[str]:
    template = getattr(recipe.task, "template", None) or ""
    fields = [field for _, field, _, _ in string.Formatter().parse(template) if field]
    for field in fields:
        if field not in names:
            raise DataError(f"task.template names {{{field}}}: {suggest(field, names, 'columns of this data set')}")
    return fields


def _limited(data: DataPart, table: Any, split: str) -> Any:
    limit = data.limit.get(split)  # type: ignore[call-overload]
    if data.streaming:
        if split == "train":
            table = table.shuffle(seed=data.seed, buffer_size=SHUFFLE_BUFFER)
            return table.take(limit) if limit else table
        return _in_memory(table.take(limit) if limit else table)
    if limit is None or limit >= len(table):
        return table
    return table.shuffle(seed=data.seed).select(range(limit))


def _in_memory(stream: Any) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list(list(stream), features=stream.features)
