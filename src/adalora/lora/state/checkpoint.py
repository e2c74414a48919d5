"""The exact training state on disk: `adalora_state.safetensors` and `adalora_state.json`.

Both are written to temporary files and renamed, the JSON last: it holds the checksums of the tensors and of whatever
else lies in the folder, so a checkpoint is whole if, and only if, its JSON is there and every checksum holds.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from adalora.errors import CheckpointError
from adalora.faults import storage_fault

TENSORS, DESCRIPTION = "adalora_state.safetensors", "adalora_state.json"
FORMAT = 1
MAX_JSON_BYTES = 500_000_000
_STEP_FOLDER = re.compile(r"(?:.*[-_])?(\d+)")
# What a trainer writes beside ours after ours, or changes later.
_NOT_COVERED = re.compile(rf"{TENSORS}|{DESCRIPTION}|trainer_state\.json|README\.md|rng_state_\d+\.pth|\..*")
GO_ON = "resume from an earlier checkpoint: adalora.latest_checkpoint(folder) gives the newest whole one"


def write_state(folder: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write a controller's state into a folder, atomically, and seal the files that are there already.

    Args:
        folder: A checkpoint's folder; made if missing.
        state: From `RankController.state_dict`: `tensors` and JSON-ready values.

    Raises:
        CheckpointError: The disk is full, or the folder cannot be written to.
    """
    path = Path(folder)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state["tensors"].items()}
    data = save(tensors)
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_file(path / TENSORS, data)
        files = {TENSORS: _entry(data)}
        for file in sorted(path.iterdir()):
            if file.is_file() and not _NOT_COVERED.fullmatch(file.name):
                files[file.name] = {"bytes": file.stat().st_size, "sha256": _hash_file(file)}
        # Through JSON once: the checksum is of what a reader will see.
        body = {**{k: v for k, v in state.items() if k != "tensors"}, "files": files}
        body = json.loads(json.dumps(body))
        text = json.dumps({"format": FORMAT, "sha256": _hash(_canonical(body)), "state": body}, indent=1) + "\n"
        write_file(path / DESCRIPTION, text.encode())
    except OSError as error:
        cure = storage_fault(error) or "the checkpoint is not whole"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            cure += ", or keep fewer checkpoints (save_total_limit=2)"
        raise CheckpointError(f"{path}: {error.strerror}; {cure}. Earlier checkpoints are untouched") from error


def read_state(folder: str | os.PathLike[str], *, rest: bool = True) -> dict[str, Any]:
    """Read and verify a state.

    Args:
        folder: A checkpoint's folder.
        rest: Also verify the other files of the checkpoint (adapter, optimizer, …).

    Returns:
        What was given to `write_state`, tensors on the CPU.

    Raises:
        CheckpointError: A file is missing, cut off, changed, or of something else; the message names it.
    """
    path = Path(folder)
    body = _read_description(path)
    files: dict[str, Any] = body.pop("files")
    if not rest:
        files = {TENSORS: files.get(TENSORS)}
    for name, entry in files.items():
        if Path(name).name != name:
            raise CheckpointError(f"{path / DESCRIPTION}: {name!r} is no name of a file in that folder; {GO_ON}")
        _verify(path / name, entry)
    trainer_state = path / "trainer_state.json"
    if rest and "training_args.bin" in files:  # the Trainer's: it writes this file last, after ours
        if not trainer_state.is_file():
            raise CheckpointError(f"{trainer_state}: missing, the checkpoint was not written to its end; {GO_ON}")
        _parse(trainer_state)
    try:
        body["tensors"] = load((path / TENSORS).read_bytes())
    except SafetensorError as error:
        raise CheckpointError(f"{path / TENSORS}: not a safetensors file ({error}); {GO_ON}") from error
    return body


def is_whole(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a checkpoint with our state whose every checksum holds."""
    try:
        read_state(folder)
    except CheckpointError:
        return False
    return True


def latest_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest whole checkpoint in a folder of checkpoints, or None where there is none.

    Use it where a run may have been killed while it saved:
    `trainer.train(resume_from_checkpoint=adalora.latest_checkpoint("out"))`.

    Args:
        folder: The trainer's `output_dir`; checkpoints are its sub-folders whose names end in a number.
    """
    path = Path(folder)
    if not path.is_dir():
        return None
    numbered = [(int(m[1]), f) for f in path.iterdir() if f.is_dir() and (m := _STEP_FOLDER.fullmatch(f.name))]
    return next((str(f) for _, f in sorted(numbered, reverse=True) if is_whole(f)), None)


def explain_differences(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Lines such as `target_rank: 2 in the checkpoint, 3 here` for every entry that differs."""
    keys = [*wanted, *(key for key in found if key not in wanted)]
    missing = "nothing"
    return [
        f"{key}: {wanted.get(key, missing)} in the checkpoint, {found.get(key, missing)} here"
        for key in keys
        if wanted.get(key, missing) != found.get(key, missing)
    ]


def _read_description(path: Path) -> dict[str, Any]:
    file = path / DESCRIPTION
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; {GO_ON}")
    if not file.is_file():
        raise CheckpointError(
            f"{path}: no {DESCRIPTION}, so this checkpoint is not ours, or was not written to its end. "
            f"If it is ours, {GO_ON}. To go on from a plain LoRA adapter, load it with "
            "peft.PeftModel.from_pretrained(base, folder, is_trainable=True) and attach to that"
        )
    value = _parse(file)
    if value.get("format") != FORMAT or not isinstance(value.get("state"), dict):
        raise CheckpointError(f"{file}: format {value.get('format')!r}, this version reads {FORMAT}; {GO_ON}")
    body: dict[str, Any] = value["state"]
    if value.get("sha256") != _hash(_canonical(body)) or not isinstance(body.get("files"), dict):
        raise CheckpointError(f"{file}: damaged, its checksum does not hold; {GO_ON}")
    return body


def _parse(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{file}: {file.stat().st_size} bytes, which no checkpoint of ours has")
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cut off or damaged ({error}); {GO_ON}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: not a checkpoint's description; {GO_ON}")
    return value


def _verify(file: Path, entry: Any) -> None:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{file}: nothing is known of it; {GO_ON}")
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; {GO_ON}")
    if file.stat().st_size != entry.get("bytes"):
        raise CheckpointError(f"{file}: {file.stat().st_size} bytes, {entry.get('bytes')} were written; {GO_ON}")
    if _hash_file(file) != entry.get("sha256"):
        raise CheckpointError(f"{file}: damaged, its checksum does not hold; {GO_ON}")


def write_file(path: Path, data: bytes) -> None:
    """All or nothing: a reader, or a killed process, sees the old file or the new."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _hash(file.read())
        )


def _entry(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": _hash(data)}
