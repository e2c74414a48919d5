"""What an optimizer remembers of a parameter: cut to the triplets that stay, or turned with them.

Each kind of optimizer keeps its state in another layout; a layout is known by its keys, never by the optimizer's name,
so that subclasses and wrappers are served as well. What is not known is refused.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adalora.errors import CompactionError
from adalora.lora.layers.groups import vectors_by_group

# Row and column moments of Adafactor, as torch and transformers call them.
FACTORED = (("row_var", "col_var"), ("exp_avg_sq_row", "exp_avg_sq_col"))
# Moments of bitsandbytes with what decodes them: value, code, largest value of each block.
BLOCKWISE = (("state1", "qmap1", "absmax1"), ("state2", "qmap2", "absmax2"))
BLOCK = 256
SMALLEST_8BIT = 4096
SECOND_MOMENTS = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "state2", "row_var", "exp_avg_sq_row"}
WEIGHTS = {"z"}  # schedule-free keeps a second copy of the weights


def find_optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer | None:
    """The optimizer that holds one of these parameters, wherever it is in the process.

    For one that has not made a step yet, and so was not seen by the hook. A look at all living objects: only where
    ranks change under an optimizer's hands.
    """
    mine = {id(p) for p in parameters}
    for candidate in gc.get_objects():
        # type(), not isinstance: lazy proxies would answer, or warn, when asked for their class
        if issubclass(type(candidate), Optimizer) and "param_groups" in candidate.__dict__:
            groups = candidate.param_groups
            if any(id(p) in mine for group in groups for p in group["params"]) and _is_torchs(candidate):
                found: Optimizer = candidate
                return found
    return None


def _is_torchs(optimizer: Optimizer) -> bool:
    """Whether this is the optimizer itself, not a wrapper of another library around it."""
    return not isinstance(getattr(optimizer, "optimizer", None), Optimizer)


def is_scalar(value: Tensor) -> bool:
    """Whether it is a number, such as Adam's step, that does not follow the parameter's coordinates."""
    return value.dim() <= 1 and value.numel() <= 1


def weight_copies(optimizer: Optimizer | None, parameter: nn.Parameter) -> list[Tensor]:
    """Further copies of the weights that the optimizer keeps and goes back to."""
    state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
    return [state[key] for key in WEIGHTS if key in state and state[key].shape == parameter.shape]


def drop_parameters(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Take parameters out of the optimizer, state and all."""
    gone = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        for parameter in [p for p in group["params"] if id(p) in gone]:
            optimizer.state.pop(parameter, None)
        group["params"] = [p for p in group["params"] if id(p) not in gone]


def cut_state(optimizer: Optimizer, parameter: nn.Parameter, dim: int, index: Tensor) -> dict[str, Any]:
    """The state of `parameter` once only `index` of its dimension `dim` stays; the optimizer is not changed.

    Args:
        optimizer: Any torch optimizer.
        parameter: Still at its full size.
        dim: Dimension that counts triplets.
        index: What stays, [r], int64, ascending.

    Raises:
        CompactionError: The optimizer keeps state of an unknown layout.
    """
    if not len(index) or parameter not in optimizer.state:
        return {}

    def cut(tensor: Tensor, dim: int) -> Tensor:
        return tensor.index_select(dim, index.to(tensor.device)).contiguous()

    return _map_state(optimizer, parameter, dim, lambda key, tensor, dim: cut(tensor, dim))


def turn_state(optimizer: Optimizer, parameter: nn.Parameter, dim: int, *, gradient: Tensor, weight: Tensor) -> None:
    """Write the state of `parameter` in new coordinates of its dimension `dim`.

    First moments turn as gradients do, second moments with the squared entries, which leaves out correlations between
    triplets. State of an unknown layout starts anew.

    Args:
        optimizer: Any torch optimizer.
        parameter: Whose coordinates change.
        dim: Dimension that counts triplets.
        gradient: M with new gradient = M @ old gradient along `dim`, [r, r], or [groups, r, r] where each group of a
            convolution's outputs has its own.
        weight: The same for the weights.
    """
    if parameter not in optimizer.state:
        return

    def turn(key: str, tensor: Tensor, dim: int) -> Tensor:
        matrix = (weight if key in WEIGHTS else gradient).to(tensor.device, torch.float32)
        matrix = matrix.view(-1, *matrix.shape[-2:])
        if key in SECOND_MOMENTS or any(key in pair for pair in FACTORED):
            matrix = matrix.square()
        # torchao's packed moments cannot be viewed; their numbers can, and copying packs them again.
        numbers = tensor if type(tensor) is Tensor else tensor.dequantize()
        moved = vectors_by_group(numbers.float(), dim, len(matrix))
        turned = (matrix @ moved.flatten(2)).view(moved.shape).movedim(1, dim + 1).flatten(0, 1)
        return turned.to(tensor.dtype).contiguous()

    try:
        new = _map_state(optimizer, parameter, dim, turn)
    except CompactionError:
        optimizer.state.pop(parameter)
        return
    state = optimizer.state[parameter]
    for key, value in new.items():
        if isinstance(value, Tensor) and isinstance(state[key], Tensor) and value.shape == state[key].shape:
            state[key].copy_(value)
        else:
            state[key] = value


