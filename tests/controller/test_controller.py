"""The controller: what it counts, what it refuses, what it warns of, when it goes away."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import adalora
from adalora.errors import AdaLoraWarning, AttachError, ConfigError

RANK = 6


class Net(nn.Module):
    """Two layers in a row and one that is used only on demand."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.spare = nn.Linear(8, 12), nn.Linear(12, 4), nn.Linear(12, 4)
        self.use_spare = False

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.spare(h) if self.use_spare else self.second(h)


def lora(targets=("first", "second"), **settings):
    """A LoRA model of `RANK`."""
    torch.manual_seed(1)
    return get_peft_model(Net(), LoraConfig(r=RANK, lora_alpha=12, target_modules=list(targets)), **settings)


def adamw(model):
    """AdamW on what is trainable."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model, optimizer, *, steps, seed=0):
    """Train on random data."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = torch.randn(16, 8, generator=generator), torch.randn(16, 4, generator=generator)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def in_memory(controller):
    """Triplets that the layers hold, pruned ones included."""
    return sum(h.rank for h in controller.handles)


def test_an_ordinary_run_is_silent():
    """The counts of a run of 30 steps; pytest makes any warning an error."""
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=30)
    optimizer = adamw(model)
    assert (controller.initial_budget, controller.target_budget) == (12, 4)
    assert controller.phase == "warmup"
    assert controller.optimizer is None
    train(model, optimizer, steps=30)
    controller.finalize()
    controller.finalize()
    assert controller.step == 30
    assert controller.optimizer is optimizer
    assert controller.live == in_memory(controller) == sum(controller.ranks.values()) == 4
    assert len(controller.history.of("finish")) == 1
    train(model, optimizer, steps=2)
    assert controller.step == 30  # a finished controller leaves later training alone


def test_budget_is_kept_at_every_step():
    """Live triplets never exceed what the last allocation allowed, and only fall."""
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=50, allocation_interval=3)
    optimizer = adamw(model)
    live = []
    for _ in range(50):
        train(model, optimizer, steps=1)
        live.append(controller.live)
    assert live == sorted(live, reverse=True)
    assert live[0] == 12
    assert live[controller.schedule.decrease_end] == live[-1] == 4
    for record in controller.history.of("allocation"):
        assert record["budget"] == record["live"] == sum(record["ranks"]) == controller.schedule.budget(record["step"])


@pytest.mark.parametrize("revival", [True, False])
def test_masked_triplets_stay_at_zero_in_the_final_phase(revival):
    """Without compaction the optimizer's momentum must not bring them back."""
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=30, compact=False, revival=revival)
    optimizer = adamw(model)
    train(model, optimizer, steps=17)
    for _ in range(13):
        train(model, optimizer, steps=1)
        assert in_memory(controller) == 12
        assert sum(int(h.P_or.any(dim=0).sum()) for h in controller.handles) == 4


def test_training_unseen_warns():
    """Weights changed, but by no torch optimizer."""
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=10)
    model(torch.randn(4, 8)).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.1)
    with pytest.warns(AdaLoraWarning, match="saw no optimizer step"):
        controller.finalize()


def test_saving_what_was_trained_unseen_warns_once(tmp_path):
    model = lora()
    adalora.attach(model, target_rank=2, total_steps=10)
    with torch.no_grad():
        model.base_model.model.first.lora_B["default"].weight.add_(0.1)
    with pytest.warns(AdaLoraWarning, match="saw no optimizer step"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)  # an error if it warned again


def test_loading_weights_is_not_training():
    other = lora()
    with torch.no_grad():
        other.base_model.model.first.lora_B["default"].weight.add_(0.1)
    model = lora()
    adalora.attach(model, target_rank=2, total_steps=10)
    model.load_state_dict(other.state_dict())
    model.state_dict()


def test_the_end_of_the_process_tells_that_nothing_was_allocated():
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=1000)
    train(model, adamw(model), steps=5)
    with pytest.warns(AdaLoraWarning, match=r"attach\(model, total_steps=5\)"):
        controller.warn_if_idle(over=True)


def test_never_trained_is_silent():
    """A model that was only looked at needs no warning."""
    controller = adalora.attach(lora(), target_rank=2, total_steps=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        controller.warn_if_idle()


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_training_shorter_than_told_warns_and_still_ends_at_the_target(steps):
    """The message has the line that would have been right."""
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=100)
    train(model, adamw(model), steps=steps)
    with pytest.warns(AdaLoraWarning, match=rf"after {steps} of 100 steps.*attach\(model, total_steps={steps}\)"):
        controller.finalize()
    assert controller.live == in_memory(controller) == 4


