"""The folder of a run: what lies in it, and how it is written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from adalora.errors import RecipeError, StorageError
from adalora.faults import storage_fault

ADAPTER, METRICS, HISTORY, REPORT, RECIPE, WORK, PRUNED = (
    "adapter",
    "metrics.json",
    "history.jsonl",
    "report.html",
    "recipe.yaml",
    "work",
    "pruned.safetensors",
)


def written(folder: Path) -> dict[str, str]:
    """The files of a run, for people."""
    names = {"adapter": ADAPTER, "metrics": METRICS, "history": HISTORY, "report": REPORT}
    return {what: str(folder / name) for what, name in names.items() if (folder / name).exists()}


def prepare_folder(folder: Path, *, overwrite: bool) -> Path:
    """Make the output folder; refuse, or empty, one that holds a run. Files that are not a run's stay.

    Raises:
        RecipeError: It holds a run.
    """
    ours = (ADAPTER, METRICS, HISTORY, REPORT, RECIPE, WORK, PRUNED)
    present = [name for name in ours if (folder / name).exists()]
    if present and not overwrite:
        raise RecipeError(
            f"output={str(folder)!r} already holds a run ({', '.join(present)}); add --overwrite to train it anew, or "
            "choose another folder with --set output=…"
        )
    for name in present:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def last_plain_checkpoint(work: Path) -> str | None:
    """The newest checkpoint of plain LoRA that was written to its end, or None where there is none."""
    ends = work.glob("checkpoint-*/trainer_state.json")  # the Trainer's last file
    return max((str(file.parent) for file in ends), key=lambda name: int(name.rpartition("-")[2]), default=None)


def save_adapter(model: Any, processor: Any, folder: Path) -> None:
    """Write the plain LoRA adapter and the processor; the folder appears whole or not at all.

    Raises:
        StorageError: The disk is full or read-only. The adapter is then in the system's folder for temporary files.
    """
    try:
        _save_adapter(model, processor, folder)
    except Exception as error:
        fault = storage_fault(error)
        if fault is None:
            raise
        raise StorageError(f"{folder}: {fault}. {_rescue(model, processor)}") from error


def _rescue(model: Any, processor: Any) -> str:
    """Keep what was trained on another file system, if there is one; where, or that it is lost."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="adalora-")) / ADAPTER
        _save_adapter(model, processor, folder)
    except Exception as error:
        return f"Nor could the adapter be written to {tempfile.gettempdir()}: {storage_fault(error) or error}"
    return f"What was trained is in {folder}"


def _save_adapter(model: Any, processor: Any, folder: Path) -> None:
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        # Embeddings are never resized here; PEFT would ask the hub whether they were.
        model.save_pretrained(unfinished, save_embedding_layers=False)
        processor.save_pretrained(unfinished)
        labels = getattr(model.config, "id2label", None)
        write_text(unfinished / "labels.json", json.dumps(labels))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file in one go: a reader sees the old text or the new, never half of it."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
