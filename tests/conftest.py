"""Shared by all tests: no network, few threads, fixed seeds."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    """Same random numbers in every test, whatever ran before it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