def test_training_longer_than_told_stays_at_the_target():
    """Steps beyond the schedule belong to the final phase."""
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=20)
    train(model, adamw(model), steps=30)
    controller.finalize()
    assert controller.step == 30
    assert controller.live == 4


def test_target_equal_to_initial_rank_prunes_nothing():
    """A valid setting: the method without a cut, and without a change of scale."""
    model = lora()
    controller = adalora.attach(model, target_rank=RANK, total_steps=20)
    train(model, adamw(model), steps=20)
    controller.finalize()
    assert controller.ranks == {"first": RANK, "second": RANK}
    assert controller.handles[0].scale == 2.0
    assert not controller.history.of("compaction")


def test_target_above_initial_rank_is_refused_with_the_line_to_write():
    """The model stays as it was, so that a second attach works."""
    model = lora()
    with pytest.raises(ConfigError, match=r"20 triplets is above the 12 .*LoraConfig\(r=15, …\)"):
        adalora.attach(model, target_rank=10, total_steps=20)
    assert adalora.controllers(model) == {}
    adalora.attach(model, target_rank=2, total_steps=20)


@pytest.mark.parametrize("settings", [{"total_steps": 0}, {"total_steps": 10, "warmup": 8, "final": 8}])
def test_a_refused_attach_leaves_the_model_as_it_was(settings):
    """Scale and forward pass are PEFT's still, so a corrected call gives the same run as a first one."""
    model = lora()
    with pytest.raises(ConfigError):
        adalora.attach(model, target_rank=2, scale="matched", **settings)
    assert adalora.controllers(model) == {}
    controller = adalora.attach(model, target_rank=2, scale="matched", total_steps=20)
    assert controller.handles[0].scale == 12 / RANK * 3 / 2  # α/r over √(r₀/r), rounded
    assert model.peft_config["default"].lora_alpha == 18


def test_attaching_twice_is_refused():
    """Two controllers of one adapter would cut it twice."""
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=20)
    with pytest.raises(AttachError, match="'default' of this model is attached already"):
        adalora.attach(model, target_rank=2, total_steps=20)
    assert adalora.controllers(model) == {"default": controller}


def test_total_steps_must_be_known_by_the_first_step():
    """The error has the argument to add."""
    model = lora()
    adalora.attach(model, target_rank=2)
    with pytest.raises(ConfigError, match="total_steps"):
        train(model, adamw(model), steps=1)


@pytest.mark.filterwarnings("ignore:Adapter name:UserWarning")
def test_two_adapters_of_one_model_are_separate():
    """Names that are part of other keys ("a", "lora") included."""
    model = lora(adapter_name="a")
    model.add_adapter("lora", LoraConfig(r=4, lora_alpha=4, target_modules=["first", "second"]))
    first = adalora.attach(model, adapter="a", target_rank=2, total_steps=20)
    second = adalora.attach(model, adapter="lora", target_rank=1, total_steps=20)
    assert set(adalora.controllers(model)) == {"a", "lora"}
    model.set_adapter("a")
    train(model, adamw(model), steps=20)
    assert (first.step, second.step) == (20, 0)
    assert (first.live, second.live) == (4, 8)
    model.set_adapter("lora")
    train(model, adamw(model), steps=20)
    assert (first.step, second.step) == (20, 20)
    assert (in_memory(first), in_memory(second)) == (4, 2)
    model.set_adapter("a")
    assert torch.isfinite(model(torch.randn(2, 8))).all()


def test_only_the_optimizer_that_owns_the_triplets_counts():
    """Others, of another model or of other parameters, are not seen."""
    model, other = lora(), nn.Linear(3, 3)
    controller = adalora.attach(model, target_rank=2, total_steps=20)
    mine, foreign = adamw(model), torch.optim.SGD(other.parameters(), lr=0.1)
    rest = torch.optim.SGD(model.base_model.model.spare.parameters(), lr=0.1)
    for _ in range(3):
        other(torch.randn(2, 3)).sum().backward()
        foreign.step()
        rest.step()
    assert controller.step == 0
    assert controller.optimizer is None
    train(model, mine, steps=2)
    foreign.step()
    assert controller.step == 2
    assert controller.optimizer is mine


def test_a_module_without_gradient_is_left_out():
    """It scores 0 and is pruned first; the others' scores do not suffer."""
    model = lora(("first", "second", "spare"))
    controller = adalora.attach(model, target_rank=2, total_steps=40)
    train(model, adamw(model), steps=40)
    controller.finalize()
    assert controller.ranks["spare"] == 0
    assert controller.live == 6
    last = controller.history.last("allocation")
    assert last["skipped_steps"] == 0
    assert last["module_scores"][2] == 0
    assert min(last["module_scores"][:2]) > 0


