"""What optimizers remember of many parameters, cut or turned a shape at a time: few operations for any number of them.

Moments of the parameter's own shape go together, whatever the optimizer; other layouts one by one
(`adalora.lora.optimizers.state`). The numbers are the same to rounding, and cuts to the bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adalora.lora.layers.groups import vectors_by_group
from adalora.lora.optimizers.state import FACTORED, SECOND_MOMENTS, WEIGHTS, cut_state, is_scalar, turn_state


def plain_moments(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor] | None:
    """State tensors that follow the parameter entry by entry, by key; None if the optimizer has others as well."""
    state: dict[str, Any] = optimizer.state[parameter]
    if "qmap1" in state or any(all(key in state for key in pair) for pair in FACTORED):
        return None
    found = {key: value for key, value in state.items() if isinstance(value, Tensor) and not is_scalar(value)}
    alike = all(type(t) is Tensor and t.shape == parameter.shape and t.is_floating_point() for t in found.values())
    return found if alike else None


def select_together(tensors: Sequence[Tensor], dims: Sequence[int], kept: Sequence[Sequence[int]]) -> list[Tensor]:
    """`index_select` of each tensor along its dimension, contiguous, in three operations for all of one length.

    Args:
        tensors: Any shapes; those that differ in nothing but the length along their dimension go together.
        dims: The dimension of each.
        kept: What stays of each, ascending.
    """
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for n, (tensor, dim) in enumerate(zip(tensors, dims)):
        groups[tensor.movedim(dim, 0).shape[1:], dim, tensor.dtype, tensor.device].append(n)
    found = [tensor.new_empty(_with(tensor.shape, dim, len(k))) for tensor, dim, k in zip(tensors, dims, kept)]
    for (_, dim, _, device), numbers in groups.items():
        rows = [tensors[n].movedim(dim, 0) for n in numbers]
        starts = accumulate((len(row) for row in rows), initial=0)
        index = torch.tensor([start + i for n, start in zip(numbers, starts) for i in kept[n]], dtype=torch.int64)
        chosen = torch.cat(rows).index_select(0, index.to(device, non_blocking=True))
        parts = torch.split(chosen, [len(kept[n]) for n in numbers])
        torch._foreach_copy_([found[n].movedim(dim, 0) for n in numbers], list(parts))
    return found


def _with(shape: torch.Size, dim: int, length: int) -> list[int]:
    return [length if d == dim else size for d, size in enumerate(shape)]


def cut_states(
    optimizer: Optimizer, parameters: Sequence[nn.Parameter], dims: Sequence[int], kept: Sequence[Sequence[int]]
) -> list[dict[str, Any] | None]:
    """The state of each parameter once only `kept` of its dimension stays; the optimizer is not changed.

    Returns:
        New states; None for a parameter that the optimizer does not know yet.

    Raises:
        CompactionError: The optimizer keeps state of an unknown layout.
    """
    states: list[dict[str, Any] | None] = []
    moments: list[tuple[int, str, Tensor]] = []
    for n, (parameter, dim, stays) in enumerate(zip(parameters, dims, kept)):
        if parameter not in optimizer.state:
            states.append(None)
        elif not stays:
            states.append({})
        elif (plain := plain_moments(optimizer, parameter)) is None:
            index = torch.tensor(stays, dtype=torch.int64, device=parameter.device)
            states.append(cut_state(optimizer, parameter, dim, index))
        else:
            states.append(dict(optimizer.state[parameter]))
            moments += [(n, key, value) for key, value in plain.items()]
    cut = select_together([value for _, _, value in moments], *_of(dims, kept, [n for n, _, _ in moments]))
    for (n, key, _), value in zip(moments, cut):
        state = states[n]
        assert state is not None  # moments are those of known parameters
        state[key] = value
    return states


def _of(
    dims: Sequence[int], kept: Sequence[Sequence[int]], numbers: Sequence[int]
) -> tuple[list[int], list[Sequence[int]]]:
    return [dims[n] for n in numbers], [kept[n] for n in numbers]


def turn_states(
    optimizer: Optimizer, parameters: Sequence[nn.Parameter], dim: int, *, gradient: Tensor, weight: Tensor
) -> None:
    """`turn_state` of many parameters, each with matrices of its own.

    Args:
        optimizer: Any torch optimizer.
        parameters: k parameters whose coordinates change.
        dim: Dimension that counts triplets.
        gradient: For each M with new gradient = M @ old gradient along `dim`, [k, r, r]; for parameters in several
            groups those of all groups of the first, then of the second…
        weight: The same for the weights.
    """
    count = len(gradient) // len(parameters)
    groups: dict[tuple[Any, ...], list[tuple[int, Tensor]]] = defaultdict(list)
    for n, parameter in enumerate(parameters):
        if parameter not in optimizer.state:
            continue
        plain = plain_moments(optimizer, parameter)
        if plain is None:
            mine = slice(n * count, (n + 1) * count)
            turn_state(optimizer, parameter, dim, gradient=gradient[mine], weight=weight[mine])
            continue
        for key, value in plain.items():
            parts = vectors_by_group(value, dim, count).unbind()
            groups[key, value.shape, value.dtype, value.device] += list(enumerate(parts, n * count))
    for (key, _, _, device), members in groups.items():
        matrix_krr = weight if key in WEIGHTS else gradient
        if len(members) < len(gradient):
            matrix_krr = matrix_krr[[n for n, _ in members]]
        matrix_krr = matrix_krr.to(device, torch.float32)
        if key in SECOND_MOMENTS:
            matrix_krr = matrix_krr.square()
        moved = [value for _, value in members]
        turned = matrix_krr @ torch.stack(moved).flatten(2).float()
        torch._foreach_copy_(moved, [row.view(m.shape) for row, m in zip(turned.unbind(), moved)])
