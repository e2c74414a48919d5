"""What a model and its adapters may be in real runs, with either parametrization: copied, tied, of several adapters."""

import copy

import pytest
import torch
from kinds import BOTH, STEPS, attach
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import adalora
from adalora.errors import AttachError
from adalora.lora.layers.triplets import find_triplets
from helpers.toys import Blocks, adamw, batch, lora, train


@BOTH
def test_a_frozen_adapter_beside_it_is_left_alone(kind):
    """Two adapters active at once, one of them frozen and not attached."""
    model = lora()
    model.add_adapter("frozen", LoraConfig(r=3, target_modules=["query", "head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "frozen"])
    for name, parameter in model.named_parameters():
        if ".frozen." in name:
            parameter.requires_grad_(False)
    before = {n: p.clone() for n, p in model.named_parameters() if ".frozen." in n}
    controller = attach(model, kind, adapter="default")
    train(model, adamw(model), STEPS)
    assert controller.live == 14
    after = {n: p for n, p in model.named_parameters() if ".frozen." in n}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


@BOTH
def test_a_deep_copy_in_the_middle_of_a_run(kind):
    """The copy computes the same, is attached to nothing, and the original's run goes on untouched by it."""
    model = lora()
    controller = attach(model, kind)
    optimizer = adamw(model)
    train(model, optimizer, STEPS // 2)
    twin = copy.deepcopy(model)
    x, _ = batch(0)
    expected = model(x).detach()
    assert torch.equal(twin(x), expected)
    train(twin, adamw(twin), 5)
    assert controller.step == STEPS // 2
    assert torch.equal(model(x), expected)
    train(model, optimizer, STEPS // 2, start=STEPS // 2)
    assert controller.live == 14


@BOTH
def test_disable_adapter_between_steps(kind):
    model, plain = lora(), Blocks()
    controller = attach(model, kind)
    optimizer = adamw(model)
    torch.manual_seed(1)
    plain = Blocks()
    x, _ = batch(0)
    for start in range(0, STEPS, 8):
        train(model, optimizer, 8, start=start)
        with torch.no_grad(), model.disable_adapter():
            assert torch.equal(model(x), plain(x))
    assert controller.step == STEPS


@BOTH
def test_a_scale_for_a_trained_adapter_is_refused(kind):
    """It keeps the one that it was trained with, and an option without effect is a mistake."""
    model = lora()
    attach(model, kind)
    train(model, adamw(model), STEPS)
    adalora.controllers(model)["default"].finalize()
    before = {h.name: h.scale for h in adalora.controllers(model)["default"].handles if h.rank}
    for wrong in ("target", 2.0):
        with pytest.raises(AttachError, match=r'trained already and keeps its scale: leave scale=.* out, or use "init'):
            attach(copy.deepcopy(model), kind, target_rank=1, scale=wrong)
    for right in ({}, {"scale": "initial"}):
        again = attach(copy.deepcopy(model), kind, target_rank=1, **right)
        assert {h.name: h.scale for h in again.handles} == pytest.approx(before)


@BOTH
def test_an_adapter_without_values_is_refused(kind):
    model = get_peft_model(Blocks(), LoraConfig(r=4, target_modules=["query"]), low_cpu_mem_usage=True)
    with pytest.raises(AttachError, match="has no values yet"):
        attach(model, kind)


@BOTH
def test_low_cpu_mem_usage_with_values(kind, tmp_path):
    """Loaded that way an adapter has values: it is attached and trains on."""
    lora().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(Blocks(), tmp_path, is_trainable=True, low_cpu_mem_usage=True)
    controller = attach(model, kind)
    train(model, adamw(model), STEPS)
    assert controller.live == 14


@BOTH
def test_a_copy_of_an_untrained_attached_model_has_the_same_scale(kind):
    """The scale rule is applied once, and anew for another target."""
    model = lora()
    rule = {"scale": "matched"} if kind == "lora" else {}
    scale = attach(model, kind, **rule).handles[0].scale
    assert scale == (3.0 if kind == "lora" else 6.0)  # α/r = 6, and √(r₀/r) is 2 as a whole number
    twin = copy.deepcopy(model)
    assert attach(twin, kind, **rule).handles[0].scale == scale
    other = copy.deepcopy(model)
    assert attach(other, kind, target_rank=3, **rule).handles[0].scale == pytest.approx(4.0)
    assert other.peft_config["default"].lora_alpha == pytest.approx(24)


def test_expert_parameters_are_refused():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8, 8))

        def forward(self, x):
            return x @ self.weight[0]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Experts()

        def forward(self, x):
            return self.experts(x)

    model = get_peft_model(Net(), LoraConfig(r=2, target_parameters=["experts.weight"]))
    with pytest.raises(AttachError, match="shares one factor among experts"):
        adalora.attach(model, target_rank=1, total_steps=10)


@BOTH
def test_tied_layers_count_once(kind):
    """One module at two places: one adapter, whose triplets get the gradients of both."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = self.first
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))

    model = lora(base=Tied, targets=["first", "second", "head"])
    assert len(find_triplets(model, "default")) == 2
    controller = attach(model, kind)
    train(model, adamw(model), STEPS)
    assert controller.live == 4


def tied_llama():
    """Its output head is its embedding."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, tie_word_embeddings=True, **sizes))


TIED = pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings:UserWarning", "ignore:Setting `save_em")


@BOTH
@TIED
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tied_weights(kind, targets, tmp_path):
    """One weight in two places, with an adapter at either or one at each: what is saved is the live model."""
    model = get_peft_model(tied_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=[*targets, "q_proj"]))
    controller = attach(model, kind)
    optimizer = adamw(model)
    for step in range(STEPS):
        words = torch.randint(32, (4, 6), generator=torch.Generator().manual_seed(step))
        model(input_ids=words, labels=words).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert controller.live == 2 * (2 + len(targets))
    expected = model(input_ids=words).logits.detach()
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(tied_llama(), tmp_path)
    torch.testing.assert_close(stock(input_ids=words).logits, expected, atol=1e-5, rtol=1e-4)


@BOTH
@TIED
def test_tied_factors_are_refused(kind):
    """PEFT's `ensure_weight_tying` makes P of the embedding the head's Q: no triplet could leave one of them."""
    config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    model = get_peft_model(tied_llama(), config)
    with pytest.raises(AttachError, match=r"lm_head: shares its LoRA factors with model\.embed_tokens .*leave ensure"):
        attach(model, kind)
    assert adalora.controllers(model) == {}


@BOTH
@pytest.mark.filterwarnings("ignore:Adapter name:UserWarning")
@pytest.mark.parametrize("name", ["a", "E", "lora", "query", "lora_lambda"])
def test_any_adapter_name_saves_and_loads(kind, name, tmp_path):
    """Beside a plain adapter that is left alone."""
    model = get_peft_model(Blocks(), LoraConfig(r=6, target_modules=["query", "head"]), adapter_name=name)
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["query", "head"]))
    model.set_adapter(name)
    controller = attach(model, kind, adapter=name)
    train(model, adamw(model), STEPS)
    assert controller.live == 6
    x, _ = batch(0)
    expected = model(x).detach()
    model.save_pretrained(tmp_path, selected_adapters=[name])
    base = Blocks()
    state = model.base_model.model.state_dict()
    base.load_state_dict({k.replace("base_layer.", ""): v for k, v in state.items() if "lora" not in k})
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path / name)(x), expected, atol=1e-5, rtol=1e-4)


@BOTH
@pytest.mark.filterwarnings("ignore:Adapter .* was active", "ignore:Already found a `peft_config`:UserWarning")
def test_two_attached_adapters_and_a_plain_one_train_at_once(kind, tmp_path):
    """Each keeps to its own budget, the plain one to its rank; all three together are what is saved."""
    names = ["one", "two", "plain"]
    model = get_peft_model(Blocks(), LoraConfig(r=6, target_modules=["query", "head"]), adapter_name="one")
    model.add_adapter("two", LoraConfig(r=4, target_modules=["query", "up"]))
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["down", "query"]))
    model.base_model.set_adapter(names)
    base = {k.replace("base_layer.", ""): v for k, v in model.base_model.model.state_dict().items() if "lora" not in k}
    first = attach(model, kind, adapter="one")
    second = attach(model, kind, adapter="two", target_rank=1)
    train(model, adamw(model), STEPS)
    for controller in (first, second):
        controller.finalize()
        assert controller.step == STEPS
    assert (first.live, second.live) == (6, 4)
    plain = [p for name, p in model.named_parameters() if "lora_B.plain" in name]
    assert {p.shape[1] for p in plain} == {2}
    assert all(bool(p.any()) for p in plain)
    x, _ = batch(0)
    expected = model(x).detach()
    model.save_pretrained(tmp_path)
    fresh = Blocks()
    fresh.load_state_dict(base)
    stock = PeftModel.from_pretrained(fresh, tmp_path / "one", adapter_name="one")
    for name in names[1:]:
        stock.load_adapter(tmp_path / name, adapter_name=name)
    stock.base_model.set_adapter(names)
    torch.testing.assert_close(stock(x), expected, atol=1e-5, rtol=1e-4)


@BOTH
def test_modules_to_save(kind, tmp_path):
    """A head trained in full beside the triplets."""
    model = lora(targets=["query", "up", "down"], modules_to_save=["head"])
    controller = attach(model, kind)
    train(model, adamw(model), STEPS)
    assert controller.live == 12
    x, _ = batch(0)
    expected = model(x).detach()
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    torch.testing.assert_close(PeftModel.from_pretrained(Blocks(), tmp_path)(x), expected, atol=1e-5, rtol=1e-4)
