"""Faults of the machine that other libraries report in their own ways: a full disk, exhausted memory."""

from __future__ import annotations

import errno
import re

_STORAGE = {
    errno.ENOSPC: "the disk is full: free some space, or choose another output folder",
    errno.EDQUOT: "the quota is used up: free some space, or choose another output folder",
    errno.EROFS: "the file system is read-only: choose another output folder",
    errno.EACCES: "no permission to write there: choose another output folder",
    errno.EPERM: "no permission to write there: choose another output folder",
    errno.EFBIG: "the file is larger than the file system or `ulimit -f` allows: choose another output folder",
}
# The libraries under safetensors and tokenizers have the number in their text; torch.save has not even that.
_OS_ERROR = re.compile(r"(?:\(os error |Os \{ code: )(\d+)")
_CUT_OFF = re.compile(r"PytorchStreamWriter failed|unexpected pos \d+ vs \d+")
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)


def storage_fault(error: BaseException) -> str | None:
    """What is wrong with the place that a file should be written to, and the cure; None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _OS_ERROR.search(str(error))):
        number = int(found[1])
    if number in _STORAGE:
        return _STORAGE[number]
    return _STORAGE[errno.ENOSPC] if isinstance(error, RuntimeError) and _CUT_OFF.search(str(error)) else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, had no memory left; torch says so in three ways."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))
