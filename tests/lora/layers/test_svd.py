"""P, λ and Q as parameters: what leaves the model is plain LoRA, and PEFT's own operations still work."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

import adalora
from adalora.errors import AttachError

STEPS, RANK = 30, 4


class Everything(nn.Module):
    """An Embedding, a Linear and the three convolutions, in one model."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.conv1 = nn.Conv1d(8, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 5, (3, 2), padding=(1, 0))
        self.conv3 = nn.Conv3d(1, 4, (3, 2, 1))
        self.linear = nn.Linear(6, 9)

    def forward(self, words):
        h = torch.tanh(self.conv1(self.words(words).transpose(1, 2)))  # [b, 6, n]
        h = torch.tanh(self.linear(h.transpose(1, 2)))  # [b, n, 9]
        h = torch.tanh(self.conv2(h.unsqueeze(1)))  # [b, 5, n, 8]
        return self.conv3(h.unsqueeze(1)).flatten(1)


TARGETS = ["words", "conv1", "conv2", "conv3", "linear"]


def lora(**settings):
    torch.manual_seed(1)
    return get_peft_model(Everything(), LoraConfig(r=RANK, lora_alpha=8, target_modules=TARGETS, **settings))


def train(model, *, steps=STEPS, lr=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    goal = None
    for step in range(steps):
        words = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(step))
        out = model(words)
        goal = torch.linspace(-2, 2, out.shape[1]) if goal is None else goal
        (out - goal).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


WORDS = torch.tensor([[1, 4, 7, 2, 2], [0, 10, 3, 5, 9]])


@torch.no_grad()
def answer(model):
    return model.eval()(WORDS)


def attach(model, **settings):
    return adalora.attach(model, parametrization="svd", target_rank=2, total_steps=STEPS, **settings)


@pytest.fixture
def trained():
    """Trained to the middle of the decrease: λ differ, some are pruned."""
    model = lora()
    controller = attach(model)
    train(model, steps=9)
    assert controller.allocations > 0
    assert 10 < controller.live < 20
    return model, controller


@pytest.mark.parametrize("initialization", ["orthonormal", "gaussian", "keep"])
def test_it_starts_with_the_base_models_output(initialization):
    model = lora()
    with model.disable_adapter():
        base = answer(model)
    controller = attach(model, initialization=initialization)
    assert torch.equal(answer(model), base)
    names = [n for n, p in model.named_parameters() if "lora_lambda" in n and p.requires_grad]
    assert len(names) == 5
    for h in controller.handles:
        gram_Q, gram_P = h.Q_ri @ h.Q_ri.T, h.P_or.T @ h.P_or
        if initialization == "orthonormal":
            torch.testing.assert_close(gram_Q, torch.eye(RANK), atol=1e-5, rtol=0)
            torch.testing.assert_close(gram_P, torch.eye(RANK), atol=1e-5, rtol=0)
        elif initialization == "gaussian":
            assert 0.01 < float(h.Q_ri.std()) < 0.03
        else:
            assert h.lambda_parameter.tolist() == [1.0] * RANK
            assert not bool(h.P_or.any())


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_stock_peft_loads_what_is_saved(trained, tmp_path):
    model, _ = trained
    expected = answer(model)
    state = get_peft_model_state_dict(model)
    assert not [key for key in state if "lambda" in key]
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    stock = PeftModel.from_pretrained(Everything(), tmp_path)
    torch.testing.assert_close(answer(stock), expected, atol=1e-5, rtol=1e-5)


