"""The budget of the config in units of one model, and who competes for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adalora.config import AdaLoraConfig
from adalora.core.allocation import allocate
from adalora.core.knapsack import allocate_costs
from adalora.errors import ConfigError
from adalora.lora.triplets import TripletHandle

Unit = Literal["triplets", "parameters", "bytes"]


@dataclass(frozen=True)
class Group:
    """Modules that compete for one budget.

    Attributes:
        modules: Their numbers.
        initial: Cost of all their triplets.
        target: Their share at the end.
    """

    modules: tuple[int, ...]
    initial: int
    target: int


@dataclass(frozen=True)
class Budget:
    """What triplets cost, how much there is at the start and at the end, and for whom.

    Attributes:
        unit: What is counted.
        costs: Cost of one triplet of each module.
        initial: Cost of all triplets, b0.
        target: b_T; the groups' targets sum to it.
        groups: All modules, each in one group.
        min_rank: Floor of each module.
        max_rank: Cap of each module.
    """

    unit: Unit
    costs: tuple[int, ...]
    initial: int
    target: int
    groups: tuple[Group, ...]
    min_rank: int
    max_rank: int | None

    def deal(self, scores: Tensor, ranks: Sequence[int], *, amount: int) -> Tensor:
        """Keep mask [n] for the scores [n] of all modules, one after the other, with `amount` to spend.

        With one group all of `amount` is dealt out; of several each gets its target and its part of the surplus,
        rounded down.
        """
        module = torch.repeat_interleave(torch.tensor(ranks))
        keep = torch.zeros(len(scores), dtype=torch.bool)
        for group in self.groups:
            mine = torch.isin(module, torch.tensor(group.modules))
            keep[mine] = self._deal_group(scores[mine], module[mine], amount=self._share(group, amount))
        return keep

    def _share(self, group: Group, amount: int) -> int:
        if len(self.groups) == 1 or self.initial == self.target:
            return amount if len(self.groups) == 1 else group.target
        surplus = max(0, amount - self.target)
        return group.target + (group.initial - group.target) * surplus // (self.initial - self.target)

    def _deal_group(self, scores: Tensor, module: Tensor, *, amount: int) -> Tensor:
        limits = {"min_rank": self.min_rank, "max_rank": self.max_rank}
        numbered = torch.unique_consecutive(module, return_inverse=True)[1]
        if self.unit == "triplets":
            return allocate(scores, numbered, budget=amount, **limits)  # type: ignore[arg-type]
        costs = torch.tensor(self.costs)[module]
        return allocate_costs(scores, numbered, costs=costs, budget=amount, **limits)  # type: ignore[arg-type]

    def triplets(self, amount: int) -> int:
        """About how many triplets an amount is: exact where triplets are counted."""
        if self.unit == "triplets":
            return amount
        return round(amount * len(self.costs) / sum(self.costs))


def make_budget(config: AdaLoraConfig, handles: Sequence[TripletHandle]) -> Budget:
    """The config's budget for the layers of one adapter.

    Raises:
        ConfigError: It leaves no triplet, is above what the LoraConfig starts with, or below what `min_rank` asks for.
    """
    unit, costs = _costs(config, handles)
    initial = sum(cost * h.rank for cost, h in zip(costs, handles))
    target = _target(config, handles, costs)
    if target > initial:
        raise ConfigError(_too_high(target, initial, unit=unit, handles=handles))
    if target < min(costs):
        raise ConfigError(_no_triplet(config, target, unit=unit, cheapest=min(costs), modules=len(handles)))
    groups = _groups(config.budget_scope, handles, costs, target=target)
    for group in groups:
        floor = sum(costs[m] * min(config.min_rank, handles[m].rank) for m in group.modules)
        if floor > group.target:
            where = "" if len(groups) == 1 else f" in the {config.budget_scope} of {handles[group.modules[0]].name}"
            raise ConfigError(
                f"min_rank={config.min_rank} needs {floor} {unit}{where}, the budget has {group.target}: a smaller "
                "min_rank or a larger budget"
            )
    return Budget(
        unit=unit,
        costs=tuple(costs),
        initial=initial,
        target=target,
        groups=groups,
        min_rank=config.min_rank,
        max_rank=config.max_rank,
    )


def _costs(config: AdaLoraConfig, handles: Sequence[TripletHandle]) -> tuple[Unit, list[int]]:
    if config.budget_cost == "rank":
        return "triplets", [1] * len(handles)
    if config.adapter_bytes is None:
        with_lambda = int(config.parametrization == "svd")
        return "parameters", [h.parameters_per_triplet + with_lambda for h in handles]
    # λ is folded into P in every file.
    return "bytes", [h.parameters_per_triplet * h.P_parameter.element_size() for h in handles]


def _target(config: AdaLoraConfig, handles: Sequence[TripletHandle], costs: list[int]) -> int:
    """b_T in the unit of `costs`; a number of triplets is priced at the mean of all modules."""
    amount = config.total_parameters or config.adapter_bytes
    if amount is not None:
        return amount
    if config.target_rank is not None:
        return round(config.target_rank * sum(costs))
    assert config.total_rank is not None  # the config has exactly one budget
    return round(config.total_rank * sum(costs) / len(handles))


def _too_high(target: int, initial: int, *, unit: str, handles: Sequence[TripletHandle]) -> str:
    most = max(h.rank for h in handles)
    wanted = -(-target * most // initial) if unit != "triplets" else -(-target // len(handles))
    return (
        f"the target of {target} {unit} is above the {initial} that the model starts with "
        f"({len(handles)} modules): LoraConfig(r={max(wanted, round(1.5 * wanted))}, …) or a smaller "
        + ("target_rank" if unit == "triplets" else "budget")
    )


def _no_triplet(config: AdaLoraConfig, target: int, *, unit: str, cheapest: int, modules: int) -> str:
    if unit == "triplets":
        return f"target_rank={config.target_rank} leaves no triplet in {modules} modules"
    return f"a budget of {target} {unit} buys no triplet: the cheapest of {modules} modules takes {cheapest}"


def _groups(scope: str, handles: Sequence[TripletHandle], costs: list[int], *, target: int) -> tuple[Group, ...]:
    """Modules by `budget_scope`, with shares in proportion to what they start with; remainders to the largest ones."""
    members: dict[str, list[int]] = {}
    for number, h in enumerate(handles):
        members.setdefault(group_name(h.name, scope), []).append(number)
    initial = {name: sum(costs[m] * handles[m].rank for m in modules) for name, modules in members.items()}
    total = sum(initial.values())
    shares = {name: target * amount // total for name, amount in initial.items()}
    by_remainder = sorted(initial, key=lambda name: -(target * initial[name] % total))
    for name in by_remainder[: target - sum(shares.values())]:
        shares[name] += 1
    return tuple(Group(tuple(modules), initial[name], shares[name]) for name, modules in members.items())


def group_name(module: str, scope: str) -> str:
    """The group of a module: its path down to the first number ("layer"), or its last name that is no number."""
    if scope == "layer":
        found = re.match(r"(.*?\.)?\d+(?=\.|$)", module)
        return found.group(0) if found else ""
    if scope == "module_type":
        return next((part for part in reversed(module.split(".")) if not part.isdigit()), "")
    return ""


def adapter_size(handles: list[TripletHandle]) -> tuple[int, int]:
    """Parameters and bytes that the adapter's factors take in memory."""
    tensors = [p for h in handles if not h.removed for p, _ in h.factors.values()]
    return sum(p.numel() for p in tensors), sum(p.numel() * p.element_size() for p in tensors)
