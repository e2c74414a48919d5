"""The budget of the config in triplets of one model."""

from __future__ import annotations

from adalora.config import AdaLoraConfig
from adalora.errors import ConfigError
from adalora.lora.triplets import TripletHandle


def target_triplets(config: AdaLoraConfig, handles: list[TripletHandle]) -> int:
    """The target budget in triplets.

    Raises:
        ConfigError: It is below 1 or above what the LoraConfig starts with.
    """
    initial = sum(h.rank for h in handles)
    if config.target_rank is not None:
        target = round(config.target_rank * len(handles))
    else:
        assert config.total_rank is not None  # the config has exactly one budget
        target = config.total_rank
    if target > initial:
        wanted = -(-target // len(handles))
        raise ConfigError(
            f"the target of {target} triplets is above the {initial} that the model starts with "
            f"({len(handles)} modules): LoraConfig(r={max(wanted, round(1.5 * wanted))}, …) or a smaller target_rank"
        )
    if target < 1:
        raise ConfigError(f"target_rank={config.target_rank} leaves no triplet in {len(handles)} modules")
    return target


def adapter_size(handles: list[TripletHandle]) -> tuple[int, int]:
    """Parameters and bytes that the adapter's factors take in memory."""
    tensors = [p for h in handles if not h.removed for p in (h.P_parameter, h.Q_parameter)]
    return sum(p.numel() for p in tensors), sum(p.numel() * p.element_size() for p in tensors)
