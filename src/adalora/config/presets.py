"""Presets, and the rank to start with."""

from __future__ import annotations

from typing import Any

from adalora.config.rules import OF_ALLOCATION, OF_GRADIENT_SCORES

# Eq. 3-14 with the objective of Eq. 4 and the scores of the step's own weights.
PAPER: dict[str, Any] = {
    "parametrization": "svd",
    "initialization": "gaussian",
    "scale": "initial",
    "orthogonality": "squared",
    "score_weights": "before",
    "compact": False,
}

# What PEFT's AdaLoRA and the authors' released code compute.
RELEASED: dict[str, Any] = {
    "parametrization": "svd",
    "initialization": "gaussian",
    "scale": "released",
    "orthogonality": "released",
    "orthogonality_weight": 0.5,
    "warmup": 0,
    "final": 0,
    "allocation_interval": 1,
    "released_schedule": True,
    "compact": False,
}


PRESETS = {"paper": PAPER, "released": RELEASED}


def with_preset(settings: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """A preset with the user's fields; without what it says of allocation where there is none."""
    without = (*OF_ALLOCATION, *OF_GRADIENT_SCORES) if fields.get("schedule") == "constant" else ()
    return {**{name: value for name, value in settings.items() if name not in without}, **fields}


def paper_initial_rank(target_rank: float) -> int:
    """1.5 times the target rank, as in the paper, and above it."""
    return max(round(target_rank) + 1, round(1.5 * target_rank))


def initial_rank(target_rank: float) -> int:
    """The rank to start with for a target: twice it while that is at most 16, and never less than 1.5 times it.

    Half of what is searched is kept: more breadth pays where a run is short for what it has to learn, and is training
    thrown away elsewhere (`docs/results.md`); at high target ranks it costs time.
    """
    return max(paper_initial_rank(target_rank), min(round(2 * target_rank), 16))
