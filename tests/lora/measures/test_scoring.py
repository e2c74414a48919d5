"""What the averages keep, by score."""

import pytest
import torch

import adalora
from helpers.toys import adamw, lora, train


def averages(controller):
    return list(controller._scorer._rows())


def observed(importance, **options):
    """A controller whose scorer has seen three steps, and has not been asked yet."""
    model = lora()
    schedule = {"target_rank": 2, "total_steps": 1000, "warmup": 0, "allocation_interval": 100}
    controller = adalora.attach(model, **schedule, importance=importance, **options)
    train(model, adamw(model), 3)
    return controller


@pytest.mark.parametrize("options", [{}, {"parametrization": "svd"}])
def test_a_score_of_sensitivity_alone_keeps_a_number_for_each_triplet(options):
    controller = observed("sensitivity", **options)
    ranks = {h.name: h.rank for h in controller.handles}
    kept = averages(controller)
    assert len(kept) == 3 * len(ranks)
    for name, average, row in kept:
        assert average.sensitivity[row].shape == average.uncertainty[row].shape == (ranks[name.rsplit(".", 1)[0]],)
    assert controller._scorer.scores().min() > 0


@pytest.mark.parametrize("options", [{}, {"parametrization": "svd"}])
def test_it_is_the_mean_of_the_entries_averages(options):
    """The other scores keep an average for each entry; means of those, taken at the end, are the same numbers."""
    means = {name: average.sensitivity[row] for name, average, row in averages(observed("sensitivity", **options))}
    for name, average, row in averages(observed("ratio", **options)):
        entries = average.sensitivity[row]
        if entries.dim() == 2:
            entries = entries.mean(dim=0 if name.endswith(".P") else 1)
        torch.testing.assert_close(means[name], entries, rtol=1e-5, atol=1e-9)