def test_loading_a_plain_state_gives_the_same_model_and_the_same_pace(trained):
    """λ and P come back as they were, up to the length of P's columns, which stay as long as the live ones."""
    model, controller = trained
    expected = answer(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = [(h.P_or.clone(), h.lambda_parameter.detach().clone()) for h in controller.handles]
    train_more = copy.deepcopy(model)
    train(train_more, steps=3)
    assert not torch.allclose(answer(train_more), expected)
    assert train_more.load_state_dict(state).missing_keys == []
    torch.testing.assert_close(answer(train_more), expected, atol=1e-5, rtol=1e-4)
    model.load_state_dict(state)
    for h, (P, weights) in zip(controller.handles, before):
        torch.testing.assert_close(h.P_or, P, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(h.lambda_parameter.detach(), weights, atol=1e-5, rtol=1e-4)


def test_a_state_of_other_ranks_is_refused(trained):
    model, _ = trained
    state = model.state_dict()
    key = next(k for k in state if "linear.lora_B" in k)
    state[key] = state[key][:, :2]
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(state)


@pytest.mark.parametrize("safe", [True, False])
def test_merge_and_unmerge(trained, safe):
    model, _ = trained
    expected = answer(model)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(answer(model), expected, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(answer(model), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(answer(model.merge_and_unload()), expected, atol=1e-5, rtol=1e-4)


def test_disabled_frozen_switched_and_deleted(trained):
    model, controller = trained
    expected = answer(model)
    with model.disable_adapter():
        assert not torch.allclose(answer(model), expected)
    assert torch.equal(answer(model), expected)
    model.add_adapter("second", LoraConfig(r=2, target_modules=TARGETS))
    model.set_adapter("second")
    assert not any(h.lambda_parameter.requires_grad for h in controller.handles)
    assert not torch.allclose(answer(model), expected)
    model.set_adapter("default")
    assert all(h.lambda_parameter.requires_grad for h in controller.handles)
    assert torch.equal(answer(model), expected)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert not [n for n, _ in model.named_parameters() if "default" in n]


def test_half_precision_moves_reach_it(trained):
    model, controller = trained
    model.to(torch.bfloat16)
    assert {h.lambda_parameter.dtype for h in controller.handles} == {torch.bfloat16}
    assert answer(model).isfinite().all()


def test_a_deep_copy_is_a_model_of_its_own(trained):
    model, controller = trained
    expected = answer(model)
    twin = copy.deepcopy(model)
    assert torch.equal(answer(twin), expected)
    train(twin, steps=2)
    assert torch.equal(answer(model), expected)
    assert not torch.equal(answer(twin), expected)
    again = attach(twin)
    assert [h.scale for h in again.handles] == [h.scale for h in controller.handles]
    folded = {k: v for k, v in twin.state_dict().items() if "lora" in k}
    assert not any("lambda" in key for key in folded)


def test_the_whole_model_can_be_pickled(trained, tmp_path):
    model, _ = trained
    expected = answer(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(answer(loaded), expected)
    torch.testing.assert_close(answer(loaded.merge_and_unload()), expected, atol=1e-5, rtol=1e-4)


def test_the_end_is_plain_lora():
    model = lora()
    controller = attach(model)
    train(model)
    expected = answer(model)
    controller.finalize()
    torch.testing.assert_close(answer(model), expected, atol=1e-6, rtol=1e-5)
    assert controller.live == 10
    assert sum(h.rank for h in controller.handles) == 10
    assert not [n for n, _ in model.named_parameters() if "lambda" in n]
    assert not [m for m in model.modules() if getattr(m, "lora_variant", None)]


def test_masks_hold_lambda_at_zero():
    model = lora()
    controller = attach(model, compact=False)
    train(model, steps=28)
    zeros = sum(int((h.lambda_parameter == 0).sum()) for h in controller.handles)
    assert zeros == 20 - controller.live == 10


def test_compaction_leaves_the_output_and_cuts_lambda_with_its_moments():
    model = lora()
    masked, cut = copy.deepcopy(model), model
    attach(masked, compact=False)
    controller = attach(cut)
    train(masked, steps=17)
    optimizer = train(cut, steps=17)
    torch.testing.assert_close(answer(cut), answer(masked), atol=1e-6, rtol=1e-5)
    for h in controller.handles:
        if not h.removed:
            assert h.lambda_parameter.shape == (h.rank,) == (h.live_rank,)
            assert optimizer.state[h.lambda_parameter]["exp_avg"].shape == (h.rank,)
    train(cut, steps=1)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_a_scale_of_its_own_survives_compaction(rslora, tmp_path):
    """The file's P holds the layer's gain: its α must not hold it too."""
    model = lora(use_rslora=rslora)
    controller = attach(model, scale="matched")
    train(model, steps=17)
    assert all(h.gain > 1 for h in controller.handles if not h.removed)
    assert sum(h.rank for h in controller.handles) == 10
    for moment in ("compacted", "finished"):
        expected = answer(model)
        model.save_pretrained(tmp_path / moment)
        torch.manual_seed(1)
        stock = PeftModel.from_pretrained(Everything(), tmp_path / moment)
        torch.testing.assert_close(answer(stock), expected, atol=1e-5, rtol=1e-5)
        if moment == "compacted":
            train(model, steps=STEPS - 17)
            controller.finalize()


@pytest.mark.parametrize("initialization", ["keep", "orthonormal"])
def test_a_trained_adapter_keeps_what_it_learned(initialization):
    model = lora()
    train(model, steps=5)
    expected = answer(model)
    controller = attach(model, initialization=initialization)
    torch.testing.assert_close(answer(model), expected, atol=1e-5, rtol=1e-4)
    if initialization == "orthonormal":
        h = controller.handles[-1]
        torch.testing.assert_close(h.P_or.T @ h.P_or, torch.eye(RANK), atol=1e-5, rtol=0)
        falling = h.lambda_parameter.detach()
        assert torch.equal(falling, falling.sort(descending=True).values)


def test_gaussian_would_lose_it():
    model = lora()
    train(model, steps=2)
    with pytest.raises(AttachError, match='initialization="gaussian" would lose that'):
        attach(model, initialization="gaussian")


def test_attaching_a_copy_as_plain_lora_folds(trained):
    model, _ = trained
    expected = answer(model)
    twin = copy.deepcopy(model)
    adalora.attach(twin, target_rank=1, total_steps=10)
    torch.testing.assert_close(answer(twin), expected, atol=1e-6, rtol=1e-5)
    assert not [n for n, _ in twin.named_parameters() if "lambda" in n]


def first_update(model, handles_of):
    """‖ΔW‖ of every layer after one step of Adam."""
    train(model, steps=1, lr=1e-3)
    return torch.tensor([float(h.scale * (h.left_or @ h.Q_ri).norm()) for h in handles_of])


@pytest.mark.parametrize("initialization", ["orthonormal", "gaussian"])
def test_matched_scale_moves_as_far_as_lora_in_the_first_step(initialization):
    """A LoRA of the target rank; random A and gradients, so within a factor."""
    small = get_peft_model(Everything(), LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS))
    lora_handles = adalora.lora.layers.triplets.find_triplets(small, "default")
    reference = first_update(small, lora_handles) / 2**0.5
    model = lora()
    controller = attach(model, scale="matched", initialization=initialization)
    ours = first_update(model, controller.handles) / RANK**0.5
    ratio = (ours / reference)[-1]
    assert 0.6 < float(ratio) < 1.7
    plain = lora()
    unmatched = first_update(plain, attach(plain, initialization=initialization).handles) / RANK**0.5
    assert float((unmatched / reference)[-1]) < float(ratio)


def test_a_number_is_the_scale():
    for fields in ({}, {"parametrization": "svd"}):
        model = lora(rank_pattern={"linear": 3})
        controller = adalora.attach(model, target_rank=2, total_steps=STEPS, scale=2.5, **fields)
        assert {h.scale for h in controller.handles} == {2.5}
        assert model.peft_config["default"].lora_alpha == 10
        (pattern,) = model.peft_config["default"].alpha_pattern.values()
        assert pattern == 7.5


def test_nested_training_leaves_triplets_out():
    """Half of the steps of the final phase train a part; in evaluation all triplets count."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    torch.manual_seed(1)
    model = get_peft_model(Two(), LoraConfig(r=RANK, lora_alpha=8, target_modules=["first", "second"]))
    adalora.attach(model, parametrization="svd", target_rank=2, total_steps=STEPS, nested=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    x, differs = torch.randn(16, 5), 0
    for _ in range(STEPS):
        model.train()
        in_training = model(x)
        in_training.square().mean().backward()
        differs += not torch.allclose(model.eval()(x), in_training)
        optimizer.step()
        optimizer.zero_grad()
    assert 2 < differs < 13


def test_two_adapters_with_a_lambda_of_their_own(tmp_path):
    """The second one finds the layers prepared by the first; both leave as plain LoRA."""
    model = lora()
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    for adapter, rank in (("default", 2), ("other", 1)):
        adalora.attach(model, parametrization="svd", target_rank=rank, total_steps=STEPS, adapter=adapter)
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        train(model)
    wanted = {}
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        wanted[adapter] = answer(model)
    model.save_pretrained(tmp_path, selected_adapters=["default", "other"])
    torch.manual_seed(1)
    for adapter, folder in (("default", tmp_path), ("other", tmp_path / "other")):
        torch.manual_seed(1)
        loaded = PeftModel.from_pretrained(Everything(), folder)
        torch.testing.assert_close(answer(loaded), wanted[adapter], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted["default"], wanted["other"])


def test_states_without_p_or_with_a_lambda_are_taken_as_they_are(trained):
    """A part of a model's state, as sharded checkpoints have; and λ beside P, as an exact training state has."""
    model, _ = trained
    before = answer(model)
    layer = model.base_model.model.linear
    part = {key: value for key, value in model.state_dict().items() if ".linear.lora_B" not in key}
    model.load_state_dict(part, strict=False)
    torch.testing.assert_close(answer(model), before, rtol=0, atol=0)
    whole = {"lora_lambda.default": torch.zeros(RANK), "lora_B.default.weight": layer.lora_B["default"].weight.detach()}
    layer.load_state_dict(whole, strict=False)
    assert not layer.lora_lambda["default"].any()
