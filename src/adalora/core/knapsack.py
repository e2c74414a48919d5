"""Scores, costs and a budget -> the triplets of the highest total importance that the budget can buy.

Triplets of one module cost the same, and a model has few different shapes. Among triplets of one cost the best come
first, so the choice is how many of each cost: a search over a handful of numbers instead of thousands.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adalora.core.allocation import floor_name, rank_scores, split_by_rank

NODES = 100_000  # bounds evaluated at most; a real model takes some hundred


def allocate_costs(
    scores: Tensor,
    module: Tensor,
    *,
    costs: Tensor,
    budget: int,
    min_rank: int | Tensor = 0,
    max_rank: int | Tensor | None = None,
) -> Tensor:
    """Keep the triplets whose scores have the highest sum at a total cost within `budget`.

    What is left over buys further triplets where one fits, so that ties and scores of 0 waste nothing. Equal scores in
    order of position. Exact, but for made-up costs and scores that need more than `NODES` bounds (a subset-sum
    problem): then the best choice found.

    Args:
        scores: S for all n triplets, [n], any float type, at least 0. NaN counts as the lowest, -inf is never kept
            but for a floor.
        module: Number of the module of each triplet, [n], int64, ascending.
        costs: Cost of each triplet, [n], positive int64, the same within a module.
        budget: In the unit of `costs`.
        min_rank: Triplets each module keeps at least; together they may not cost more than the budget. A tensor [n],
            int64, gives every triplet the floor of its module.
        max_rank: Triplets each module keeps at most; a tensor as well.

    Returns:
        Keep mask [n], bool.

    Raises:
        ValueError: `min_rank` costs more than the budget.
    """
    ranking = rank_scores(scores)
    order, floor, free = split_by_rank(ranking, module, min_rank=min_rank, max_rank=max_rank)
    left = budget - int(costs[floor].sum())
    if left < 0:
        raise ValueError(f"{floor_name(min_rank)} costs {int(costs[floor].sum())}, the budget has {budget}")
    free &= scores != -torch.inf
    queue = order[free[order]]
    finite = ranking[queue]
    finite = finite.clamp(min=0, max=_largest(finite) * 1e6 + 1)  # an infinite score beats any sum of others
    prices = sorted(set(costs[queue].tolist()))
    classes = [queue[costs[queue] == price] for price in prices]
    values = [finite[costs[queue] == price].numpy() for price in prices]
    keep = floor.clone()
    for members, count in zip(classes, most_valuable(values, prices, budget=left)):
        keep[members[:count]] = True
    left = budget - int(costs[keep].sum())
    for i in queue[~keep[queue]].tolist():
        if costs[i] <= left:
            keep[i] = True
            left -= int(costs[i])
    return keep


def _largest(values: Tensor) -> float:
    ordinary = values[values < torch.finfo(values.dtype).max]
    return float(ordinary.max()) if len(ordinary) else 0.0


def most_valuable(values: list[NDArray[np.float64]], prices: list[int], *, budget: int) -> list[int]:
    """How many of each class to take: the highest total value at a total price within `budget`.

    Args:
        values: One array a class, falling, at least 0.
        prices: Price of an item of each class, positive.
        budget: At least 0.

    Returns:
        Numbers of items, each class's first ones.
    """
    if not values:
        return []
    # The class with the most room comes last: the deepest level of the search is a direct look-up.
    order = sorted(range(len(values)), key=lambda c: len(values[c]))
    search = _Search([values[c] for c in order], [prices[c] for c in order])
    found = search.run(budget)
    counts = [0] * len(values)
    for c, count in zip(order, found):
        counts[c] = count
    return counts


@dataclass
class _Relaxed:
    """Classes from one on, any fraction of an item allowed: by value per price, the best first."""

    spent: NDArray[np.int64]
    gained: NDArray[np.float64]

    def bound(self, budget: int) -> float:
        """Value that no whole choice can exceed."""
        return float(np.interp(budget, self.spent, self.gained))


class _Search:
    """Branch and bound over the number of items of each class, from the relaxed optimum outwards."""

    def __init__(self, values: list[NDArray[np.float64]], prices: list[int]) -> None:
        self.totals = [np.concatenate(([0.0], np.cumsum(v))) for v in values]
        self.prices = prices
        self.relaxed = [self._relax(values[c:], prices[c:]) for c in range(len(values))]
        self.best, self.choice, self.nodes = -1.0, [0] * len(values), 0

    @staticmethod
    def _relax(values: list[NDArray[np.float64]], prices: list[int]) -> _Relaxed:
        worth = np.concatenate([v / p for v, p in zip(values, prices)])
        price = np.concatenate([np.full(len(v), p) for v, p in zip(values, prices)])
        order = np.argsort(-worth, kind="stable")
        price = price[order]
        spent = np.concatenate(([0], np.cumsum(price)))
        return _Relaxed(spent, np.concatenate(([0.0], np.cumsum(worth[order] * price))))

    def run(self, budget: int) -> list[int]:
        self._visit(0, budget, gained=0.0, counts=[])
        return self.choice

    def _visit(self, c: int, budget: int, *, gained: float, counts: list[int]) -> None:
        total, price = self.totals[c], self.prices[c]
        most = min(len(total) - 1, budget // price)
        if c == len(self.totals) - 1:
            if gained + total[most] > self.best:
                self.best, self.choice = gained + float(total[most]), [*counts, most]
            return

        def bound(count: int) -> float:
            self.nodes += 1
            return gained + float(total[count]) + self.relaxed[c + 1].bound(budget - count * price)

        peak = self._peak(most, bound)
        # The bound is concave in the count: once below the best found it stays there.
        for counts_outwards in (range(peak, -1, -1), range(peak + 1, most + 1)):
            for count in counts_outwards:
                if self.nodes > NODES and self.best >= 0:
                    return
                if bound(count) <= self.best * (1 + 1e-12):
                    break
                spend = budget - count * price
                self._visit(c + 1, spend, gained=gained + float(total[count]), counts=[*counts, count])

    @staticmethod
    def _peak(most: int, bound: object) -> int:
        """Count of the highest bound, by bisection on its slope."""
        assert callable(bound)
        low, high = 0, most
        while low < high:
            middle = (low + high) // 2
            if bound(middle) < bound(middle + 1):
                low = middle + 1
            else:
                high = middle
        return low
