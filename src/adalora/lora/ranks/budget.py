"""The budget of the config in units of one model, and who competes for it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adalora.config import BUDGET_FIELDS, AdaLoraConfig
from adalora.core.allocation import allocate
from adalora.core.knapsack import allocate_costs
from adalora.errors import ConfigError
from adalora.lora.layers.triplets import TripletHandle
from adalora.lora.ranks.module_names import by_name, limits

Unit = Literal["triplets", "parameters", "bytes"]
NO_CAP = 2**31  # above every rank


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
        initial: Cost of all triplets, b0. Of a grouped convolution the k-th of all groups are one triplet here.
        target: b_T; the groups' targets sum to it.
        groups: All modules, each in one group.
        min_rank: Floor of each module.
        max_rank: Cap of each module, `NO_CAP` where none is set.
    """

    unit: Unit
    costs: tuple[int, ...]
    initial: int
    target: int
    groups: tuple[Group, ...]
    min_rank: tuple[int, ...]
    max_rank: tuple[int, ...]

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
        bounds = {"min_rank": torch.tensor(self.min_rank)[module], "max_rank": torch.tensor(self.max_rank)[module]}
        numbered = torch.unique_consecutive(module, return_inverse=True)[1]
        if self.unit == "triplets":
            return allocate(scores, numbered, budget=amount, **bounds)
        costs = torch.tensor(self.costs)[module]
        return allocate_costs(scores, numbered, costs=costs, budget=amount, **bounds)

    def triplets(self, amount: int) -> int:
        """About how many triplets an amount is: exact where triplets are counted."""
        if self.unit == "triplets":
            return amount
        return round(amount * len(self.costs) / sum(self.costs))


def make_budget(config: AdaLoraConfig, handles: Sequence[TripletHandle]) -> Budget:
    """The config's budget for the layers of one adapter.

    Raises:
        ConfigError: It leaves no triplet, is above what the LoraConfig starts with, or below what `min_rank` asks for;
            or a name in the config fits no module.
    """
    unit, costs = _costs(config, handles)
    low, high = _limits(config, handles)
    initial = sum(cost * h.rank for cost, h in zip(costs, handles))
    members = _members(config.budget_scope, handles)
    per_rank = [cost / h.lora_rank(1) for cost, h in zip(costs, handles)]  # of an r of 1 in LoraConfig
    own = _own_targets(config, members, per_rank)
    target = sum(own.values()) if _of_groups_alone(config) else _target(config, costs, per_rank)
    if target > initial:
        raise ConfigError(_too_high(target, initial, unit=unit, handles=handles))
    if target < min(costs):
        raise ConfigError(_no_triplet(config, target, unit=unit, cheapest=min(costs), handles=handles))
    full = {name: sum(costs[m] * handles[m].rank for m in modules) for name, modules in members.items()}
    targets = _shares(full, own, target=target, unit=unit)
    for name, modules in members.items():
        floor = sum(costs[m] * min(low[m], handles[m].rank) for m in modules)
        if floor > targets[name]:
            raise ConfigError(_floor_message(config, floor, targets[name], unit=unit, first=handles[modules[0]].name))
        most = sum(costs[m] * min(high[m], handles[m].rank) for m in modules)
        if most < targets[name]:
            price = sum(per_rank[m] for m in modules)
            raise ConfigError(_cap_message(config, most, targets[name], unit=unit, group=name, price=price))
    return Budget(
        unit=unit,
        costs=tuple(costs),
        initial=initial,
        target=target,
        groups=tuple(Group(tuple(modules), full[name], targets[name]) for name, modules in members.items()),
        min_rank=low,
        max_rank=high,
    )


