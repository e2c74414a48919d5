"""Which base model an adapter is trained on, told by its weights."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from adalora.lora.triplets import TripletHandle

SAMPLES = 256


@torch.no_grad()
def base_fingerprint(handle: TripletHandle) -> str:
    """A short hash of the frozen weight under one layer: its shape, type, and up to `SAMPLES` of its values.

    Weights that cannot be read (offloaded, or of a type without indexing) are told by shape and type alone; sharded
    ones by what was noted before they were.
    """
    weight = getattr(handle.layer.get_base_layer(), "weight", None)
    if not isinstance(weight, Tensor):
        return "none"
    if isinstance(weight, DTensor) and handle.fingerprint:
        return handle.fingerprint
    digest = hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype}".encode())
    plain = type(weight.data) in (Tensor, torch.nn.Parameter)
    if plain and not weight.is_meta and weight.numel():
        flat = weight.detach().reshape(-1)
        values = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].contiguous().cpu()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
