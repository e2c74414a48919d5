"""Which base model an adapter is trained on, told by its weights.

What was noted when the layer was attached counts where the weight cannot be read later: sharded ones are no longer
whole, and bitsandbytes packs 4-bit ones anew for a CPU at their first use, in another shape.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from adalora.lora.layers.triplets import TripletHandle

SAMPLES = 256


def note_base(handle: TripletHandle) -> None:
    """Remember the base weight as it is now."""
    handle.fingerprint, handle.noted_shape = "", None
    handle.noted_shape = base_shape(handle)
    handle.fingerprint = base_fingerprint(handle)


def base_shape(handle: TripletHandle) -> list[int]:
    """Shape of the frozen weight under one layer; of a packed one that of its packed values, when it was attached."""
    weight = getattr(handle.layer.get_base_layer(), "weight", None)
    if handle.noted_shape is not None and isinstance(weight, Tensor) and not weight.is_floating_point():
        return handle.noted_shape
    return list(getattr(weight, "shape", ()))


@torch.no_grad()
def base_fingerprint(handle: TripletHandle) -> str:
    """A short hash of the frozen weight under one layer: its shape, type, and up to `SAMPLES` of its values.

    Weights that cannot be read (offloaded, or of a type without indexing) are told by shape and type alone.
    """
    weight = getattr(handle.layer.get_base_layer(), "weight", None)
    if not isinstance(weight, Tensor):
        return "none"
    if handle.fingerprint and (isinstance(weight, DTensor) or not weight.is_floating_point()):
        return handle.fingerprint
    digest = hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype}".encode())
    plain = type(weight.data) in (Tensor, torch.nn.Parameter)
    if plain and not weight.is_meta and weight.numel():
        flat = weight.detach().reshape(-1)
        values = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].contiguous().cpu()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