def _limits(config: AdaLoraConfig, handles: Sequence[TripletHandle]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Floor and cap of each module in triplets; the config has them as ranks."""
    names, step = [h.name for h in handles], [h.lora_rank(1) for h in handles]
    floors = [value or 0 for value in limits("min_rank", config.min_rank, names)]
    caps = limits("max_rank", config.max_rank, names)
    for name, floor, cap in zip(names, floors, caps):
        if cap is not None and floor > cap:
            raise ConfigError(f"{name}: max_rank={cap} is below min_rank={floor}: raise the one or lower the other")
    low = [-(-floor // size) for floor, size in zip(floors, step)]
    high = [NO_CAP if cap is None else cap // size for cap, size in zip(caps, step)]
    for h, fewest, most in zip(handles, low, high):
        if fewest > most:
            raise ConfigError(
                f"{h.name}: its rank is a multiple of {h.groups}, the groups of the convolution, and none is between "
                f"min_rank and max_rank: min_rank={{{h.name!r}: {most * h.groups}}}"
            )
    if not any(high):
        raise ConfigError(f"max_rank={config.max_rank} leaves no triplet in {len(handles)} modules: allow some module")
    return tuple(low), tuple(high)


def _floor_message(config: AdaLoraConfig, floor: int, budget: int, *, unit: str, first: str) -> str:
    where = "" if config.budget_scope == "global" else f" in the {config.budget_scope} of {first}"
    return (
        f"min_rank={config.min_rank} needs {floor} {unit}{where}, the budget has {budget}: a smaller "
        "min_rank or a larger budget"
    )


def _cap_message(config: AdaLoraConfig, most: int, budget: int, *, unit: str, group: str, price: float) -> str:
    """Caps that leave less than the budget has; `price` is that of a rank of 1 in each of the group's modules."""
    average = int(100 * most / price) / 100
    where = "" if config.budget_scope == "global" else f" in the {config.budget_scope} {group!r}"
    amounts = {"target_rank": average, "total_rank": most, "total_parameters": most, "adapter_bytes": most}
    given = _given(config)
    if given == "total_rank" and unit != "triplets":
        given = "target_rank"
    cure = (
        f"{given}={amounts[given]:g}"
        if config.budget_scope == "global"
        else f"group_budgets={{{group!r}: {average:g}}}"
    )
    return (
        f"max_rank={config.max_rank} keeps {most} {unit} at most{where}, the budget has {budget}: a larger max_rank, "
        f"or {cure}"
    )


def _costs(config: AdaLoraConfig, handles: Sequence[TripletHandle]) -> tuple[Unit, list[int]]:
    if config.budget_cost == "rank":
        return "triplets", [1] * len(handles)
    if config.adapter_bytes is None:
        with_lambda = int(config.parametrization == "svd")
        return "parameters", [h.parameters_per_triplet + with_lambda * h.groups for h in handles]
    # λ is folded into P in every file.
    return "bytes", [h.parameters_per_triplet * h.P_parameter.element_size() for h in handles]


def _target(config: AdaLoraConfig, costs: list[int], per_rank: list[float]) -> int:
    """b_T in the unit of `costs`; a number of triplets is priced at the mean of all modules."""
    amount = config.total_parameters or config.adapter_bytes
    if amount is not None:
        return amount
    if config.target_rank is not None:
        return round(config.target_rank * sum(per_rank))
    assert config.total_rank is not None  # the config has exactly one budget
    return round(config.total_rank * sum(costs) / len(costs))


def _too_high(target: int, initial: int, *, unit: str, handles: Sequence[TripletHandle]) -> str:
    most, step = max(h.lora_rank(h.rank) for h in handles), math.lcm(*(h.groups for h in handles))
    wanted = -(-target * most // initial) if unit != "triplets" or step > 1 else -(-target // len(handles))
    r = -(-max(wanted, round(1.5 * wanted)) // step) * step  # PEFT wants a multiple of a convolution's groups
    return (
        f"the target of {target} {unit} is above the {initial} that the model starts with "
        f"({len(handles)} modules): LoraConfig(r={r}, …) or a smaller "
        + ("target_rank" if unit == "triplets" else "budget")
    )


def _no_triplet(
    config: AdaLoraConfig, target: int, *, unit: str, cheapest: int, handles: Sequence[TripletHandle]
) -> str:
    if unit == "triplets":
        name, most = _given(config), max(h.groups for h in handles)
        why = f"; ranks of a convolution with groups={most} are multiples of {most}" if most > 1 else ""
        return f"{name}={getattr(config, name)} leaves no triplet in {len(handles)} modules{why}"
    return f"a budget of {target} {unit} buys no triplet: the cheapest of {len(handles)} modules takes {cheapest}"


def _members(scope: str, handles: Sequence[TripletHandle]) -> dict[str, list[int]]:
    """Numbers of the modules of each group."""
    members: dict[str, list[int]] = {}
    for number, h in enumerate(handles):
        members.setdefault(group_name(h.name, scope), []).append(number)
    return members


def _given(config: AdaLoraConfig) -> str:
    """The field that says how large the model's budget is; a config has one of these always."""
    return next((name for name in BUDGET_FIELDS if getattr(config, name) is not None), "group_budgets")


def _of_groups_alone(config: AdaLoraConfig) -> bool:
    """Whether the model's budget is the sum of its groups'."""
    return _given(config) == "group_budgets"


def _own_targets(config: AdaLoraConfig, members: dict[str, list[int]], per_rank: list[float]) -> dict[str, int]:
    """Targets of the groups that have a budget of their own; an average rank costs what a LoRA of it does."""
    if config.group_budgets is None:
        return {}
    averages = dict(zip(members, by_name("group_budgets", config.group_budgets, list(members))))
    missing = [name for name, average in averages.items() if average is None]
    if missing and _of_groups_alone(config):
        raise ConfigError(
            f"group_budgets has nothing for {', '.join(map(repr, missing))}: add them, or target_rank=… for the "
            "whole model, of which they share the rest"
        )
    return {
        name: round(average * sum(per_rank[m] for m in members[name]))
        for name, average in averages.items()
        if average is not None
    }


def _shares(full: dict[str, int], own: dict[str, int], *, target: int, unit: str) -> dict[str, int]:
    """Target of each group: its own, or a part of the rest in proportion to what it starts with.

    Remainders go to the largest ones.
    """
    for name, amount in own.items():
        if amount > full[name]:
            raise ConfigError(
                f"group_budgets gives {name!r} {amount} {unit}, it starts with {full[name]}: a larger r in LoraConfig "
                "or a smaller budget"
            )
    rest = target - sum(own.values())
    sharing = {name: amount for name, amount in full.items() if name not in own}
    total = sum(sharing.values())
    if not 0 <= rest <= total:
        others = f" and the other groups take {total} at most" if total else ""
        raise ConfigError(
            f"group_budgets gives {sum(own.values())} {unit}{others}, the model's budget is {target}: leave the "
            "model's budget out or change it"
        )
    shares = {name: rest * amount // total for name, amount in sharing.items()}
    by_remainder = sorted(sharing, key=lambda name: -(rest * sharing[name] % total))
    for name in by_remainder[: rest - sum(shares.values())]:
        shares[name] += 1
    return {**shares, **own}


def group_name(module: str, scope: str) -> str:
    """The group of a module: its path down to the first number ("layer"), or its last name that is no number."""
    if scope == "layer":
        found = re.match(r"(.*?\.)?\d+(?=\.|$)", module)
        return found.group(0) if found else ""
    if scope == "module_type":
        return next((part for part in reversed(module.split(".")) if not part.isdigit()), "")
    return ""
