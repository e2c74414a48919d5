"""Reading adapter files that may be hostile, and writing folders all at once or not at all."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from adalora.errors import AdapterFileError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_JSON_BYTES = 50_000_000
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
_SAFE_NAME = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")


def check_name(name: object, *, where: str) -> str:
    """Return a tensor or module name if it is dot-separated words only.

    Raises:
        AdapterFileError: The name has a slash, an empty part such as `..`, or any other character that has
            no place in the name of a module.
    """
    if not isinstance(name, str) or len(name) > 1000 or not _SAFE_NAME.fullmatch(name):
        raise AdapterFileError(
            f"{where}: unsafe name {str(name)[:80]!r}; allowed are words of A-Z a-z 0-9 _ - with dots"
        )
    return name


def _check_entry(name: str, entry: Any, data_bytes: int, where: str) -> tuple[int, int]:
    """Check one header entry against its own shape and the file's size; return its byte range."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        raise AdapterFileError(f"{where}: header entry of {name!r} is malformed") from None
    if dtype not in _ITEM_BITS or not whole or len(shape) > 8:
        raise AdapterFileError(f"{where}: {name!r} has dtype {dtype!r} and shape {shape!r}, which no tensor has")
    size = math.prod(shape) * _ITEM_BITS[dtype] // 8
    if end - begin != size or end > data_bytes:
        raise AdapterFileError(f"{where}: {name!r} needs {size} bytes, its header says {begin}..{end} of {data_bytes}")
    return begin, end


def read_header(path: Path) -> dict[str, Any]:
    """Read and check the header of a safetensors file before anything else of it is used.

    Args:
        path: A safetensors file.

    Returns:
        Name -> {dtype, shape, data_offsets}, plus `__metadata__` (strings) where the file has it.

    Raises:
        AdapterFileError: The file is cut off, sizes and shapes disagree, or a name is unsafe.
    """
    where = path.name
    total = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise AdapterFileError(f"{where}: {total} bytes are no safetensors file")
        (length,) = struct.unpack("<Q", start)
        if length > min(MAX_HEADER_BYTES, total - 8):
            raise AdapterFileError(
                f"{where}: header of {length} bytes in a file of {total}: cut off, or no safetensors"
            )
        raw = file.read(length)
    header = _parse_json(raw, where)
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterFileError(f"{where}: __metadata__ must map strings to strings")
    ranges = sorted(
        _check_entry(check_name(name, where=where), entry, total - 8 - length, where)
        for name, entry in header.items()
        if name != "__metadata__"
    )
    position = 0
    for begin, end in ranges:
        if begin != position:
            raise AdapterFileError(f"{where}: tensors overlap or leave a hole at byte {min(begin, position)}")
        position = end
    if position != total - 8 - length:
        raise AdapterFileError(f"{where}: {total - 8 - length - position} bytes after the last tensor")
    return header


def _parse_json(raw: bytes, where: str) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in items}) != len(items):
            raise AdapterFileError(f"{where}: a key is there twice")
        return dict(items)

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs)
    except AdapterFileError:
        raise
    except (ValueError, RecursionError) as error:  # also not UTF-8, or a number of thousands of digits
        raise AdapterFileError(f"{where}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise AdapterFileError(f"{where}: a JSON object is wanted, got {type(value).__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a sane size.

    Raises:
        AdapterFileError: The file is missing, too large, or no JSON object.
    """
    if not path.is_file():
        raise AdapterFileError(f"no file {path}")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise AdapterFileError(f"{path}: more than {MAX_JSON_BYTES} bytes of JSON")
    return _parse_json(path.read_bytes(), path.name)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file onto the CPU, after its header was checked."""
    read_header(path)
    return load_file(str(path), device="cpu")


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys; used inside a folder that is not visible yet."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_output(out: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that would destroy something.

    Raises:
        AdapterFileError: `out` is a file, or a folder with content and `overwrite` is off, or with content
            that no export wrote.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise AdapterFileError(f"output {out} exists and is no folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise AdapterFileError(f"output {out} exists and is not empty; name another folder or add --overwrite")
    if not any((out / name).is_file() for name in (CONFIG_NAME, "config.json")):
        raise AdapterFileError(f"output {out} holds neither an adapter nor a model; it is not overwritten")


@contextmanager
def new_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `out`; it becomes `out` when the block ends well, else it is removed.

    Args:
        out: The folder to appear.
        overwrite: Replace an earlier export.

    Raises:
        AdapterFileError: See `check_output`.
    """
    check_output(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        yield work
        os.chmod(work, 0o755)  # mkdtemp makes it private
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
            os.replace(out, old / "old")
            os.replace(work, out)
            shutil.rmtree(old)
        else:
            os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
