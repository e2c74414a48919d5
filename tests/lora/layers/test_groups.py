"""How the triplets of a grouped convolution lie in its weights: against PEFT's layers, loop by loop."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

import adalora
from adalora.errors import ConfigError
from adalora.lora.layers.groups import by_group, length_along, places_along, vectors_by_group
from adalora.lora.layers.triplets import find_triplets
from adalora.lora.measures.update_size import update_ratio
from adalora.lora.orthogonality.orthogonal import hand_over, orthogonality_error
from adalora.lora.orthogonality.reorthonormal import reorthonormalize

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")


@st.composite
def shapes(draw):
    """Groups, inputs and outputs of each, kernel, triplets."""
    dims = draw(st.integers(1, 3))
    kernel = tuple(draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims)))
    return draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 3)), kernel, draw(st.integers(1, 4))


def adapted(groups, ins, outs, kernel, rank, *, seed=0, **config):
    torch.manual_seed(seed)
    conv = CONVS[len(kernel)](groups * ins, groups * outs, kernel, groups=groups)
    given = {"r": rank * groups, "lora_alpha": 3, "target_modules": ["0"], "init_lora_weights": False, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(nn.Sequential(conv).double(), LoraConfig(**given))
    return model, find_triplets(model, "default")[0]


def literal(handle):
    """ΔW by loops over outputs and PEFT's channels: channel c feeds the outputs of group c // (r / groups)."""
    A = handle.layer.lora_A["default"].weight.detach()
    B = handle.layer.lora_B["default"].weight.detach()
    groups = handle.layer.lora_B["default"].groups
    each, outs = len(A) // groups, len(B) // groups
    delta = torch.zeros(len(B), A[0].numel(), dtype=A.dtype)
    for o in range(len(B)):
        for c in range(len(A)):
            if c // each == o // outs:
                delta[o] += B[o, c % each].flatten() * A[c].flatten()
    return delta * handle.layer.scaling["default"]


def dense(handle):
    parts = zip(handle.by_group(handle.left_or), handle.Q_gri)
    return handle.scale * torch.cat([P @ Q for P, Q in parts])


@settings(max_examples=60, deadline=None)
@given(shape=shapes(), data=st.data())
def test_views_are_pefts_convolution(shape, data):
    groups, ins, outs, kernel, rank = shape
    model, h = adapted(*shape)
    assert (h.groups, h.rank, h.live_rank, h.lora_rank(h.rank)) == (groups, rank, rank, groups * rank)
    torch.testing.assert_close(dense(h), literal(h))
    # The layer's own answer, and one triplet as all else sees it: a column of P with groups rows of Q.
    x = torch.randn(2, groups * ins, *(k + 1 for k in kernel), dtype=torch.float64)
    convolve = [nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d][len(kernel) - 1]
    base = h.layer.get_base_layer()
    with torch.no_grad():
        answer = convolve(x, literal(h).view(groups * outs, groups * ins, *kernel))
        torch.testing.assert_close(model(x) - base(x), answer)
    k = data.draw(st.integers(0, rank - 1))
    before, column, rows = literal(h), h.P_or[:, k].view(groups, outs).clone(), h.Q_ri[k].view(groups, -1)
    h.P_or[:, k] = 0  # the parameter's memory
    gone = h.scale * torch.cat([torch.outer(p, q) for p, q in zip(column, rows)])
    torch.testing.assert_close(before - literal(h), gone)


@settings(max_examples=60, deadline=None)
@given(shape=shapes(), data=st.data())
def test_places_and_lengths_are_those_of_the_views(shape, data):
    groups, _, _, _, rank = shape
    _, h = adapted(*shape)
    kept = sorted(data.draw(st.sets(st.integers(0, rank - 1))))
    for name, (parameter, dim) in h.factors.items():
        assert parameter.shape[dim] == length_along(dim, rank=rank, groups=groups) == h.length(rank, dim), name
        places = places_along(dim, kept, rank=rank, groups=groups)
        assert places == h.places(kept, dim) == sorted(places)
        cut = parameter.detach().index_select(dim, torch.tensor(places, dtype=torch.int64))
        vectors = vectors_by_group(parameter.detach(), dim, groups)
        assert vectors.shape[:2] == (groups, rank)
        assert torch.equal(vectors[:, kept], vectors_by_group(cut, dim, groups))
        assert vectors.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    assert torch.equal(h.Q_ri, by_group(h.Q_parameter.detach().flatten(1), groups).transpose(0, 1).reshape(rank, -1))
    assert h.rank_of(h.Q_parameter.shape) == rank
    assert h.parameters_per_triplet * rank == sum(p.numel() for p, _ in h.factors.values())


