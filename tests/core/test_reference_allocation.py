"""The literal allocation against the fast one, and its edges by hand."""

import pytest
import torch

from adalora.core.allocation import allocate
from adalora.core.knapsack import allocate_costs
from adalora.core.reference_allocation import reference_buy, reference_deal, reference_share

MODULE = [0, 0, 0, 1, 1, 2]
FLOORS, CAPS = [1, 0, 0], [2, 2, 1]


@pytest.mark.parametrize("budget", range(1, 6))
def test_both_deal_alike(budget):
    scores = [0.5, 2.0, 1.0, 2.0, 0.0, 3.0]
    keep = reference_deal(scores, MODULE, budget=budget, floors=FLOORS, caps=CAPS)
    bounds = {"min_rank": torch.tensor(FLOORS)[MODULE], "max_rank": torch.tensor(CAPS)[MODULE]}
    assert allocate(torch.tensor(scores), torch.tensor(MODULE), budget=budget, **bounds).tolist() == keep


@pytest.mark.parametrize("budget", range(3, 16))
def test_both_buy_alike(budget):
    scores, prices = [0.5, 2.0, 1.0, 2.1, 0.3, 3.0], [3, 4, 2]
    keep = reference_buy(scores, MODULE, budget=budget, prices=prices, floors=FLOORS, caps=CAPS)
    bounds = {"min_rank": torch.tensor(FLOORS)[MODULE], "max_rank": torch.tensor(CAPS)[MODULE]}
    costs = torch.tensor(prices)[MODULE]
    fast = allocate_costs(torch.tensor(scores), torch.tensor(MODULE), costs=costs, budget=budget, **bounds)
    values = torch.tensor(scores)
    assert float(values[fast].sum()) == pytest.approx(float(values[torch.tensor(keep)].sum()))


def test_what_may_not_return_is_never_bought():
    keep = reference_buy([1.0, -torch.inf], [0, 0], budget=10, prices=[1], floors=[0], caps=[2])
    assert keep == [True, False]


def test_a_group_gets_its_target_and_its_part_of_the_surplus():
    assert reference_share(15, initial=20, target=10, group_initial=8, group_target=5) == 6  # 5 + ⌊3 · 5/10⌋
    assert reference_share(10, initial=20, target=10, group_initial=8, group_target=5) == 5
    assert reference_share(10, initial=10, target=10, group_initial=5, group_target=5) == 5  # no surplus to share
