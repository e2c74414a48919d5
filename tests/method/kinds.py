"""Runs with either parametrization: what the tests of edge cases share."""

import pytest

import adalora

STEPS = 40
BOTH = pytest.mark.parametrize("kind", ["lora", "svd"])


def attach(model, kind, **settings):
    """A controller for `STEPS` steps; a target rank of 2 unless told otherwise."""
    return adalora.attach(model, **{"target_rank": 2, "total_steps": STEPS, "parametrization": kind, **settings})
