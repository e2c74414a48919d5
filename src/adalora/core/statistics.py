"""What the history keeps of a round of scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BINS = 32


def describe_scores(scores: Tensor, keep: Tensor) -> dict[str, Any]:
    """Threshold and distribution of the scores of one allocation.

    Args:
        scores: [n], any float type; pruned triplets that may not return are -inf.
        keep: Keep mask [n].

    Returns:
        `threshold` (lowest score kept) and `scores` as `report.history` describes it.
    """
    finite = scores[torch.isfinite(scores)].double()
    kept = scores[keep]
    threshold = float(kept.min()) if len(kept) else None
    if not len(finite):
        return {"threshold": threshold, "scores": None}
    q = torch.quantile(
        finite[:: max(1, len(finite) // 10**6)], torch.tensor([0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0]).double()
    )
    names = ("min", "q05", "q25", "q50", "q75", "q95", "max")
    positive = finite[finite > 0].log10()
    low, high = (float(positive.min()), float(positive.max())) if len(positive) else (-1.0, 0.0)
    high = high if high > low else low + 1.0
    return {
        "threshold": threshold,
        "scores": {
            **{name: float(value) for name, value in zip(names, q)},
            "histogram": torch.histc(positive, bins=BINS, min=low, max=high).int().tolist()
            if len(positive)
            else [0] * BINS,
            "edges_log10": torch.linspace(low, high, BINS + 1).tolist(),
            "below_threshold": int((~keep).sum()),
        },
    }
