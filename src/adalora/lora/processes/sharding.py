"""Parameters spread over processes (FSDP2's `fully_shard`): whole for a moment, then each process's rows again.

`fully_shard` cuts every parameter along its first dimension: of a Linear layer's Q a process holds some triplets, of P
some rows of all triplets. Factors are small beside the model, so scores, masks and decompositions work on whole ones,
by the code that serves one process: `Shards.whole` is where they come from and go to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from adalora.errors import ConfigError
from adalora.lora.layers.fingerprint import note_base
from adalora.lora.layers.triplets import TripletHandle

# The first is the newer name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Shards:
    """The factors of one adapter, which may become sharded at any time before the first step."""

    def __init__(self, handles: Sequence[TripletHandle]) -> None:
        self._handles = handles
        for h in handles:
            note_base(h)  # afterwards no process can read the whole base weight
        self._whole: dict[nn.Parameter, nn.Parameter] = {}  # sharded -> whole; shells are kept, their memory is not
        self._states: dict[nn.Parameter, _WholeState] = {}
        self._open = False

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The sharded parameters; empty for an ordinary model."""
        if self._open:
            return list(self._whole)
        # Every step asks, and a plain parameter is told fastest by its type.
        unusual = [p for h in self._handles for p in h.parameters if type(p) is not nn.Parameter]
        return [p for p in unusual if isinstance(p, DTensor)]

    @property
    def mesh(self) -> DeviceMesh | None:
        """The processes that share the factors; None for an ordinary model."""
        return next((cast(DTensor, p).device_mesh for p in self.parameters), None)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, handles give whole parameters and gradients; afterwards each process keeps its rows of them.

        Every process has to come here. Nothing at all happens for an ordinary model, or inside another `whole`.

        Raises:
            ConfigError: Something else than FSDP2 has cut the factors.
        """
        parameters = [] if self._open else self.parameters
        if not parameters:
            yield
            return
        self._fill(parameters)
        for h in self._handles:
            if h.sharded:
                h.whole = {factor: self._whole.get(p, p) for factor, (p, _) in h.factors.items()}
        self._open = True
        try:
            yield
            self._write_back()
        finally:
            self._open = False
            self._states = {}
            for h in self._handles:
                h.whole = {}
            for shell in self._whole.values():
                shell.grad = None
                shell.data = shell.data.new_empty(0)

    @torch.no_grad()
    def _fill(self, parameters: list[nn.Parameter]) -> None:
        with_gradient = [p for p in parameters if p.grad is not None]
        tensors = gather([p.detach() for p in parameters] + [cast(Tensor, p.grad) for p in with_gradient])
        self._whole = {p: self._whole[p] if p in self._whole else nn.Parameter(torch.empty(0)) for p in parameters}
        for parameter, value in zip(parameters, tensors):
            shell = self._whole[parameter]
            shell.data = value
            shell.requires_grad_(parameter.requires_grad)
        for parameter, value in zip(with_gradient, tensors[len(parameters) :]):
            self._whole[parameter].grad = value

    @torch.no_grad()
    def _write_back(self) -> None:
        for parameter, shell in self._whole.items():
            sharded = cast(DTensor, parameter)
            _copy_rows(sharded, shell.detach())
            if shell.grad is None or parameter.grad is not None:
                parameter.grad = None if shell.grad is None else _copy_rows(parameter.grad, shell.grad)
            else:
                parameter.grad = _cut(shell.grad, sharded)
        for state in self._states.values():
            state.write_back()

    def of(self, optimizer: Optimizer | None) -> Optimizer | None:
        """The optimizer as it looks inside `whole`: it trains the whole parameters and holds their whole moments."""
        if optimizer is None or not self._open:
            return optimizer
        return cast(Optimizer, _WholeOptimizer(optimizer, self._whole, self._states))


def gather(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Whole values of sharded tensors, on every process, by one collective for each type.

    Raises:
        ConfigError: A tensor is not cut as FSDP2 cuts, along its first dimension alone.
    """
    found: dict[int, Tensor] = {}
    groups: dict[tuple[Any, torch.dtype, torch.device], list[int]] = defaultdict(list)
    for number, tensor in enumerate(tensors):
        mesh, dim = _sharding(cast(DTensor, tensor))
        groups[mesh.get_group(dim), tensor.dtype, tensor.device].append(number)
    for (group, _, _), numbers in groups.items():
        world = dist.get_world_size(group)
        parts = [_padded(cast(DTensor, tensors[n]), world) for n in numbers]
        mine = torch.cat(parts)
        all_of_them = mine.new_empty(world * len(mine))
        _all_gather(all_of_them, mine, group=group)
        columns = torch.split(all_of_them.view(world, -1), [len(part) for part in parts], dim=1)
        for number, column in zip(numbers, columns):
            shape = tensors[number].shape
            found[number] = column.reshape(-1, *shape[1:])[: shape[0]]
    return [found[number] for number in range(len(tensors))]


