"""Compaction: a model goes on exactly as if it had always been small."""

import copy

import pytest
import torch

import adalora
from adalora.errors import CompactionError
from adalora.lora.layers.patterns import write_patterns
from adalora.lora.layers.triplets import find_triplets
from adalora.lora.ranks.compaction import compact
from helpers.optimizers import OPTIMIZERS
from helpers.three_layers import RANK, lora, run

KEPT = {"0": [0, 2, 5], "2": [], "4": [1, 3]}


def prune(handles):
    """Mask all but `KEPT`."""
    for h in handles:
        h.mask = torch.zeros(RANK, dtype=torch.bool)
        h.mask[KEPT[h.name]] = True
        with torch.no_grad():
            h.P_or[:, ~h.mask] = 0


def sliced(optimizer, parameter, index, dim):
    """State of a small parameter by the optimizer's own definition of its moments, written down apart from ours."""
    state, ndim = optimizer.state[parameter], parameter.dim()
    new = {}
    for key, value in state.items():
        if key.startswith("absmax"):
            continue  # follows from the values
        if not isinstance(value, torch.Tensor) or value.dim() == 0 or key.startswith("qmap"):
            new[key] = copy.deepcopy(value)
        elif key in ("row_var", "col_var", "exp_avg_sq_row", "exp_avg_sq_col"):
            row, column = (state[k] for k in (("row_var", "col_var") if "var" in key else FACTORED))
            averaged = key in ("col_var", "exp_avg_sq_col")  # over the rows
            if dim == ndim - 1:
                new[key] = column[..., index].clone() if averaged else row.clone()
            elif averaged:
                new[key] = column * (row[index].mean() / row.mean())
            else:
                new[key] = row[index].clone()
        elif "qmap1" in state:
            functional = pytest.importorskip("bitsandbytes").functional
            number = key[-1]
            code = state[f"qmap{number}"]
            full = functional.dequantize_blockwise(value, absmax=state[f"absmax{number}"], code=code, blocksize=256)
            small = full.index_select(dim, index).contiguous()
            if small.numel() < optimizer.args.min_8bit_size:
                new[key] = small
            else:
                new[key], quantised = functional.quantize_blockwise(small, code=code, blocksize=256)
                new[f"absmax{number}"] = quantised.absmax
        else:
            new[key] = value.index_select(dim, index).clone()
    if "qmap1" in new and new["state1"].dtype == torch.float32:
        new = {key: value for key, value in new.items() if not key.startswith(("qmap", "absmax"))}
    return new


FACTORED = ("exp_avg_sq_row", "exp_avg_sq_col")


def small_twin(handles, optimizer, make):
    """A model built with the final ranks by stock PEFT, with copies of the kept weights and moments."""
    twin = lora(
        r=3,
        lora_alpha=6,
        rank_pattern={"4": 2},
        alpha_pattern={"4": 4},
        target_modules=["0", "4"],
    )
    twin_optimizer = make([p for p in twin.parameters() if p.requires_grad])
    for group, its in zip(twin_optimizer.param_groups, optimizer.param_groups):
        group |= {key: value for key, value in its.items() if key != "params"}  # schedule-free counts there
    if hasattr(twin_optimizer, "check_overrides"):  # bitsandbytes makes its tables at the first step
        twin_optimizer.initialized = True
    of_name = {h.name: h for h in find_triplets(twin, "default")}
    for h in handles:
        if not KEPT[h.name]:
            continue
        pairs = [(h.P_parameter, of_name[h.name].P_parameter, 1), (h.Q_parameter, of_name[h.name].Q_parameter, 0)]
        for old, new, dim in pairs:
            index = torch.tensor(KEPT[h.name])
            new.data.copy_(old.data.index_select(dim, index))
            if old in optimizer.state:
                twin_optimizer.state[new] = sliced(optimizer, old, index, dim)
    return twin, twin_optimizer


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_training_goes_on_bit_exactly_like_a_small_model(name):
    """Losses, weights and moments after the cut equal those of a model that never was large."""
    make = OPTIMIZERS[name]
    model = lora()
    handles = find_triplets(model, "default")
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    run(model, optimizer, steps=5, seed=0)
    prune(handles)
    twin, twin_optimizer = small_twin(handles, optimizer, make)
    compact(handles, optimizer)
    assert [h.rank for h in handles] == [3, 0, 2]
    assert run(model, optimizer, steps=6, seed=1) == run(twin, twin_optimizer, steps=6, seed=1)
    of_name = {h.name: h for h in find_triplets(twin, "default")}
    for h in handles:
        if h.removed:
            continue
        for mine, other in (
            (h.P_parameter, of_name[h.name].P_parameter),
            (h.Q_parameter, of_name[h.name].Q_parameter),
        ):
            assert torch.equal(mine, other)
            for key, value in twin_optimizer.state[other].items():
                if value is not None:
                    assert torch.equal(torch.as_tensor(optimizer.state[mine][key]), torch.as_tensor(value)), key


