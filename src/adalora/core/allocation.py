"""Scores and a budget -> which triplets are kept (Eq. 5 and 8)."""

from __future__ import annotations

import torch
from torch import Tensor


def allocate(
    scores: Tensor,
    module: Tensor,
    *,
    budget: int,
    min_rank: int | Tensor = 0,
    max_rank: int | Tensor | None = None,
) -> Tensor:
    """Keep the `budget` best triplets of the whole model.

    Exactly `budget` are kept (fewer only where `max_rank` forbids them), equal scores in order of position:
    the same input gives the same mask on every machine. NaN counts as the lowest score.

    Args:
        scores: S of Eq. 9 for all n triplets, [n], any float type.
        module: Number of the module of each triplet, [n], int64, ascending.
        budget: b(t), number of triplets.
        min_rank: Triplets each module keeps at least; together they may not exceed the budget. A tensor [n], int64,
            gives every triplet the floor of its module.
        max_rank: Triplets each module keeps at most; a tensor as well.

    Returns:
        Keep mask [n], bool.

    Raises:
        ValueError: `min_rank` needs more than the budget.
    """
    ranking = rank_scores(scores)
    order, floor, free = split_by_rank(ranking, module, min_rank=min_rank, max_rank=max_rank)
    if int(floor.sum()) > budget:
        raise ValueError(f"{floor_name(min_rank)} needs {int(floor.sum())} triplets, the budget has {budget}")
    # Floors first, then the best of the rest; both in order of score.
    rest = order[free[order]][: budget - int(floor.sum())]
    keep = floor.clone()
    keep[rest] = True
    return keep


def floor_name(min_rank: int | Tensor) -> str:
    """The floor in a message."""
    return f"min_rank={min_rank}" if isinstance(min_rank, int) else "min_rank"


def rank_scores(scores: Tensor) -> Tensor:
    """Scores that can be sorted: float64, NaN below all others, infinities as the largest and lowest number."""
    return torch.nan_to_num(scores.double(), nan=-torch.inf)


def split_by_rank(
    ranking: Tensor, module: Tensor, *, min_rank: int | Tensor, max_rank: int | Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Order of all triplets, best first and stable, and which are kept by a floor or may compete.

    Returns:
        Indices [n], the floors' triplets [n] bool, and those that compete [n] bool: above the floor, below the cap.
    """
    order = torch.sort(ranking, descending=True, stable=True).indices
    place = _place_within_module(order, module)
    floor = place < min_rank
    allowed = torch.ones_like(floor) if max_rank is None else place < max_rank
    return order, floor, allowed & ~floor


def _place_within_module(order: Tensor, module: Tensor) -> Tensor:
    """Place (0 = best) of each triplet among those of its module, given the global order."""
    by_module = torch.sort(module[order], stable=True).indices  # keeps the score order inside a module
    arranged = order[by_module]
    counts = torch.bincount(module)
    starts = torch.cumsum(counts, 0) - counts
    place = torch.empty_like(module)
    place[arranged] = torch.arange(len(module), device=module.device) - starts[module[arranged]]
    return place