def rows_of(whole: Tensor, like: DTensor) -> Tensor:
    """This process's rows of a whole tensor, if it is cut as `like` is. A view."""
    mesh, dim = _sharding(like)
    size = -(-len(whole) // mesh.size(dim))
    start = min(len(whole), size * mesh.get_local_rank(dim))
    return whole[start : start + size]


def _sharding(tensor: DTensor) -> tuple[DeviceMesh, int]:
    """The mesh, and its dimension that cuts rows; over the others (hybrid sharding) the rows are replicated."""
    cut = [n for n, placement in enumerate(tensor.placements) if type(placement) is not Replicate]
    only = tensor.placements[cut[0]] if len(cut) == 1 else None
    if type(only) is not Shard or only.dim != 0:
        raise ConfigError(
            f"the adapter's parameters are distributed as {tuple(tensor.placements)}: only FSDP2's fully_shard with "
            "shards along the first dimension is supported. Leave the adapter out of other sharding (tensor "
            "parallelism, shard_placement_fn): fully_shard(…, ignored_params={…})"
        )
    return tensor.device_mesh, cut[0]


def _padded(tensor: DTensor, world: int) -> Tensor:
    """This process's rows, flat, filled up to what the first process holds."""
    local = tensor.to_local()
    missing = -(-tensor.shape[0] // world) - len(local)
    if missing:
        local = torch.cat([local, local.new_zeros(missing, *local.shape[1:])])
    return local.reshape(-1)


def _copy_rows(sharded: Any, whole: Tensor) -> Any:
    """Put this process's rows of a whole tensor into a sharded one."""
    sharded.to_local().copy_(rows_of(whole, sharded))
    return sharded


def _cut(whole: Tensor, like: DTensor) -> DTensor:
    """A whole tensor as a sharded one of its own."""
    local = rows_of(whole, like).clone()
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


class _WholeOptimizer:
    """An optimizer's groups and state, with whole parameters and moments in place of the sharded ones."""

    def __init__(
        self,
        optimizer: Optimizer,
        whole: dict[nn.Parameter, nn.Parameter],
        states: dict[nn.Parameter, _WholeState],
    ) -> None:
        self._optimizer = optimizer
        self.param_groups = [
            {**group, "params": [whole.get(p, p) for p in group["params"]]} for group in optimizer.param_groups
        ]
        self.state = _WholeStates(optimizer, whole, states)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class _WholeStates:
    def __init__(
        self,
        optimizer: Optimizer,
        whole: dict[nn.Parameter, nn.Parameter],
        states: dict[nn.Parameter, _WholeState],
    ) -> None:
        self._states = optimizer.state
        self._sharded = {shell: parameter for parameter, shell in whole.items()}
        self._opened = states

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return self._sharded.get(parameter, parameter) in self._states

    def __getitem__(self, parameter: nn.Parameter) -> Any:
        if parameter not in self._sharded:
            return self._states[parameter]
        if parameter not in self._opened:
            self._opened[parameter] = _WholeState(self._states[self._sharded[parameter]])
        return self._opened[parameter]

    def get(self, parameter: nn.Parameter, default: Any = None) -> Any:
        known = parameter in self
        return self[parameter] if known else default


class _WholeState(MutableMapping[str, Any]):
    """One parameter's state: a moment is gathered when it is asked for, and cut again when all is done."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state
        self._gathered: dict[str, Tensor] = {}

    def write_back(self) -> None:
        """Keep this process's rows."""
        for key, value in self._gathered.items():
            _copy_rows(self._state[key], value)

    def __getitem__(self, key: str) -> Any:
        value = self._state[key]
        if not isinstance(value, DTensor):
            return value
        if key not in self._gathered:
            self._gathered[key] = gather([value])[0]
        return self._gathered[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if isinstance(self._state.get(key), DTensor):
            self._gathered[key] = value
        else:
            self._state[key] = value

    def __delitem__(self, key: str) -> None:
        self._gathered.pop(key, None)
        del self._state[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)
