"""What goes wrong in real runs, with either parametrization.

Elsewhere: a target rank of 0 for some modules in `test_budgets.py`, `torch.compile` in `test_conformance.py`.
"""

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import Blocks, adamw, batch, lora, train
from transformers import LlamaConfig, LlamaForCausalLM

import adalora
from adalora import plugins
from adalora.errors import AdaLoraWarning, AttachError, ConfigError
from adalora.lora.triplets import find_triplets

STEPS = 40
BOTH = pytest.mark.parametrize("kind", ["lora", "svd"])


def attach(model, kind, **settings):
    return adalora.attach(model, **{"target_rank": 2, "total_steps": STEPS, "parametrization": kind, **settings})


@BOTH
def test_target_equal_to_the_initial_rank(kind):
    model = lora()
    controller = attach(model, kind, target_rank=6)
    train(model, adamw(model), STEPS)
    controller.finalize()
    assert set(controller.ranks.values()) == {6}


@BOTH
def test_a_budget_of_one(kind):
    """One triplet in the whole model; six modules lose their adapter, and the model still trains and saves."""
    model = lora()
    controller = attach(model, kind, target_rank=None, total_rank=1)
    optimizer = adamw(model)
    train(model, optimizer, STEPS)
    assert sorted(controller.ranks.values()) == [0] * 6 + [1]
    train(model, optimizer, 2)
    controller.finalize()
    assert len([n for n, _ in model.named_parameters() if "lora_" in n]) == 2


@BOTH
@pytest.mark.parametrize("unit", [{}, {"budget_cost": "parameters"}])
def test_all_scores_tied(kind, unit):
    """A learning rate and data that move nothing: every score is 0, exactly b are kept, the same ones every time."""
    masks = []
    for _ in range(2):
        model = lora()
        controller = attach(model, kind, orthogonality="off", **unit)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        for _ in range(STEPS):
            (model(torch.zeros(2, 8)) * 0).sum().backward()
            optimizer.step()
        if not unit:
            assert controller.live == 14
        masks.append(controller.ranks)
    assert masks[0] == masks[1]