def test_identity_and_gradients_survive():
    """A parameter stays the same object; a gradient not yet used is cut with it."""
    model = lora()
    handles = find_triplets(model, "default")
    before = {h.name: h.P_parameter for h in handles}
    model(torch.randn(3, 8)).sum().backward()
    gradient = handles[0].P_parameter.grad.clone()
    prune(handles)
    compact(handles, None)
    assert handles[0].P_parameter is before["0"]
    assert torch.equal(handles[0].P_parameter.grad, gradient[:, KEPT["0"]])


def test_modules_without_triplets_hold_nothing():
    """No adapter parameter in the layer, none in the optimizer, and the pruned module still computes its base."""
    model = lora()
    handles = find_triplets(model, "default")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run(model, optimizer, steps=3, seed=0)
    prune(handles)
    gone = {id(handles[1].P_parameter), id(handles[1].Q_parameter)}
    compact(handles, optimizer)
    write_patterns(model, handles)
    layer = handles[1].layer
    assert handles[1].removed
    assert [n for n, _ in layer.named_parameters() if "lora" in n] == []
    assert not [k for k in model.state_dict() if ".2." in k and "lora" in k]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert not gone & {id(p) for p in held}
    assert not gone & {id(p) for p in optimizer.state}
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    x = torch.randn(5, 12)
    assert torch.equal(layer(x), layer.get_base_layer()(x))
    restored = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(restored)
    assert len(run(model, optimizer, steps=2, seed=1)) == 2


class Odd(torch.optim.SGD):
    """Keeps a history of gradient norms, which has no triplets."""

    def step(self, closure=None):
        """As SGD."""
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["norms"] = torch.ones(7)


