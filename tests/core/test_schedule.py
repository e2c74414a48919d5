import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adalora.core.schedule import BudgetSchedule, span_to_steps


@st.composite
def schedules(draw):
    warmup, decrease, final = draw(st.integers(0, 40)), draw(st.integers(1, 150)), draw(st.integers(1, 40))
    target = draw(st.integers(1, 500))
    return BudgetSchedule(
        initial_budget=target + draw(st.integers(0, 2000)),
        target_budget=target,
        warmup_steps=warmup,
        decrease_end=warmup + decrease,
        total_steps=warmup + decrease + final,
        interval=draw(st.integers(1, 30)),
        shape=draw(st.one_of(st.sampled_from(["cubic", "linear", "step"]), st.floats(0.1, 8))),
    )


def example(**changes):
    fields = {
        "initial_budget": 100,
        "target_budget": 20,
        "warmup_steps": 10,
        "decrease_end": 50,
        "total_steps": 60,
        "interval": 8,
        "shape": "cubic",
    }
    return BudgetSchedule(**{**fields, **changes})


@settings(max_examples=200, deadline=None)
@given(schedules())
def test_it_never_rises_and_its_end_points_are_exact(schedule):
    budgets = [schedule.budget(t) for t in range(schedule.total_steps)]
    assert all(isinstance(b, int) for b in budgets)
    assert all(a >= b for a, b in itertools.pairwise(budgets))
    assert set(budgets[: schedule.warmup_steps + 1]) == {schedule.initial_budget}
    assert set(budgets[schedule.decrease_end :]) == {schedule.target_budget}


@settings(max_examples=200, deadline=None)
@given(schedules())
def test_allocations_lie_in_the_decrease_and_the_last_is_at_its_end(schedule):
    steps = [t for t in range(schedule.total_steps) if schedule.allocates(t)]
    assert steps[-1] == schedule.decrease_end
    assert steps[0] > schedule.warmup_steps
    gaps = [b - a for a, b in zip([schedule.warmup_steps, *steps], steps)]
    assert set(gaps[:-1]) <= {schedule.interval}
    assert 1 <= gaps[-1] <= schedule.interval


@settings(max_examples=50, deadline=None)
@given(schedules())
def test_phases_follow_each_other(schedule):
    phases = [schedule.phase(t) for t in range(schedule.total_steps)]
    decrease = schedule.decrease_end - schedule.warmup_steps
    final = schedule.total_steps - schedule.decrease_end
    assert phases == ["warmup"] * schedule.warmup_steps + ["decrease"] * decrease + ["final"] * final


@pytest.mark.parametrize(
    ("shape", "middle", "three_quarters"),
    [("cubic", 30, 21), ("linear", 60, 40), ("step", 20, 20), (2.0, 40, 25), (3.0, 30, 21)],
)
def test_values_by_hand(shape, middle, three_quarters):
    schedule = example(shape=shape)
    assert schedule.budget(30) == middle  # 20 + 80 * 0.5 ** power
    assert schedule.budget(40) == three_quarters  # 20 + floor(80 * 0.25 ** power)


def test_step_holds_the_initial_budget_up_to_the_middle():
    schedule = example(shape="step")
    assert (schedule.budget(29), schedule.budget(30)) == (100, 20)


def test_constant_never_changes_and_never_allocates():
    schedule = example(shape="constant")
    assert {schedule.budget(t) for t in range(60)} == {100}
    assert not any(schedule.allocates(t) for t in range(60))


def test_allocation_steps_by_hand():
    assert [t for t in range(60) if example().allocates(t)] == [18, 26, 34, 42, 50]
    assert [t for t in range(60) if example(interval=100).allocates(t)] == [50]


def test_without_a_decrease_the_budget_drops_at_once():
    schedule = example(decrease_end=10)
    assert (schedule.budget(9), schedule.budget(10)) == (100, 20)
    assert [t for t in range(60) if schedule.allocates(t)] == [10]


@pytest.mark.parametrize(("span", "steps"), [(0.12, 120), (0.0, 0), (7, 7), (0, 0), (1.0, 1000), (0.0016, 2)])
def test_spans(span, steps):
    assert span_to_steps(span, 1000) == steps


def test_a_whole_number_is_not_rounded_below():
    """(1 - 1/5)³·125 is 64; in floating point 64.00000000000001 or 63.99999999999999."""
    schedule = example(initial_budget=145, target_budget=20, warmup_steps=0, decrease_end=5)
    assert [schedule.budget(t) for t in range(6)] == [145, 84, 47, 28, 21, 20]


def test_the_released_grid_starts_with_the_run():
    ours, released = example(interval=8), example(interval=8, released=True)
    assert [t for t in range(60) if ours.allocates(t)] == [18, 26, 34, 42, 50]
    assert [t for t in range(60) if released.allocates(t)] == [16, 24, 32, 40, 48, 50]
