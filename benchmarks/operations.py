"""Counts tensor operations: a figure of speed that is the same on every run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class DeviceWaits(TorchDispatchMode):
    """Counts what makes the host wait for a device: questions, and copies that are not told to go by themselves.

    Works for any device but the CPU; on `meta`, where there are no values, most questions are errors besides.

    Attributes:
        waits: Calls by operator name; copies with their direction.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then run."""
        name = func._schema.name.removeprefix("aten::")
        out = func(*args, **(kwargs or {}))
        tensors = _tensors(args)
        devices = {t.device.type for t in tensors}
        if name in ASKS and devices - {"cpu"}:
            self.waits[name] += 1
        elif name in ("_to_copy", "copy_", "_foreach_copy_", "copy"):
            path = [t.device.type for t in (tensors[-1], *_tensors([out] if isinstance(out, Tensor) else args[:1]))][:2]
            if len(set(path)) > 1 and not _by_itself(func, args, kwargs or {}):
                self.waits[f"{path[0]} to {path[1]}"] += 1
        return out


ASKS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "_unique2", "unique_dim")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _by_itself(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a copy was called with `non_blocking=True`."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args)), **kwargs}
    return bool(given.get("non_blocking", False))


def count(action: Callable[[], Any]) -> OperationCounter:
    """Run `action` once and count what it dispatches, its backward included."""
    with OperationCounter() as counter:
        action()
    return counter
