"""s·P·Λ·Q is what a layer adds, before and after pruned triplets are removed and λ is folded."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from adalora.lora.layers.patterns import write_patterns
from adalora.lora.layers.svd import add_lambda, fold_lambda
from adalora.lora.layers.triplets import find_triplets
from adalora.lora.ranks.compaction import compact
from adalora.lora.ranks.masking import zero_pruned

LAYERS = {
    "Linear": lambda: nn.Linear(5, 7),
    "Embedding": lambda: nn.Embedding(6, 5),
    "Conv1d": lambda: nn.Conv1d(2, 3, 3),
    "Conv2d": lambda: nn.Conv2d(2, 3, (1, 2)),
    "Conv3d": lambda: nn.Conv3d(2, 3, 2),
    "Conv1d_groups": lambda: nn.Conv1d(4, 6, 3, groups=2),
    "Conv2d_depthwise": lambda: nn.Conv2d(3, 3, (1, 2), groups=3),
    "Conv2d_groups": lambda: nn.Conv2d(6, 3, 2, groups=3),
    "Conv3d_groups": lambda: nn.Conv3d(2, 4, 2, groups=2),
}
NUMBERS = st.one_of(st.just(0.0), st.floats(-1e3, 1e3), st.floats(-1e-3, 1e-3))


@torch.no_grad()
def update(handle):
    """ΔW as PEFT has it, in float64; None where the adapter has left the layer.

    PEFT has none of a convolution with groups: there it is read off the layer's answers to unit inputs.
    """
    if handle.removed:
        return None
    if handle.groups == 1:
        return handle.layer.get_delta_weight(handle.adapter).clone()
    base = handle.layer.get_base_layer()
    units = torch.eye(base.in_channels * math.prod(base.kernel_size), dtype=torch.float64)
    units = units.view(-1, base.in_channels, *base.kernel_size)
    return (handle.layer(units) - base(units)).flatten(1).T


def product(handle):
    """S·P·Λ·Q, each group's outputs with its own rows of Q."""
    parts = zip(handle.left_or.chunk(handle.groups), handle.Q_ri.chunk(handle.groups, dim=1))
    return handle.scale * torch.cat([left @ right for left, right in parts])


@pytest.mark.parametrize("kind", list(LAYERS))
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_compaction_and_folding_leave_it_unchanged(kind, data):
    rank, rslora = data.draw(st.integers(1, 6)), data.draw(st.booleans())
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rank, max_size=rank)))
    weights = data.draw(st.one_of(st.none(), st.lists(NUMBERS, min_size=rank, max_size=rank)))
    gain = data.draw(st.floats(0.01, 10))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    layer = LAYERS[kind]()
    groups = getattr(layer, "groups", 1)
    config = LoraConfig(
        r=rank * groups,
        lora_alpha=data.draw(st.integers(1, 40)),
        target_modules=["0"],
        init_lora_weights=False,
        use_rslora=rslora,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's: it does not merge groups
        model = get_peft_model(nn.Sequential(layer).double(), config)
    (h,) = find_triplets(model, "default")
    if weights is not None:
        weights = [w * (g + 1) for g in range(groups) for w in weights]
        add_lambda(h, torch.tensor(weights, dtype=torch.float64), gain=gain)
    h.mask = mask
    zero_pruned([h])
    before = update(h)
    expected = product(h)
    flat = before.flatten(1)
    close = {"rtol": 1e-10, "atol": 1e-10 * float(1 + expected.abs().max())}
    torch.testing.assert_close(flat, expected, **close)

    folded_first = data.draw(st.booleans())
    for act in (fold_lambda, lambda handle: compact([handle], None))[:: 1 if folded_first else -1]:
        if not h.removed:
            act(h)
        after = update(h)
        torch.testing.assert_close(torch.zeros_like(before) if after is None else after, before, **close)
    assert h.rank == int(mask.sum())
    if not h.removed:
        write_patterns(model, [h])
        live = model.peft_config["default"]
        assert live.r == h.rank * groups == h.layer.r["default"]
        s = live.lora_alpha / (live.r**0.5 if rslora else live.r)
        assert s * h.left_or.norm() == pytest.approx(float(h.scale * h.left_or.norm()), rel=1e-9)
