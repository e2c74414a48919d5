"""What settings may stand together: defaults that hang on others, contradictions, options without effect."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adalora.config.settings import AdaLoraConfig

BUDGET_FIELDS = ("target_rank", "total_rank", "total_parameters", "adapter_bytes")
DEFAULT_TARGET_RANK = 8
EXAMPLES = {"target_rank": "8", "total_rank": "96", "total_parameters": '"0.3M"', "adapter_bytes": '"1.2MB"'}
OF_GRADIENT_SCORES = ("sensitivity_beta", "uncertainty_beta", "score_gradient", "score_weights")
OF_ALLOCATION = (  # and of the phases around it: nothing to do where no rank ever changes
    "importance",
    "min_rank",
    "max_rank",
    "allocation_interval",
    "revival",
    "budget_scope",
    "warmup",
    "final",
    "group_budgets",
    "budget_cost",
    "released_schedule",
    "reorthonormalize",
    "handover",
    "nested",
    "compact",
    "compact_at",
    "pace",
)


def settle(config: AdaLoraConfig) -> None:
    """Fill in what hangs on other fields, and refuse what cannot stand together.

    Raises:
        ValueError: Fields contradict each other, or one of them has no effect.
    """
    _one_budget(config)
    _limits_and_spans(config)
    _fill_in(config)
    _refuse_without_effect(config)


def _one_budget(config: AdaLoraConfig) -> None:
    given = [name for name in BUDGET_FIELDS if getattr(config, name) is not None]
    if len(given) > 1:
        raise ValueError(f"give one budget, not {' and '.join(given)}: keep {given[0]}={getattr(config, given[0])!r}")
    if not given and config.group_budgets is None:
        object.__setattr__(config, "target_rank", float(DEFAULT_TARGET_RANK))
    for name in BUDGET_FIELDS:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value} must be above 0, e.g. {name}={EXAMPLES[name]}")


def _limits_and_spans(config: AdaLoraConfig) -> None:
    if isinstance(config.max_rank, int) and isinstance(config.min_rank, int) and config.max_rank < config.min_rank:
        raise ValueError(
            f"max_rank={config.max_rank} is below min_rank={config.min_rank}: raise the one or lower the other"
        )
    if isinstance(config.max_rank, int) and config.target_rank is not None and config.max_rank < config.target_rank:
        raise ValueError(
            f"max_rank={config.max_rank} is below the average that is wanted, target_rank={config.target_rank:g}: "
            f"use target_rank={config.max_rank} or max_rank={math.ceil(config.target_rank)}"
        )
    if isinstance(config.warmup, float) and isinstance(config.final, float) and config.warmup + config.final > 1:
        raise ValueError(
            f"warmup={config.warmup} and final={config.final} are together more than the run (1.0): "
            f"lower one of them, e.g. final={round(1 - config.warmup, 6)}"
        )


def _fill_in(config: AdaLoraConfig) -> None:
    """Defaults that hang on other fields; what was given stays and is checked afterwards."""
    given = config.model_fields_set
    if config.parametrization == "svd":
        if "initialization" not in given:
            object.__setattr__(config, "initialization", "orthonormal")
        if "handover" not in given:
            object.__setattr__(config, "handover", False)
        if "scale" not in given:
            object.__setattr__(config, "scale", "target")
        if "orthogonality_weight" not in given:
            object.__setattr__(config, "orthogonality_weight", 0.1)
    if "pace" not in given and any(name == "pace" for name, _ in _without_effect(config)):
        object.__setattr__(config, "pace", "fixed")
    if config.schedule == "constant":  # one phase: nothing ends a warm-up, nothing begins a final phase
        for name, value in (("warmup", 0), ("final", 0), ("handover", False)):
            if name not in given:
                object.__setattr__(config, name, value)
    if config.total_parameters is not None or config.adapter_bytes is not None:
        if "budget_cost" in given and config.budget_cost == "rank":
            raise ValueError('budget_cost="rank" contradicts a budget in parameters or bytes: leave it out')
        object.__setattr__(config, "budget_cost", "parameters")


def _refuse_without_effect(config: AdaLoraConfig) -> None:
    """An option that changes nothing in this combination is a mistake of the user's: say so."""
    if config.group_budgets is not None and config.budget_scope == "global" and config.schedule != "constant":
        raise ValueError(
            'group_budgets has no effect with budget_scope="global": add budget_scope="module_type" or "layer"'
        )
    if config.compact_at is not None and not config.compact:
        raise ValueError("compact_at has no effect with compact=False: leave one of them out")
    for name, because in _without_effect(config):
        if name in config.model_fields_set:
            raise ValueError(f"{name} has no effect with {because}: leave it out")
    if config.nested and not config.compact:
        raise ValueError("nested=True needs compact=True: the order is that of the triplets that stay")
    if config.nested and config.reorthonormalize:
        raise ValueError(
            "nested=True contradicts reorthonormalize=True: the order is that of the scored triplets, "
            "so leave one of them out"
        )
    if config.parametrization == "lora":
        _refuse_svd_only(config)
    elif config.handover:
        raise ValueError('handover=True needs parametrization="lora": with "svd" P, λ and Q are trained throughout')
    elif config.scale == "matched" and config.initialization == "keep":
        raise ValueError('scale="matched" has no effect with initialization="keep": use scale="target"')


def _without_effect(config: AdaLoraConfig) -> list[tuple[str, str]]:
    """Fields that change nothing here, each with the reason."""
    found, constant = [], 'schedule="constant" (no allocation)'
    if config.orthogonality == "off" and config.orthogonality_weight:
        found.append(("orthogonality_weight", 'orthogonality="off"'))
    if config.schedule == "constant":
        found += [(name, constant) for name in (*OF_ALLOCATION, *OF_GRADIENT_SCORES)]
    elif not config.needs_gradients:
        found += [(name, f'importance="{config.importance}" (no gradient in it)') for name in OF_GRADIENT_SCORES]
    elif not config.needs_uncertainty:
        found.append(("uncertainty_beta", f'importance="{config.importance}" (no uncertainty in it)'))
    if not config.orthogonality_weight:
        found.append(("score_gradient", f"orthogonality_weight={config.orthogonality_weight:g}"))
    if config.parametrization == "svd":
        found.append(("pace", 'parametrization="svd" (λ has a pace of its own)'))
    elif config.scale != "initial":
        found.append(("pace", f"scale={config.scale!r} (it is that of the initial scale)"))
    if config.handover and config.warmup == 0:
        found.append(("handover", "warmup=0 (it is at the end of it)"))
    if config.nested and config.final == 0:
        found.append(("nested", "final=0 (it acts in the final phase)"))
    if not config.draws:
        found.append(("seed", "these settings (nothing is drawn at random)"))
    if config.orthogonality in ("decoupled", "off"):
        found.append(("score_gradient", f'orthogonality="{config.orthogonality}" (the gradient has no such term)'))
    return found


def _refuse_svd_only(config: AdaLoraConfig) -> None:
    for name, values in (
        ("initialization", ("orthonormal", "gaussian")),
        ("scale", ("released",)),
        ("importance", ("lambda_magnitude",)),
        ("orthogonality", ("squared", "released")),
    ):
        value = getattr(config, name)
        if value in values:
            raise ValueError(
                f'{name}="{value}" needs parametrization="svd": with "lora" λ has no value of its own, it is the '
                "length of P's columns"
            )
