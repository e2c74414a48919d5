"""Counts of a model that has no values, against those of one that has."""

from dataclasses import replace

import pytest

from benchmarks.measuring import operations
from benchmarks.models import LLAMA_1B, LLAMA_1B_NARROW
from benchmarks.on_meta import counts_on_meta
from helpers.oldest import autocast_on_meta

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), autocast_on_meta]
WIDE, NARROW = replace(LLAMA_1B, layers=2), replace(LLAMA_1B_NARROW, layers=2)


@pytest.fixture(scope="module")
def on_meta():
    wide, narrow = counts_on_meta(WIDE), counts_on_meta(NARROW)
    assert wide.pop("parameters") > 100 * narrow.pop("parameters")
    return wide, narrow


def test_widths_change_no_count(on_meta):
    wide, narrow = on_meta
    assert wide == narrow


def test_the_controller_takes_as_many_operations_as_with_values(on_meta):
    ours, counted = operations("ours", NARROW), on_meta[0]["ours"]
    assert counted["warmup"]["allocation"] == ours["warmup"]["allocation"]
    # The highest count with values is that of the first step, which makes the averages, two tensors a stack.
    made = ours["decrease"]["allocation"] - counted["decrease"]["allocation"]
    assert 0 < made < 20


def test_forward_and_backward_take_no_more_than_lora_s(on_meta):
    wide, _ = on_meta
    for own in wide["ours"].values():
        assert own["forward_backward"] <= wide["lora"]["step"]["forward_backward"]
        assert own["syncs"] == 0
    assert wide["peft_adalora"]["step"]["total"] > 2 * wide["lora"]["step"]["total"]
