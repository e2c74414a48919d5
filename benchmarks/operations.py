"""Counts tensor operations: a figure of speed that is the same on every run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# They return a view or an allocation and touch no element.
FREE = {
    "detach",
    "alias",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
    "promote_types",
}


class OperationCounter(TorchDispatchMode):
    """Counts the operations that reach a kernel; views and empty allocations are left out.

    Copies from an accelerator to the host (`item`, `bool`, `nonzero`, `.cpu()`) are counted apart in `syncs`: on CUDA
    each of them waits for the device.

    Attributes:
        operations: Calls by operator name.
        syncs: Calls that would wait for a CUDA device, by operator name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then run."""
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in FREE and name != "_unsafe_view":
            self.operations[name] += 1
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select"):
            self.syncs[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """Operations, views not counted."""
        return sum(self.operations.values())


def count(action: Callable[[], Any]) -> OperationCounter:
    """Run `action` once and count what it dispatches, its backward included."""
    with OperationCounter() as counter:
        action()
    return counter
