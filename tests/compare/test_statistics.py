import math

import numpy as np
import pytest

from adalora.compare.statistics import compare, holm, interval


def test_a_clear_gain_is_shown_and_counted():
    found = compare([0.8, 0.82, 0.79, 0.81, 0.83], [0.7, 0.73, 0.70, 0.70, 0.72])
    assert found.difference.low > 0
    assert found.difference.verdict == "better"
    assert (found.wins, found.losses, found.improvement) == (5, 0, 1.0)
    assert found.p_value < 0.001


def test_swapping_the_two_mirrors_everything():
    a, b = [0.5, 0.7, 0.6, 0.9], [0.4, 0.6, 0.8, 0.5]
    there, back = compare(a, b), compare(b, a)
    assert there.difference.mean == pytest.approx(-back.difference.mean)
    assert (there.wins, there.losses) == (back.losses, back.wins)
    assert there.improvement == pytest.approx(1 - back.improvement)
    assert there.difference.verdict == "no difference shown"


def test_pairing_removes_what_the_seeds_share():
    rng = np.random.default_rng(0)
    seeds = rng.normal(0, 1, 8)
    found = compare(seeds + 0.1 + rng.normal(0, 0.01, 8), seeds)
    assert 0.08 < found.difference.low < found.difference.high < 0.12


def test_intervals_cover_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    hits = [interval([rng.normal(0.3, 1, 30)]) for _ in range(60)]
    assert 0.85 <= np.mean([i.low <= 0.3 <= i.high for i in hits]) <= 1


def test_degenerate_samples_have_an_answer():
    same = compare([0.5, 0.5], [0.5, 0.5])
    assert same.difference.verdict == "no difference shown"
    assert same.improvement == 0.5
    assert math.isnan(same.p_value)
    shifted = compare([0.6, 0.7], [0.5, 0.6])
    assert shifted.wins == 2
    assert compare([0.6], [0.5]).difference.verdict == "too few seeds"
    assert compare([0.5, 0.5, 0.6], [0.5, 0.5, 0.5]).difference.verdict == "no difference shown"


def test_tasks_weigh_the_same_whatever_their_seeds():
    found = interval([[0.1, 0.1, 0.1, 0.1], [0.3, 0.3]])
    assert found.mean == pytest.approx(0.2)
    assert found.low == found.high == found.mean


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    left = holm([float("nan"), 0.02])
    assert math.isnan(left[0])
    assert left[1] == pytest.approx(0.02)