def test_foreign_optimizer_state_is_refused_and_nothing_changes():
    """State of a shape that nobody knows; the message has the cure."""
    model = lora()
    handles = find_triplets(model, "default")
    optimizer = Odd([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run(model, optimizer, steps=3, seed=0)
    prune(handles)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CompactionError, match=r"Odd keeps 'norms' of shape .* compact=False"):
        compact(handles, optimizer)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert len(run(model, optimizer, steps=2, seed=1)) == 2


class Sealed(torch.Tensor):
    """A state whose values nobody may select, as some quantised types are."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if "index_select" in getattr(func, "__name__", ""):
            raise NotImplementedError("no selection of packed values")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_state_behind_a_tensor_type_that_cannot_be_cut_is_refused():
    model = lora()
    handles = find_triplets(model, "default")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run(model, optimizer, steps=3, seed=0)
    prune(handles)
    state = optimizer.state[handles[0].P_parameter]
    state["exp_avg"] = state["exp_avg"].as_subclass(Sealed)
    with pytest.raises(CompactionError, match=r"AdamW keeps 'exp_avg' of shape .* compact=False"):
        compact(handles, optimizer)


def test_quantised_blocks_of_another_size_are_refused():
    model = lora()
    handles = find_triplets(model, "default")
    optimizer = OPTIMIZERS["8bit_adamw"]([p for p in model.parameters() if p.requires_grad])
    run(model, optimizer, steps=2, seed=0)
    prune(handles)
    state = optimizer.state[handles[0].P_parameter]
    state["absmax1"] = state["absmax1"].repeat(2)
    with pytest.raises(CompactionError, match="AdamW8bit quantises in blocks of another size than"):
        compact(handles, optimizer)


def test_foreign_optimizer_trains_masked():
    """With compact=False the pruned triplets stay in memory, and do not grow again at the target budget."""
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=30, compact=False)
    optimizer = torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run(model, optimizer, steps=30, seed=0)
    controller.finalize()
    assert controller.live == controller.target_budget == 6
    assert sum(h.rank for h in controller.handles) == 3 * RANK
    for h in controller.handles:
        assert not h.P_or[:, ~h.mask].any()


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_whole_run_shrinks_under_every_optimizer(name):
    """Hand-over, masks, compaction: the target is reached in memory and nothing grows back."""
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=30)
    optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
    losses = run(model, optimizer, steps=30, seed=0)
    controller.finalize()
    assert sum(h.rank for h in controller.handles) == controller.live == 6
    assert all(torch.isfinite(torch.tensor(losses)))
    (record,) = controller.history.of("compaction")
    assert record["parameters_after"] < record["parameters_before"]
    assert record["bytes_after"] == 4 * record["parameters_after"]
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert record["optimizer_bytes_after"] == sum(v.numel() * v.element_size() for v in state)
    if name != "sgd":
        assert record["optimizer_bytes_after"] < record["optimizer_bytes_before"]
    assert record["parameters_after"] == sum(p.numel() for n, p in model.named_parameters() if "lora" in n)


@pytest.mark.parametrize("name", ["schedule_free_adamw", "schedule_free_sgd"])
def test_masks_reach_schedule_frees_second_copy(name):
    """In evaluation mode, which goes back to it, a pruned triplet is zero too."""
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=40, compact=False)
    optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
    for _ in range(40):
        run(model, optimizer, steps=1, seed=0)
        if controller.allocations:
            optimizer.eval()
            if controller.step > controller.schedule.decrease_end:
                assert all(not h.P_or[:, ~h.mask].any() for h in controller.handles)
            optimizer.train()
    assert controller.live == 6


def test_stages_shrink_the_model_step_by_step():
    """With masks alone, and no revival, the same triplets would be kept: the same masks, losses close to rounding."""
    settings = {"target_rank": 2, "total_steps": 60, "allocation_interval": 2, "revival": False, "orthogonality": "off"}

    def train(**more):
        model = lora()
        controller = adalora.attach(model, **settings, **more)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        sizes, losses = [], []
        for seed in range(60):
            losses += run(model, optimizer, steps=1, seed=seed)
            sizes.append(sum(h.rank for h in controller.handles))
        return controller, sizes, losses

    staged, sizes, losses = train(compact_at=(0.25, 0.5))
    once, sizes_once, losses_once = train()
    assert len(set(sizes)) == 4
    assert len(set(sizes_once)) == 2
    assert sizes == sorted(sizes, reverse=True)
    assert len(staged.history.of("compaction")) == 3
    assert [r["ranks"] for r in staged.history.of("allocation")] == [r["ranks"] for r in once.history.of("allocation")]
    assert torch.allclose(torch.tensor(losses), torch.tensor(losses_once), atol=1e-4)


@pytest.mark.parametrize("wrong", [(), (0.0,), (1.5,), (0.5, -1)])
def test_stages_are_fractions(wrong):
    with pytest.raises(adalora.AdaLoraError, match="compact_at"):
        adalora.AdaLoraConfig(compact_at=wrong)
    with pytest.raises(adalora.AdaLoraError, match="compact_at has no effect with compact=False"):
        adalora.AdaLoraConfig(compact_at=(0.5,), compact=False)


def test_no_backward_below_the_lowest_live_layer():
    """The output of layers that have left the adapter asks for no gradient."""
    model = lora()
    handles = find_triplets(model, "default")
    for h, rank in zip(handles, (0, 0, 3)):
        h.mask = torch.arange(RANK) < rank
    asked = []
    for h in handles:
        h.layer.register_forward_hook(lambda module, inputs, output: asked.append(output.requires_grad))
    model(torch.randn(3, 8))
    assert asked == [True, True, True]
    asked.clear()
    compact(handles, None)
    model(torch.randn(3, 8)).sum().backward()
    assert asked == [False, False, True]
