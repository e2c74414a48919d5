"""Who is kept where modules have floors, caps, prices and groups: written down literally, for tests alone.

Nothing is sorted and nothing searched cleverly: a triplet is kept if few enough others come before it, and with prices
every total that can be spent is tried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def reference_deal(
    scores: Sequence[float], module: Sequence[int], *, budget: int, floors: Sequence[int], caps: Sequence[int]
) -> list[bool]:
    """Eq. 5 with a floor and a cap for each module, every triplet at the price of 1.

    Args:
        scores: S of all triplets.
        module: Number of each triplet's module.
        budget: Triplets to keep.
        floors: Of each module.
        caps: Of each module.
    """
    fixed, competes = _bounds(scores, module, floors=floors, caps=caps)
    left = budget - sum(fixed)
    keep = []
    for i in range(len(scores)):
        before = sum(competes[j] and _comes_before(scores, j, i) for j in range(len(scores)))
        keep.append(fixed[i] or (competes[i] and before < left))
    return keep


def reference_buy(
    scores: Sequence[float],
    module: Sequence[int],
    *,
    budget: int,
    prices: Sequence[int],
    floors: Sequence[int],
    caps: Sequence[int],
) -> list[bool]:
    """The choice of the highest total score that the budget can buy after the floors: every sum is tried.

    Args:
        scores: S of all triplets; those below 0 are never bought.
        module: Number of each triplet's module.
        budget: In the unit of `prices`.
        prices: Of a triplet of each module.
        floors: Of each module.
        caps: Of each module.
    """
    fixed, competes = _bounds(scores, module, floors=floors, caps=caps)
    left = budget - sum(prices[module[i]] for i in range(len(scores)) if fixed[i])
    # Spent -> the best value for exactly that much, and what it bought.
    best: dict[int, tuple[float, frozenset[int]]] = {0: (0.0, frozenset())}
    for i in range(len(scores)):
        if not competes[i] or scores[i] < 0:
            continue
        for spent, (value, bought) in list(best.items()):  # as it was before this triplet, which is bought once
            total = spent + prices[module[i]]
            if total <= left and value + scores[i] > best.get(total, (-1.0, frozenset()))[0]:
                best[total] = (value + scores[i], bought | {i})
    _, chosen = max(best.values(), key=lambda entry: entry[0])
    return [fixed[i] or i in chosen for i in range(len(scores))]


def reference_share(amount: int, *, initial: int, target: int, group_initial: int, group_target: int) -> int:
    """A group's part of the budget: its target and its share of the surplus, rounded down."""
    if initial == target:
        return group_target
    surplus = Fraction(max(0, amount - target), initial - target)
    return group_target + math.floor((group_initial - group_target) * surplus)


def _comes_before(scores: Sequence[float], j: int, i: int) -> bool:
    """The higher score comes first; of equal ones the one that stands first."""
    return scores[j] > scores[i] or (scores[j] == scores[i] and j < i)


def _bounds(
    scores: Sequence[float], module: Sequence[int], *, floors: Sequence[int], caps: Sequence[int]
) -> tuple[list[bool], list[bool]]:
    """Which triplets a floor keeps, and which compete: below their module's cap and above its floor."""
    fixed, competes = [], []
    for i in range(len(scores)):
        place = sum(module[j] == module[i] and _comes_before(scores, j, i) for j in range(len(scores)))
        fixed.append(place < floors[module[i]])
        competes.append(floors[module[i]] <= place < caps[module[i]])
    return fixed, competes
