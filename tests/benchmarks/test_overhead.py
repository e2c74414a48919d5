"""The bar that does not depend on the machine: operations and memory, against PEFT."""

from dataclasses import replace

import pytest
import torch

from benchmarks.figure import draw
from benchmarks.measuring import interleaved, operations, peak_bytes, ratios
from benchmarks.models import MINILM, training

NARROW = replace(MINILM, hidden=24, intermediate=48, batch=2, length=8)  # counts do not depend on widths
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def counted():
    torch.manual_seed(0)
    return {method: operations(method, NARROW) for method in ("lora", "peft_adalora", "ours")}


def test_ordinary_steps_take_no_more_operations_than_lora_s(counted):
    lora = counted["lora"]["step"]["total"]
    for phase in ("warmup", "decrease", "final"):
        assert counted["ours"][phase]["total"] <= lora


def test_mask_steps_take_at_most_1_3_times_lora_s(counted):
    assert counted["ours"]["mask"]["total"] <= 1.3 * counted["lora"]["step"]["total"]


def test_neither_do_they_with_dropout():
    lora, ours = (operations(method, NARROW, dropout=0.1) for method in ("lora", "ours"))
    for phase in ("warmup", "decrease", "final"):
        assert ours[phase]["total"] <= lora["step"]["total"]
    assert ours["mask"]["total"] <= 1.3 * lora["step"]["total"]


def test_peft_adalora_takes_several_times_as_many(counted):
    assert counted["peft_adalora"]["step"]["total"] > 3 * counted["lora"]["step"]["total"]


def test_no_waiting_in_ordinary_steps(counted):
    assert {phase: counted["ours"][phase]["syncs"] for phase in ("warmup", "decrease", "final")} == {
        "warmup": 0,
        "decrease": 0,
        "final": 0,
    }


def test_the_controller_s_operations_do_not_grow_with_modules(counted):
    deeper = operations("ours", replace(NARROW, layers=12))
    assert deeper["decrease"]["allocation"] == counted["ours"]["decrease"]["allocation"]
    assert deeper["mask"]["allocation"] <= counted["ours"]["mask"]["allocation"] + 3
    assert deeper["final"]["allocation"] <= counted["ours"]["final"]["allocation"] + 5
    assert deeper["handover"]["allocation"] == counted["ours"]["handover"]["allocation"]
    assert deeper["compaction"]["allocation"] <= counted["ours"]["compaction"]["allocation"] + 6  # 3, torch 2.6: 6


def test_the_two_dear_steps_take_no_more_than_mask_steps_may(counted):
    lora = counted["lora"]["step"]["total"]
    assert counted["ours"]["handover"]["total"] <= 1.3 * lora
    assert counted["ours"]["compaction"]["total"] <= 1.3 * lora


def test_peak_memory_of_the_final_phase_is_lora_s():
    shape = replace(MINILM, layers=2, batch=2)
    lora = peak_bytes("lora", shape, phase="warmup")
    assert lora > sum(p.numel() * 4 for p in training("lora", shape).model.parameters())
    assert peak_bytes("ours", shape, phase="final") <= 1.01 * lora


def test_ratios_are_of_steps_of_the_same_turn():
    seconds = {"lora": [9, 9, 1, 2, 4, 8], "ours": [0, 0, 2, 2, 2, 4]}
    assert ratios(seconds)["ours"] == {"q25": 0.5, "median": 0.75, "q75": 1.75, "total": 10 / 15}
    assert ratios(seconds)["lora"]["total"] == 1


def test_a_step_of_each_run_in_turn():
    runs = {name: training(name, NARROW) for name in ("lora", "ours")}
    seconds = interleaved(runs, steps=3)
    assert [len(values) for values in seconds.values()] == [3, 3]
    assert runs["ours"].controller.step == 3


def test_the_plot_says_what_is_missing(tmp_path):
    draw({}, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0
