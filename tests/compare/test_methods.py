"""Every method really trains what it says, at the size that the budget allows."""

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from adalora.compare.bottleneck import Bottleneck, inject, places
from adalora.compare.cells import cells_of_rate
from adalora.compare.methods import METHODS
from adalora.compare.running import run_cell
from adalora.compare.suite import Rate
from adalora.errors import RecipeError

# All linear layers of two BERT layers, without the head: attention 4 × (32 + 32), feed-forward 2 × (32 + 64).
PER_RANK = 2 * (4 * 64 + 2 * 96)
POOLER = 64


def bert():
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertModel(BertConfig(vocab_size=15, **shape), add_pooling_layer=False).eval()


@pytest.mark.parametrize(("placement", "adapters"), [("houlsby", 4), ("pfeiffer", 2)])
def test_bottleneck_is_the_largest_that_fits(placement, adapters):
    model = bert()
    trained = inject(model, placement, budget=2000)
    found = [m for m in model.modules() if isinstance(m, Bottleneck)]
    norms = 5 * 64 if placement == "houlsby" else 0
    size = found[0].adapter_down.out_features
    assert len(found) == adapters
    assert trained == adapters * (2 * 32 * size + size + 32) + norms
    assert trained <= 2000 < trained + adapters * 65


def test_adapter_starts_near_the_identity_and_computes_its_formula():
    base = torch.nn.Linear(8, 8)
    layer = Bottleneck(base, width=8, size=3, activation="relu")
    x = torch.randn(5, 8)
    y = base(x)
    assert 0 < (layer(x) - y).abs().max() < 0.01
    layer.adapter_up.weight.data.normal_()
    down, up = layer.adapter_down, layer.adapter_up
    torch.testing.assert_close(layer(x), y + torch.relu(y @ down.weight.T) @ up.weight.T)


def test_names_of_a_decoder_are_known_and_attention_is_not_taken_for_feed_forward():
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    llama = LlamaModel(LlamaConfig(vocab_size=8, **shape))
    assert set(places(llama, "houlsby")) == {"layers.0.self_attn.o_proj", "layers.0.mlp.down_proj"}
    assert set(places(bert(), "pfeiffer")) == {f"encoder.layer.{n}.output.dense" for n in range(2)}


def test_too_small_a_budget_and_unknown_names_are_refused():
    with pytest.raises(RecipeError, match="at least"):
        inject(bert(), "houlsby", budget=100)
    with pytest.raises(RecipeError, match="Sequential"):
        inject(torch.nn.Sequential(torch.nn.Linear(2, 2)), "pfeiffer", budget=100)


@pytest.mark.parametrize("name", list(METHODS))
def test_method_runs_on_a_recipe(name, make_suite):
    suite = make_suite(methods=[name], baseline=name, steps=24, seeds=[1])
    cell = cells_of_rate(suite, suite.tasks[0], 2, suite.methods[0], rate=Rate(0.01))[0]
    row = run_cell(cell)
    assert row["status"] == "ok", row.get("traceback") or row
    assert row["steps"] == 24
    assert row["rows"] == "24 rows of the test split"
    budget, triplets = 2 * (PER_RANK + POOLER), 26
    exact = {
        "head": 0,
        "lora": budget,
        "rslora": budget,
        "svd-lora": budget,
        "dora": budget + 2 * (4 * 32 + 64 + 32) + 32,
    }
    if name in exact:
        assert row["parameters"] == exact[name]
    elif name in ("houlsby", "pfeiffer"):
        assert 0.6 * budget < row["parameters"] <= budget
    elif name in ("ours", "random", "gradient"):
        assert budget - 96 < row["parameters"] <= budget
    elif name in ("eva", "peft-adalora"):  # 26 triplets of 64 or 96, wherever they went
        assert triplets * 64 * 0.8 <= row["parameters"] <= triplets * 97
