"""The one place that asks the Hugging Face hub for data."""

from __future__ import annotations

from typing import Any

from adalora.errors import DataError

# Where the hub keeps its own conversion of a data set that is published as a loading script.
PARQUET_REVISION = "refs/convert/parquet"


def load_hub(name: str, config: str | None = None, *, streaming: bool = False) -> dict[str, Any]:
    """All splits of a data set on the hub.

    Args:
        name: E.g. `glue`.
        config: Its configuration, e.g. `mnli`.
        streaming: Give iterable sets that are read row by row.

    Returns:
        Split name → `Dataset` or `IterableDataset`.

    Raises:
        DataError: The hub cannot be reached or has no such set; says how to use local files instead.
    """
    import datasets

    try:
        try:
            return dict(datasets.load_dataset(name, config, streaming=streaming))
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            return dict(datasets.load_dataset(name, config, streaming=streaming, revision=PARQUET_REVISION))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"data set {name!r}{f' ({config})' if config else ''} cannot be read from the hub: {reason}. "
            f"Without the hub, put its files (train.csv, test.csv, … or .jsonl, .parquet) in a folder "
            f"{name.rsplit('/', 1)[-1]!r} and set ADALORA_DATA to the folder above it, or name them in data.files"
        ) from error
