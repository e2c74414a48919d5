"""FSDP2 (`fully_shard`): the exact training state in torch's distributed checkpoints, and the plain adapter.

Attach before sharding. Every process calls what is here.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.stateful import Stateful

from adalora.controller import RankController
from adalora.errors import CheckpointError
from adalora.lora.layers.patterns import write_patterns
from adalora.lora.layers.triplets import TripletHandle


class ControllerState(Stateful):
    """A controller for `torch.distributed.checkpoint`: `dcp.save({"adalora": ControllerState(controller), …})`.

    `dcp.load` into the same dictionary goes on from it. The state is whole, so another number of processes may load it.

    Args:
        controller: From `adalora.attach`.
    """

    def __init__(self, controller: RankController) -> None:
        self.controller = controller

    def state_dict(self) -> dict[str, Any]:
        """Tensors as the bytes of a safetensors file, the rest as JSON: sizes may differ between saves."""
        state = self.controller.state_dict()
        tensors = {name: value.cpu().contiguous() for name, value in state.pop("tensors").items()}
        return {"tensors": save(tensors), "description": json.dumps(state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            CheckpointError: It is damaged, or of another run.
        """
        try:
            state = {**json.loads(state_dict["description"]), "tensors": load(state_dict["tensors"])}
        except (ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"the checkpoint's adalora state is damaged ({error}); load an earlier one"
            ) from error
        self.controller.load_state_dict(state)


def save_adapter(controller: RankController, folder: str | os.PathLike[str]) -> None:
    """Write the plain LoRA adapter, without what is pruned; the first process writes, all have to call.

    Args:
        controller: From `adalora.attach`.
        folder: Of the adapter; made if missing.
    """
    model = cast(Any, controller.model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights = cast(dict[str, Tensor], get_model_state_dict(model, options=options))
    several = dist.is_available() and dist.is_initialized()
    if not several or dist.get_rank() == 0:
        names = {id(module): name for name, module in model.named_modules()}
        ranks = _cut(weights, controller.handles, names)
        config = model.peft_config[controller.adapter]
        fields = copy.deepcopy(config.__dict__)
        try:
            write_patterns(model, controller.handles, ranks=ranks)
            # Embeddings are never resized here; PEFT would ask the hub whether they were.
            model.save_pretrained(
                folder, state_dict=weights, selected_adapters=[controller.adapter], save_embedding_layers=False
            )
        finally:
            config.__dict__.update(fields)
    if several:
        dist.barrier()


def _cut(weights: dict[str, Tensor], handles: Sequence[TripletHandle], names: dict[int, str]) -> list[int]:
    """Leave pruned triplets out of a model's state, unless they have grown again since.

    Returns:
        What is left of each layer.
    """
    ranks = []
    for h in handles:
        if h.removed:  # before it was sharded: a layer of a smaller adapter that goes on here
            ranks.append(0)
            continue
        prefix = names[id(h.layer)]
        P_key, Q_key = (
            next(f"{prefix}.{k}" for k in keys if f"{prefix}.{k}" in weights) for keys in (h.P_keys, h.Q_keys)
        )
        P, Q = weights.pop(P_key), weights.pop(Q_key)
        kept = (h.mask | h.as_P(P).any(dim=0)).nonzero().squeeze(1).tolist()
        if kept:
            for key, tensor, dim in ((P_key, P, h.P_dim), (Q_key, Q, h.Q_dim)):
                weights[key] = tensor.index_select(dim, torch.tensor(h.places(kept, dim))).contiguous()
        ranks.append(len(kept))
    return ranks
