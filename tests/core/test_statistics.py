"""What the history tells of an allocation's scores."""

import pytest
import torch

from adalora.core.statistics import describe_scores


def test_threshold_and_quantiles():
    scores = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    found = describe_scores(scores, scores > 1.5)
    assert found["threshold"] == 2.0
    assert (found["scores"]["min"], found["scores"]["q50"], found["scores"]["max"]) == (0.0, 2.0, 4.0)


def test_what_is_not_finite_is_left_out():
    scores = torch.tensor([torch.nan, -torch.inf, 1.0, 3.0])
    assert describe_scores(scores, torch.tensor([False, False, True, True]))["scores"]["q50"] == pytest.approx(2.0)


def test_no_finite_score_and_nothing_kept():
    nothing = torch.full((3,), torch.nan)
    assert describe_scores(nothing, torch.zeros(3, dtype=torch.bool)) == {"threshold": None, "scores": None}
