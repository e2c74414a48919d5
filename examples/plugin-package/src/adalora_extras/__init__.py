"""An importance score and a schedule for adalora."""

import math

from torch import Tensor


def lower_bound(sensitivity: Tensor, uncertainty: Tensor) -> Tensor:
    """Ī - Ū: what a weight is worth if the estimate is too high by its usual deviation."""
    return sensitivity - uncertainty


def cosine(done: float) -> float:
    """Half a cosine: slow at both ends."""
    return (1 + math.cos(math.pi * done)) / 2