@settings(max_examples=40, deadline=None)
@given(shape=shapes())
def test_hand_over_keeps_the_update_and_gives_every_group_its_singular_vectors(shape):
    groups, rank = shape[0], shape[-1]
    _, h = adapted(*shape)
    before = literal(h)
    hand_over([h], None)
    torch.testing.assert_close(literal(h), before)
    if rank > h.d_in:  # more rows than Q has room for: left alone
        return
    for P, Q, delta in zip(h.P_gor, h.Q_gri, before.chunk(groups)):
        torch.testing.assert_close(Q @ Q.T, h.row_norm**2 * torch.eye(rank, dtype=torch.float64))
        values = torch.linalg.svdvals(delta)[:rank]
        lengths = h.scale * h.row_norm * P.norm(dim=0)
        torch.testing.assert_close(lengths[: len(values)], values, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("kind", ["lora", "svd"])
def test_reorthonormalised_group_by_group(kind):
    model, h = adapted(2, 3, 4, (2,), 3)
    controller = adalora.attach(model, total_rank=2, total_steps=9, parametrization=kind)
    (h,) = controller.handles
    with torch.no_grad():
        h.P_or.add_(torch.randn(h.P_or.shape, dtype=torch.float64) / 3)  # right angles are gone
        h.Q_parameter.add_(torch.randn(h.Q_parameter.shape, dtype=torch.float64) / 3)
    h.mask = torch.tensor([True, False, True])
    before = [P[:, h.mask] @ Q[h.mask] for P, Q in zip(h.by_group(h.left_or), h.Q_gri)]
    assert orthogonality_error([h]) > 1e-2
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    reorthonormalize(h, optimizer)
    assert orthogonality_error([h]) < 1e-6
    after = [P[:, h.mask] @ Q[h.mask] for P, Q in zip(h.by_group(h.left_or), h.Q_gri)]
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-5)


OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_first_moments_are_the_gradients_of_the_new_coordinates(name):
    """Of a hand-over; a factored second moment stays finite and positive."""
    model, h = adapted(2, 3, 4, (2,), 3)
    optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
    x = torch.randn(5, 6, 4, dtype=torch.float64)

    def gradients(of):
        of.zero_grad()
        of(x).square().mean().backward()
        return {n: p.grad.clone() for n, p in of.named_parameters() if p.grad is not None}

    gradients(model)
    optimizer.step()
    old = gradients(model)
    first = {"adamw": "exp_avg", "sgd": "momentum_buffer"}.get(name)
    for key, parameter in model.named_parameters():
        if first and key in old:
            optimizer.state[parameter][first].copy_(old[key])
    hand_over([h], optimizer)
    new = gradients(model)
    assert max(float((old[key] - new[key]).abs().max()) for key in old) > 1e-4
    for key, parameter in model.named_parameters():
        if first and key in new:
            torch.testing.assert_close(optimizer.state[parameter][first], new[key], atol=1e-6, rtol=1e-4)
    for state in optimizer.state.values():
        assert all(bool(t.isfinite().all()) for t in state.values() if isinstance(t, torch.Tensor))
    copy.deepcopy(optimizer).step()


def test_size_of_the_update_is_that_of_the_dense_weight():
    _, h = adapted(3, 2, 2, (2, 1), 2)
    base = h.layer.get_base_layer().weight
    assert update_ratio([h]) == pytest.approx(float(literal(h).norm() / base.norm()), rel=1e-5)


def test_budgets_are_in_loras_ranks_and_costs_in_what_a_triplet_holds():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1, groups=4), nn.Conv1d(8, 6, 3, padding=1))

    def make(**given):
        model = get_peft_model(copy.deepcopy(base), LoraConfig(r=12, target_modules=["0", "1"]))
        return adalora.attach(model, total_steps=20, **given)

    controller = make(target_rank=8)
    assert (controller.initial_budget, controller.target_budget) == (3 + 12, 2 + 8)
    assert controller.budget_unit == "triplets"
    assert [h.parameters_per_triplet for h in controller.handles] == [8 + 4 * 24, 6 + 24]
    controller = make(target_rank=4, budget_cost="parameters")
    assert controller.target_budget == (8 + 4 * 24) + 4 * (6 + 24)
    assert make(target_rank=4, budget_cost="parameters", parametrization="svd").initial_budget == 3 * 108 + 12 * 31
    assert make(total_rank=7).target_budget == 7
    assert make(adapter_bytes=2000).initial_budget == 4 * (3 * 104 + 12 * 30)
    modules = controller.history.of("start")[0]["modules"]
    assert [(m["groups"], m["rank"], m["d_in"]) for m in modules] == [(4, 3, 24), (1, 12, 24)]
    bounded = make(target_rank=6, min_rank={"0": 5}, max_rank={"1": 7})._budget
    assert (bounded.min_rank[0], bounded.max_rank[1]) == (2, 7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"target_rank": 1},
            "leaves no triplet in 1 modules; ranks of a convolution with groups=4 are mult",
        ),
        ({"target_rank": 9}, r"the target of 2 triplets is above the 1 .*LoraConfig\(r=12, …\)"),
        (
            {"target_rank": 4, "min_rank": 5, "max_rank": 7},
            r"0: its rank is a multiple of 4, .*min_rank=\{'0': 4\}",
        ),
        ({"target_rank": 4, "min_rank": {"0": 8}, "max_rank": {"0": 5}}, r"0: max_rank=5 is below min_rank=8"),
    ],
)
def test_budgets_that_no_multiple_of_the_groups_fits(given, message):
    model, _ = adapted(4, 2, 2, (3,), 1)
    with pytest.raises(ConfigError, match=message):
        adalora.attach(model, total_steps=20, **given)