Change: TypeAlias = Callable[[str, Tensor, int], Tensor]


def _map_state(optimizer: Optimizer, parameter: nn.Parameter, dim: int, change: Change) -> dict[str, Any]:
    """The parameter's state with `change(key, tensor, dim)` done to every tensor that follows its coordinates."""
    state: dict[str, Any] = dict(optimizer.state[parameter])
    done: set[str] = set()
    for pair in FACTORED:
        if all(key in state for key in pair):
            done.update(pair)
            _change_factored(state, *pair, ndim=parameter.dim(), dim=dim, change=change)
    if "qmap1" in state:
        done.update(key for triple in BLOCKWISE for key in triple)
        _change_blockwise(optimizer, state, parameter, dim=dim, change=change)
    for key, value in state.items():
        if key in done or not isinstance(value, Tensor) or is_scalar(value):
            continue
        refused = (
            f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} and type {value.dtype} for a "
            f"parameter of shape {tuple(parameter.shape)}: it cannot be cut with it. Set compact=False to keep "
            "pruned triplets masked, or use AdamW, SGD, Adafactor, Lion, or bitsandbytes' or schedule-free AdamW"
        )
        if value.shape != parameter.shape or not value.is_floating_point():
            raise CompactionError(refused)
        try:
            state[key] = change(key, value, dim)
        except (NotImplementedError, RuntimeError) as error:  # quantised state behind a tensor subclass
            raise CompactionError(refused) from error
    return state


def _change_factored(state: dict[str, Any], row: str, column: str, *, ndim: int, dim: int, change: Change) -> None:
    """Adafactor's row and column moments; the estimate row·column / mean(row) follows its coordinates."""
    rows, columns = state[row], state[column]
    short = rows.dim() < ndim  # transformers drops the averaged dimension, torch keeps it with length 1
    if short:
        rows, columns = rows.unsqueeze(-1), columns.unsqueeze(-2)
    if dim == ndim - 1:
        columns = change(column, columns, dim)
    elif dim == ndim - 2:
        before, rows = rows.mean(dim=-2, keepdim=True), change(row, rows, dim)
        columns = columns * (rows.mean(dim=-2, keepdim=True) / before).nan_to_num_(1.0)
    else:
        rows, columns = change(row, rows, dim), change(column, columns, dim)
    state[row] = (rows.squeeze(-1) if short else rows).contiguous()
    state[column] = (columns.squeeze(-2) if short else columns).contiguous()


def _change_blockwise(
    optimizer: Optimizer, state: dict[str, Any], parameter: nn.Parameter, *, dim: int, change: Change
) -> None:
    """Moments of bitsandbytes, quantised in blocks of the flat tensor: decoded, changed, encoded as a new tensor is.

    bitsandbytes keeps small tensors in 32 bits, and so do we.
    """
    from bitsandbytes import functional

    if state["absmax1"].numel() != -(-parameter.numel() // BLOCK):
        raise CompactionError(f"{type(optimizer).__name__} quantises in blocks of another size than {BLOCK}")
    smallest = getattr(getattr(optimizer, "args", None), "min_8bit_size", SMALLEST_8BIT)
    for value, code, largest in BLOCKWISE:
        if code not in state:
            continue
        full = functional.dequantize_blockwise(state[value], absmax=state[largest], code=state[code], blocksize=BLOCK)
        new = change(value, full.float().view(parameter.shape), dim)
        if new.numel() < smallest:
            state[value] = new
            del state[code], state[largest]
            continue
        state[value], quantised = functional.quantize_blockwise(new, code=state[code], blocksize=BLOCK)
        state[largest] = quantised.absmax