@BOTH
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_bad_gradients_are_left_out_counted_and_told(kind, bad):
    """Every third step is bad and the user skips it in the loop's own way: here by zeroing what is not finite."""

    class Guarded(torch.optim.SGD):
        def step(self, closure=None):
            """Leave the step out, as mixed precision does."""
            if all(bool(p.grad.isfinite().all()) for g in self.param_groups for p in g["params"] if p.grad is not None):
                super().step(closure)

    model = lora()
    controller = attach(model, kind)
    optimizer = Guarded([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def run():
        for step in range(STEPS):
            x, y = batch(step)
            (model(x) - y).square().mean().backward()
            if step % 3 == 0:
                next(h for h in controller.handles if h.rank).Q_parameter.grad[0, 0] = bad
            optimizer.step()
            optimizer.zero_grad()

    with pytest.warns(AdaLoraWarning, match="had no finite gradient and are left out of the scores"):
        run()
    last = controller.history.last("allocation")
    assert last["skipped_steps"] >= 5
    assert all(torch.tensor(last["module_scores"]).isfinite())
    assert controller.live == 14


@BOTH
@pytest.mark.parametrize("fused", [True, False])
def test_a_grad_scalers_overflow_is_no_step(kind, fused):
    """No weight moves, nothing is counted; fused optimizers run their hooks all the same."""
    model = lora()
    controller = attach(model, kind)
    optimizer = adamw(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(12):
        x, y = batch(step)
        loss = (model(x) - y).square().mean()
        scaler.scale(loss * (torch.inf if step in (3, 7) else 1)).backward()
        before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        scaler.step(optimizer)
        moved = any(bool((a != b).any()) for a, b in zip(before, (p for p in model.parameters() if p.requires_grad)))
        assert moved == (step not in (3, 7))
        scaler.update()
        optimizer.zero_grad()
    assert controller.step == 10


@BOTH
def test_scores_do_not_depend_on_the_loss_scale(kind):
    """A fused optimizer unscales by itself: the gradients that the hooks see are 1024 times too large."""
    scores = []
    for scale in (None, 1024.0):
        model = lora()
        orthogonality = {"orthogonality": "squared", "score_weights": "before"} if kind == "svd" else {}
        controller = attach(model, kind, **orthogonality)
        optimizer = adamw(model, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(12):
            x, y = batch(step)
            scaler.scale((model(x) - y).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        scores.append(controller._scorer.scores())
    torch.testing.assert_close(scores[0], scores[1], rtol=2e-3, atol=1e-4 * float(scores[0].max()))


@BOTH
def test_shorter_and_longer_than_told(kind):
    model = lora()
    controller = attach(model, kind, total_steps=200)
    train(model, adamw(model), 30)
    with pytest.warns(AdaLoraWarning, match="training ended after 30 of 200 steps"):
        controller.finalize()
    assert controller.live == 14
    model = lora()
    controller = attach(model, kind, total_steps=20)
    train(model, adamw(model), 35)
    controller.finalize()
    assert (controller.step, controller.live) == (35, 14)


@BOTH
def test_frozen_layers_score_nothing(kind):
    """A layer whose adapter is frozen gets no gradient and goes first; what it adds is nothing, it never learned."""
    model = lora()
    for name, parameter in model.named_parameters():
        if "lora_" in name and "layers.0" in name:
            parameter.requires_grad_(False)
    controller = attach(model, kind)
    train(model, adamw(model), STEPS)
    assert {rank for name, rank in controller.ranks.items() if "layers.0" in name} == {0}
    assert controller.live == 14


class Partly(Blocks):
    """The second block's `query` is left out where `used` is False."""

    used = True

    def forward(self, x):
        for number, block in enumerate(self.layers):
            if number == 0 or self.used:
                x = x + torch.tanh(block["query"](x))
            x = x + block["down"](torch.tanh(block["up"](x)))
        return self.head(x)


@BOTH
def test_a_module_without_a_gradient_for_a_step(kind):
    """Its averages wait; the step counts for all others and is not a skipped one."""
    model = lora(base=Partly)
    controller = attach(model, kind, handover=False)
    optimizer = adamw(model)
    train(model, optimizer, 4)
    names = [f"layers.1.query.{part}.sensitivity" for part in ("P", "lambda", "Q")]
    before = controller._scorer.state_dict()
    model.base_model.model.used = False
    train(model, optimizer, 1, start=4)
    between = controller._scorer.state_dict()
    assert all(torch.equal(before[name], between[name]) for name in names)
    assert not torch.equal(before["layers.0.query.P.sensitivity"], between["layers.0.query.P.sensitivity"])
    model.base_model.model.used = True
    train(model, optimizer, STEPS - 5, start=5)
    assert controller._scorer.skipped == 0
    assert controller.live == 14


@BOTH
def test_a_module_that_never_gets_a_gradient(kind):
    """It scores nothing, goes first, and the rest of the model has the whole budget."""
    model = lora(base=Partly)
    model.base_model.model.used = False
    controller = attach(model, kind)
    train(model, adamw(model), STEPS)
    assert controller.ranks["layers.1.query"] == 0
    assert controller.live == 14
    assert controller._scorer.skipped == 0


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
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(kind, reentrant):
    """The same run as without it."""

    class Checkpointed(Blocks):
        def forward(self, x):
            if reentrant and not x.requires_grad:
                x = x.detach().requires_grad_()
            for block in self.layers:
                x = checkpoint(self.one, block, x, use_reentrant=reentrant)
            return self.head(x)

        @staticmethod
        def one(block, x):
            """One block."""
            x = x + torch.tanh(block["query"](x))
            return x + block["down"](torch.tanh(block["up"](x)))

    losses, ranks = [], []
    for base in (Blocks, Checkpointed):
        model = lora(base=base)
        controller = attach(model, kind)
        losses.append(train(model, adamw(model), STEPS))
        ranks.append(controller.ranks)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert ranks[0] == ranks[1]


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameter_types(kind, dtype):
    """Averages are fp32 whatever the type; the run allocates and stays finite."""
    model = lora().to(dtype)
    controller = attach(model, kind)
    losses = train(model, adamw(model, eps=1e-4, lr=3e-3), 20, dtype=dtype)
    left = next(iter(controller._scorer._left.values()))
    assert {left.factors.sensitivity.dtype, left.weights.uncertainty.dtype} == {torch.float32}
    losses += train(model, adamw(model, eps=1e-4, lr=3e-3), STEPS - 20, dtype=dtype)
    assert {p.dtype for h in controller.handles if not h.removed for p, _ in h.factors.values()} == {dtype}
    assert torch.tensor(losses).isfinite().all()
    assert controller.live == 14


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(kind, dtype):
    model = lora()
    controller = attach(model, kind)
    optimizer = adamw(model)
    for step in range(STEPS):
        x, y = batch(step)
        with torch.autocast("cpu", dtype=dtype):
            loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {p.dtype for h in controller.handles if not h.removed for p, _ in h.factors.values()} == {torch.float32}
    assert controller.live == 14


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


@BOTH
def test_P_and_Q_in_two_optimizers_make_one_step(kind):
    """And both optimizers' states are cut at compaction."""
    model = lora()
    controller = attach(model, kind)
    lefts = [h.P_parameter for h in controller.handles]
    rest = [p for h in controller.handles for p, _ in h.factors.values() if not any(p is left for left in lefts)]
    optimizers = [torch.optim.AdamW(lefts, lr=1e-2), torch.optim.AdamW(rest, lr=1e-2)]
    for step in range(STEPS):
        x, y = batch(step)
        (model(x) - y).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert controller.step == step + 1
    assert controller.live == 14
    for h in controller.handles:
        if not h.removed:
            for optimizer, parameter in zip(optimizers, (h.P_parameter, h.Q_parameter)):
                assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape


def test_a_new_optimizer_in_the_middle_takes_over():
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=STEPS)
    train(model, adamw(model), 20)
    train(model, adamw(model), 20, start=20)
    assert controller.step == STEPS
    assert controller.live == 14


def test_total_steps_are_fixed_by_the_first_step():
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=STEPS)
    controller.set_total_steps(STEPS + 10)
    controller.set_total_steps(STEPS)
    train(model, adamw(model), 1)
    controller.set_total_steps(STEPS)
    with pytest.raises(ConfigError, match=r"total_steps=50 comes after 1 steps of a run of 40"):
        controller.set_total_steps(50)
    assert len(controller.history.of("start")) == 3


def test_without_a_handover_the_last_allocation_does_not_see_its_own_step():
    """As in PEFT: scores end with the step before the final phase, with and without warm-up in them."""
    for handover, expected in ((False, 21), (True, 16)):
        model = lora()
        controller = adalora.attach(model, target_rank=2, total_steps=STEPS, handover=handover)
        train(model, adamw(model), controller.schedule.decrease_end + 1)
        assert controller.schedule.decrease_end == 21
        assert controller._scorer.observed == expected


def test_a_closure_sees_the_orthogonality_term():
    """Lightning and L-BFGS compute gradients inside `step`."""
    results = []
    for with_closure in (False, True):
        model = lora()
        controller = adalora.attach(
            model, target_rank=2, total_steps=STEPS, parametrization="svd", orthogonality="squared"
        )
        optimizer = adamw(model)
        for step in range(10):
            x, y = batch(step)

            def closure(x=x, y=y, model=model, optimizer=optimizer):
                optimizer.zero_grad()
                loss = (model(x) - y).square().mean()
                loss.backward()
                return loss

            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        results.append(torch.cat([h.Q_ri.flatten() for h in controller.handles]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_channels_last_parameters_are_written():
    """A 3x3 convolution whose factor is not laid out row by row: the hand-over must not write to a copy."""

    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, padding=1)

        def forward(self, x):
            return self.conv(x)

    torch.manual_seed(0)
    model = get_peft_model(Conv(), LoraConfig(r=4, target_modules=["conv"])).to(memory_format=torch.channels_last)
    controller = adalora.attach(model, target_rank=2, total_steps=20, compact=False)
    optimizer = adamw(model)
    x, y = torch.randn(4, 4, 5, 5), torch.randn(4, 6, 5, 5)
    for _ in range(20):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if controller.history.of("handover"):
            break
    h = controller.handles[0]
    gram = h.Q_ri @ h.Q_ri.T
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), atol=1e-5, rtol=0)


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


@pytest.mark.parametrize("revival", [True, False])
def test_a_rising_schedule_brings_triplets_back_only_where_they_may_revive(revival, monkeypatch):
    """A registered curve falls, rises, and falls again."""
    curve = lambda done: 0.2 if 0.2 < done < 0.5 else 0.8  # noqa: E731
    monkeypatch.setattr("adalora.plugins.names", lambda group: ["wave"])
    monkeypatch.setattr("adalora.plugins.load", lambda group, name: curve)
    model = lora()
    controller = adalora.attach(
        model, target_rank=2, total_steps=60, schedule="wave", revival=revival, allocation_interval=1
    )
    optimizer, live = adamw(model), []
    for step in range(60):
        train(model, optimizer, 1, start=step)
        live.append(controller.live)
    rises = [after > before for before, after in itertools.pairwise(live)]
    assert any(rises) == revival
    assert live[-1] == controller.target_budget == 14
    assert sum(record["revived"] for record in controller.history.of("allocation")) > 0 or not revival


@pytest.mark.parametrize("revival", [True, False])
def test_revivals_are_counted_and_can_be_forbidden(revival):
    """With noisy scores some pruned triplet comes back, if it may."""
    model = lora()
    controller = adalora.attach(
        model, target_rank=2, total_steps=60, revival=revival, importance="random", allocation_interval=1
    )
    train(model, adamw(model), 60)
    revived = sum(record["revived"] for record in controller.history.of("allocation"))
    assert (revived > 0) == revival
    assert controller.live == 14


@pytest.mark.parametrize("cost", ["rank", "parameters"])
def test_a_rising_schedule_revives_nothing_where_that_is_forbidden(cost, monkeypatch):
    """A registered schedule may give back what it took; without revival the budget stays unspent."""
    monkeypatch.setattr(plugins, "names", lambda group: ["dip"] if group == "schedules" else [])
    monkeypatch.setattr(plugins, "load", lambda group, name: lambda done: 0.9 if done > 0.6 else 0.2)
    lives = {}
    for revival in (True, False):
        model = lora()
        controller = adalora.attach(
            model, target_rank=2, total_steps=60, schedule="dip", revival=revival, budget_cost=cost, compact=False
        )
        train(model, adamw(model), 60)
        records = controller.history.of("allocation")
        lives[revival] = [record["live"] for record in records]
        assert any(record["revived"] for record in records) == revival
    assert max(lives[True][-3:-1]) > max(lives[True][:3])
    assert lives[False] == sorted(lives[False], reverse=True)
