"""s·P·Λ·Q is what a layer adds, before and after pruned triplets are removed and λ is folded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from adalora.lora.compaction import compact
from adalora.lora.masking import zero_pruned
from adalora.lora.patterns import write_patterns
from adalora.lora.svd import add_lambda, fold_lambda
from adalora.lora.triplets import find_triplets

LAYERS = {
    "Linear": lambda: nn.Linear(5, 7),
    "Embedding": lambda: nn.Embedding(6, 5),
    "Conv1d": lambda: nn.Conv1d(2, 3, 3),
    "Conv2d": lambda: nn.Conv2d(2, 3, (1, 2)),
    "Conv3d": lambda: nn.Conv3d(2, 3, 2),
}
NUMBERS = st.one_of(st.just(0.0), st.floats(-1e3, 1e3), st.floats(-1e-3, 1e-3))


def update(handle):
    """ΔW as PEFT has it, in float64; None where the adapter has left the layer."""
    return None if handle.removed else handle.layer.get_delta_weight(handle.adapter).detach().clone()


@pytest.mark.parametrize("kind", list(LAYERS))
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_compaction_and_folding_leave_it_unchanged(kind, data):
    rank, rslora = data.draw(st.integers(1, 6)), data.draw(st.booleans())
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rank, max_size=rank)))
    weights = data.draw(st.one_of(st.none(), st.lists(NUMBERS, min_size=rank, max_size=rank)))
    gain = data.draw(st.floats(0.01, 10))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    config = LoraConfig(
        r=rank,
        lora_alpha=data.draw(st.integers(1, 40)),
        target_modules=["0"],
        init_lora_weights=False,
        use_rslora=rslora,
    )
    model = get_peft_model(nn.Sequential(LAYERS[kind]()).double(), config)
    (h,) = find_triplets(model, "default")
    if weights is not None:
        add_lambda(h, torch.tensor(weights, dtype=torch.float64), gain=gain)
    h.mask = mask
    zero_pruned([h])
    before = update(h)
    product = h.scale * h.left_or @ h.Q_ri
    flat = before.flatten(1)
    close = {"rtol": 1e-10, "atol": 1e-10 * float(1 + product.abs().max())}
    torch.testing.assert_close(flat, product, **close)

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
        assert live.r == h.rank
        s = live.lora_alpha / (live.r**0.5 if rslora else live.r)
        assert s * h.left_or.norm() == pytest.approx(float(h.scale * h.left_or.norm()), rel=1e-9)