def test_a_module_used_only_late_gets_scores():
    """No gradient at first is not held against it."""
    model = lora(("first", "second", "spare"))
    controller = adalora.attach(model, target_rank=2, total_steps=60)
    optimizer = adamw(model)
    train(model, optimizer, steps=12)
    model.base_model.model.use_spare = True
    train(model, optimizer, steps=48)
    controller.finalize()
    assert controller.ranks["spare"] > 0


def test_an_optimizer_that_calls_its_parents_step_counts_once():
    """Torch runs its hooks for both; a step that failed in between does not matter."""

    class Derived(torch.optim.AdamW):
        def step(self, closure=None):
            super().step(closure)

    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=30)
    adamw(model)  # torch hooks a class when it is first made
    optimizer = Derived([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train(model, optimizer, steps=3)
    assert controller.step == 3

    def failing():
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        optimizer.step(failing)
    assert controller.step == 3
    train(model, optimizer, steps=3)
    assert controller.step == 6


class Careful(torch.optim.SGD):
    """Leaves a step out where a gradient is not finite, as mixed precision does."""

    def step(self, closure=None):
        """One step, or none."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if all(bool(g.isfinite().all()) for g in gradients):
            super().step(closure)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_infinite_gradients_are_skipped_and_counted(bad):
    """One such step would spoil the averages for ever."""
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=30)
    optimizer = Careful([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train(model, optimizer, steps=8)
    model(torch.randn(4, 8)).sum().backward()
    controller.handles[0].P_parameter.grad[0, 0] = bad
    optimizer.step()
    optimizer.zero_grad()
    assert controller.step == 9
    train(model, optimizer, steps=21)
    controller.finalize()
    last = controller.history.last("allocation")
    assert last["skipped_steps"] == 1
    assert all(0 < score < float("inf") for score in last["module_scores"])
    assert controller.live == 4


def test_a_deep_copy_is_a_plain_model_of_its_own():
    """Copies made during and after the decrease compute the same, train, and are not the original's business."""
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=30)
    optimizer = adamw(model)
    x = torch.randn(4, 8)
    for steps in (10, 20):
        train(model, optimizer, steps=steps)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), model(x))
        assert adalora.controllers(twin) == {}
        before, at = model(x).detach(), controller.step
        train(twin, adamw(twin), steps=2)
        assert controller.step == at
        assert torch.equal(model(x), before)
        assert not torch.equal(twin(x), before)
    adalora.attach(copy.deepcopy(model), target_rank=1, total_steps=5)


@pytest.mark.parametrize("steps", [0, 10, 30])
def test_nothing_is_kept_when_the_model_is_dropped(steps):
    """Neither model nor controller nor optimizer outlives the user's last reference."""
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=30)
    optimizer = adamw(model)
    train(model, optimizer, steps=steps)
    watched = [weakref.ref(o) for o in (model, controller, optimizer, controller.handles[0].P_parameter)]
    del model, controller, optimizer
    gc.collect()
    assert [ref() for ref in watched] == [None] * 4


def test_a_controller_without_its_model_says_so():
    """Keeping the controller does not keep the model."""
    controller = adalora.attach(lora(), target_rank=2, total_steps=30)
    gc.collect()
    with pytest.raises(AttachError, match="no longer exists"):
        _ = controller.model


def test_an_optimizer_whose_state_cannot_be_cut_keeps_triplets_masked():
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=20)
    optimizer = adamw(model)
    optimizer.register_step_post_hook(lambda o, *_: [o.state[p].update(norms=torch.ones(7)) for p in list(o.state)])
    with pytest.warns(AdaLoraWarning, match="masked"):
        train(model, optimizer, steps=20)
    controller.finalize()
    assert controller.live == controller.target_budget
    assert in_memory(controller) == controller.initial_budget


def test_a_diverged_run_ends_with_a_record_and_no_crash():
    model = lora()
    controller = adalora.attach(model, target_rank=2, total_steps=20)
    optimizer = adamw(model)
    train(model, optimizer, steps=1)
    with torch.no_grad():
        controller.handles[0].P_parameter.fill_(float("nan"))
    with pytest.warns(AdaLoraWarning, match="5 of 5 steps had no finite gradient"):
        train(model, optimizer, steps=19)
    controller.finalize()
    finish = controller.history.last("finish")
    assert finish is not None
    assert set(finish["singular_values"][0]) <= {None}
