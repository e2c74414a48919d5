"""Several processes that train one model (DDP, FSDP2): they have to make the same decisions."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from adalora.errors import CompactionError
from adalora.lora.layers.triplets import TripletHandle


def wrappers_of(model: nn.Module) -> list[DistributedDataParallel]:
    """The DDP wrappers around a model, or around something that holds it."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    wrappers = [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)]
    return [w for w in wrappers if any(module is model for module in w.modules())]


class Replicas:
    """The processes that train a model together; none where one trains it alone.

    Data parallel gradients are equal, so the processes would decide alike without a word; but a step under `no_sync`,
    or processors of two kinds, would let them part silently. So rank 0 decides.

    Args:
        model: The model.
        mesh: What its parameters are sharded over, if they are.
    """

    def __init__(self, model: nn.Module, *, mesh: DeviceMesh | None = None) -> None:
        self.wrappers = wrappers_of(model)
        self._groups: list[Any] = []
        if mesh is not None:
            self._groups, self._device = mesh.get_all_groups(), torch.device(mesh.device_type)
        elif self.wrappers:
            self._groups = [self.wrappers[0].process_group]
            self._device = next(self.wrappers[0].parameters()).device

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        return any(dist.get_world_size(group) > 1 for group in self._groups)

    def share(self, tensor: Tensor) -> Tensor:
        """Rank 0's values, on every process; in place where the device allows."""
        if not self.several:
            return tensor
        moved = tensor.to(self._device)
        for group in self._groups:  # the first row to the others, then the first of each row to its own
            dist.broadcast(moved, dist.get_global_rank(group, 0), group=group)
        if moved is not tensor:  # pragma: no cover - a GPU's group and a tensor of the CPU
            tensor.copy_(moved)
        return tensor

    @torch.no_grad()
    def share_layers(self, handles: Sequence[TripletHandle], optimizer: Optimizer | None) -> None:
        """Rank 0's factors and moments: after a decomposition, whose signs and last bits hang on the processor."""
        if not self.several:
            return
        for h in handles:
            for parameter, _ in h.factors.values():
                self.share(parameter.data)
                state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
                for value in state.values():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        self.share(value)

    def retire_wrappers(self) -> None:
        """Let wrappers whose buckets no longer fit refuse to train, instead of letting processes part silently."""

        def refuse(module: nn.Module, inputs: Any) -> None:
            if torch.is_grad_enabled():
                raise CompactionError(
                    "the model has become smaller since this DistributedDataParallel was made; wrap it again: "
                    "model = DistributedDataParallel(model.module)"
                )

        for wrapper in self.wrappers:
            wrapper.register_forward_pre_hook(refuse)
