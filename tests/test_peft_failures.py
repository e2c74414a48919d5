"""What users of PEFT 0.21.2's AdaLoRA run into: each is a test that passes here and, by the same steps, fails there.

The second half of each pair is a strict expected failure: the day PEFT mends one, the test says so.
"""

import copy
import inspect
import warnings

import pytest
import torch
from peft import AdaLoraConfig as PeftAdaLoraConfig
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import adalora
from helpers.tiny_bert import Tokens, bert

STEPS = 30


class Net(nn.Module):
    """Two layers in a row and one on demand."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.spare = nn.Linear(8, 12), nn.Linear(12, 4), nn.Linear(12, 4)
        self.use_spare = False
        self.returns = "tensor"

    def forward(self, x):
        h = torch.tanh(self.first(x))
        y = self.spare(h) if self.use_spare else self.second(h)
        return {"tensor": y, "tuple": (y,), "dict": {"y": y}}[self.returns]


class Ours:
    """LoRA and the one line."""

    def __init__(self, base=None, *, targets=("first", "second"), steps=STEPS, r=6, target=2, name="default", **more):
        torch.manual_seed(1)
        config = LoraConfig(r=r, lora_alpha=12, target_modules=list(targets))
        self.model = get_peft_model(base or Net(), config, adapter_name=name)
        self.controller = adalora.attach(self.model, target_rank=target, total_steps=steps, **more)

    def after(self, step):
        """Nothing to do."""

    def live(self):
        return self.controller.live

    def in_memory(self):
        return sum(p.numel() for n, p in self.model.named_parameters() if "lora_" in n)


class Peft:
    """PEFT's AdaLoRA, used as its documentation says."""

    def __init__(
        self, base=None, *, targets=("first", "second"), steps=STEPS, r=6, target=2, name="default", call=True, **more
    ):
        torch.manual_seed(1)
        config = PeftAdaLoraConfig(
            init_r=r, target_r=target, lora_alpha=12, target_modules=list(targets), total_step=steps,
            tinit=max(1, steps // 8), tfinal=steps // 2, deltaT=1,
        )  # fmt: skip
        self.call = call
        self.model = get_peft_model(base or Net(), config, adapter_name=name)

    def after(self, step):
        if self.call:
            self.model.base_model.update_and_allocate(step)

    def live(self):
        return sum(int((p != 0).sum()) for n, p in self.model.named_parameters() if ".lora_E." in n)

    def in_memory(self):
        return sum(p.numel() for n, p in self.model.named_parameters() if "lora_" in n and "ranknum" not in n)


def both(error):
    """Ours passes; PEFT's fails in this way and no other."""
    expected = pytest.mark.xfail(strict=True, raises=error, reason="PEFT 0.21.2")
    return pytest.mark.parametrize("kind", [Ours, pytest.param(Peft, marks=expected)])


BOTH = both(AssertionError)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning")


def adamw(model, **settings):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **settings)


def output(model, x):
    y = model(x)
    return y["y"] if isinstance(y, dict) else y[0] if isinstance(y, tuple) else y


def train(run, *, steps=STEPS, start=0, optimizer=None, change=None):
    """The task's loss alone; returns the losses that the user sees."""
    optimizer = optimizer or adamw(run.model)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(start, start + steps):
        x, y = torch.randn(16, 8, generator=generator), torch.randn(16, 4, generator=generator)
        loss = (output(run.model, x) - y).square().mean()
        loss.backward()
        if change is not None:
            change(step)
        optimizer.step()
        run.after(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@BOTH
def test_01_an_ordinary_loop_prunes_without_a_call_of_its_own(kind):
    """PEFT: nothing is pruned, and nothing is said, unless `update_and_allocate` is called by hand."""
    run = kind() if kind is Ours else kind(call=False)
    train(run)
    assert run.live() <= 4


@both(ValueError)
def test_02_the_number_of_steps_may_come_from_the_trainer(kind):
    """PEFT: `total_step` is asked for when the config is made."""
    if kind is Ours:
        model = get_peft_model(Net(), LoraConfig(r=6, target_modules=["first"]))
        adalora.attach(model, target_rank=2)
    else:
        PeftAdaLoraConfig(init_r=6, target_r=2, target_modules=["first"])


@BOTH
def test_03_a_step_that_is_jumped_over_does_not_matter(kind):
    """PEFT: after a resume `total_step - tfinal` may be missed, and the target with it."""
    run = kind()
    optimizer = adamw(run.model)
    train(run, steps=10, optimizer=optimizer)
    train(run, steps=STEPS - 10, start=25, optimizer=optimizer)  # the loop's own numbers: here steps are counted
    assert run.live() <= 4


@both(RuntimeError)
def test_04_initial_rank_may_equal_the_target(kind):
    """PEFT: `kthvalue` of nothing."""
    train(kind(r=4, target=4))


@BOTH
def test_05_tied_scores_keep_the_budget(kind):
    """PEFT: of equal scores none is kept."""
    run = kind()
    for parameter in run.model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(torch.zeros_like)
    train(run, optimizer=torch.optim.SGD([p for p in run.model.parameters() if p.requires_grad], lr=0.0))
    if kind is Ours:
        assert run.live() == 4
    else:
        kept = sum(sum(mask) for mask in run.model.peft_config["default"].rank_pattern.values())
        assert kept == 4


class Allocate(TrainerCallback):
    """The right place for PEFT's call."""

    def on_optimizer_step(self, args, state, control, **kwargs):
        kwargs["model"].base_model.update_and_allocate(state.global_step)


def trainer_of(kind, folder, **settings):
    torch.manual_seed(2)
    common = {"lora_alpha": 12, "task_type": "SEQ_CLS", "target_modules": ["query", "value", "dense"]}
    if kind is Ours:
        model = get_peft_model(bert(layers=1), LoraConfig(r=6, **common))
        callback = adalora.AdaLoraCallback(target_rank=2, allocation_interval=1)
    else:
        config = PeftAdaLoraConfig(init_r=6, target_r=2, total_step=16, tinit=2, tfinal=6, deltaT=1, **common)
        model, callback = get_peft_model(bert(layers=1), config), Allocate()
    arguments = {
        "max_steps": 16, "save_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "logging_steps": 4, **settings,
    }  # fmt: skip
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=Tokens(64),
        eval_dataset=Tokens(16),
        callbacks=[callback],
    )


@both(RuntimeError)
def test_06_the_trainer_resumes_after_the_first_mask(kind, tmp_path):
    """PEFT: size mismatch."""
    trainer_of(kind, tmp_path).train()
    trainer_of(kind, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))


@both(RuntimeError)
def test_07_the_best_model_is_loaded_at_the_end(kind, tmp_path):
    """PEFT: size mismatch."""
    trainer = trainer_of(
        kind, tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=4,
        metric_for_best_model="at_8", greater_is_better=True,
    )  # fmt: skip
    trainer.compute_metrics = lambda prediction: {"at_8": float(trainer.state.global_step == 8)}
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-8")


@BOTH
def test_08_averages_survive_a_resume(kind, tmp_path):
    """PEFT: they start anew at zero, so the ranks of a resumed run are others."""
    run = kind()
    optimizer = adamw(run.model)
    train(run, steps=8, optimizer=optimizer)
    if kind is Ours:
        state = run.controller.state_dict()
        again = kind()
        again.controller.load_state_dict(state)
        found = again.controller._scorer.state_dict()
        assert any(bool(v.any()) for k, v in found.items() if k.endswith("sensitivity"))
        assert all(torch.equal(v, state["tensors"][f"averages.{k}"]) for k, v in found.items())
    else:
        run.model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
        assert again.base_model.rankallocator.exp_avg_ipt


@both(RuntimeError)
def test_09_a_loaded_adapter_trains_on(kind, tmp_path):
    """PEFT: the rank pattern is applied twice, or the allocator meets shapes that it does not know."""
    run = kind()
    train(run)
    run.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    if kind is Ours:
        adalora.attach(loaded, target_rank=1, total_steps=STEPS)
    run.model = loaded
    train(run)


@BOTH
def test_10_evaluation_reports_the_tasks_loss(kind, tmp_path):
    """PEFT: the regulariser is part of `loss`, so the choice of the best checkpoint is wrong."""
    trainer = trainer_of(kind, tmp_path, save_strategy="no")
    trainer.train()
    rows = Tokens(16)
    model = trainer.model.eval()
    with torch.no_grad():
        logits = model(input_ids=rows.inputs).logits
    wanted = nn.functional.cross_entropy(logits, (rows.inputs[:, 0] > 50).long())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(wanted), abs=1e-5)


class WithLoss(Net):
    """Returns an object with a loss, which is where PEFT adds its regulariser."""

    computed = "object"

    def forward(self, x):
        y = super().forward(x)

        class Output:
            loss = None if self.computed == "no loss" else (y * 0).sum()
            logits = y

        return y if self.returns == "plain" else Output()


def regulariser_move(kind, losses, *, base=None):
    """How far Q moves by the regulariser alone in one optimizer step.

    Args:
        kind: `Ours` or `Peft`.
        losses: Takes the model and gives the losses that are differentiated one after the other.
        base: The network under the adapter.
    """
    base = base or WithLoss()
    run = kind(base, warmup=0, handover=False) if kind is Ours else kind(base)
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if ".lora_A." in name:
                parameter.fill_(0.3)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters() if ".lora_A." in n}
    optimizer = torch.optim.SGD([p for p in run.model.parameters() if p.requires_grad], lr=1e-2)
    for loss in losses(run.model.base_model):  # as PEFT's classes for tasks call it
        loss.backward()
    optimizer.step()
    after = dict(run.model.named_parameters())
    return sum(float((after[n] - value).detach().norm()) for n, value in before.items() if n in after)


@BOTH
@pytest.mark.parametrize("computed", ["custom", "no loss"])
def test_11_the_regulariser_does_not_hang_on_a_custom_loss(kind, computed):
    """PEFT: it is added to `outputs.loss`; whoever computes a loss of their own has none, silently.

    "no loss" is the Trainer's label smoothing, which keeps the labels from the model.
    """

    def of_the_model(model):
        yield model(torch.randn(4, 8)).loss

    def of_the_user(model):
        yield (model(torch.randn(4, 8)).logits * 0).sum()

    base = WithLoss()
    base.computed = computed
    wanted = regulariser_move(kind, of_the_model)
    assert wanted > 0
    assert regulariser_move(kind, of_the_user, base=base) == pytest.approx(wanted, rel=1e-4)


@BOTH
def test_12_tuples_and_dictionaries_are_regularised_too(kind):
    """PEFT: only an object with `.loss` is."""

    class Plain(WithLoss):
        def forward(self, x):
            return {"loss": super().forward(x).loss}

    def losses(model):
        yield model(torch.randn(4, 8))["loss"]

    assert regulariser_move(kind, losses, base=Plain()) > 0


@BOTH
def test_13_the_regulariser_does_not_scale_with_accumulation(kind):
    """PEFT: `num_items_in_batch` losses are summed over micro-batches, and with them one regulariser each."""

    def move(micro):
        def losses(model):
            for _ in range(micro):
                yield model(torch.randn(4, 8)).loss  # divided by all items already

        return regulariser_move(kind, losses)

    assert move(4) == pytest.approx(move(1), rel=1e-3)


@both(TypeError)
def test_14_a_module_without_gradient_is_no_error(kind):
    """PEFT: `p.grad` is None. An unused module, or an expert without tokens."""
    train(kind(targets=("first", "second", "spare")))


@both(TypeError)
def test_15_a_frozen_factor_is_no_error(kind):
    """PEFT: the same."""
    run = kind()
    for name, parameter in run.model.named_parameters():
        if "first.lora_A" in name:
            parameter.requires_grad_(False)
    train(run)


@BOTH
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_16_one_infinite_gradient_does_not_spoil_the_averages(kind, bad):
    """PEFT: averages are NaN for ever, and nothing is pruned any more."""
    run = kind()
    optimizer = adamw(run.model)

    class Careful:
        """Leaves the step out, as mixed precision's scaler does."""

        def step(self):
            good = all(bool(p.grad.isfinite().all()) for p in run.model.parameters() if p.grad is not None)
            if good:
                optimizer.step()
            elif kind is Ours:
                run.controller.after_step(optimizer)

        def zero_grad(self):
            optimizer.zero_grad()

    def change(step):
        if step == 6:
            for p in run.model.parameters():  # as a loss that overflows does
                if p.grad is not None:
                    p.grad.fill_(bad)

    train(run, optimizer=Careful(), change=change)
    assert run.live() <= 4


@BOTH
def test_17_memory_shrinks(kind):
    """PEFT: parameters, gradients and optimizer state keep their size."""
    run = kind()
    before = run.in_memory()
    optimizer = adamw(run.model)
    train(run, optimizer=optimizer)
    assert run.in_memory() < before
    state = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.dim())
    assert state < 2 * before


@BOTH
def test_18_what_is_saved_between_allocations_is_the_live_model(kind, tmp_path):
    """PEFT: masked values live again until the next allocation, the file is cut by the mask."""
    run = kind(allocation_interval=3)
    if kind is Peft:
        run.model.peft_config["default"].deltaT = 3
        run.model.base_model.rankallocator.peft_config.deltaT = 3
    train(run, steps=11)
    x = torch.randn(4, 8)
    run.model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    with torch.no_grad():
        assert (loaded.eval()(x) - run.model.eval()(x)).abs().max() < 1e-5


@BOTH
def test_19_the_saved_adapter_is_a_lora_that_servers_load(kind, tmp_path):
    """PEFT: of type ADALORA, which no server knows."""
    import json

    run = kind()
    train(run)
    run.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


@both(ValueError)
def test_20_two_trainable_adapters(kind):
    """PEFT: one trainable adapter."""
    run = kind(name="a1")
    if kind is Ours:
        run.model.add_adapter("a2", LoraConfig(r=6, target_modules=["first", "second"]))
        adalora.attach(run.model, adapter="a2", target_rank=2, total_steps=STEPS)
    else:
        config = copy.deepcopy(run.model.peft_config["a1"])
        run.model.add_adapter("a2", config)
    run.model.set_adapter("a2")
    train(run)


@both(KeyError)
@pytest.mark.parametrize("name", ["lora", "a", "E", "first"])
def test_21_adapter_names_that_are_parts_of_other_words(kind, name, tmp_path):
    """PEFT: keys are found by sub-strings, and saving breaks. "first" is a module here, as `query` is in BERT."""
    run = kind(name=name)
    train(run)
    run.model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(Net(), tmp_path / name)
    x = torch.randn(4, 8)
    with torch.no_grad():
        assert (loaded.eval()(x) - run.model.eval()(x)).abs().max() < 1e-5


@BOTH
def test_22_the_rank_pattern_is_numbers(kind):
    """PEFT: a list of booleans for each module."""
    run = kind()
    train(run)
    values = list(run.model.peft_config["default"].rank_pattern.values())
    assert all(isinstance(value, int) for value in values)
    if kind is Peft:
        assert values


@BOTH
def test_23_the_first_update_is_of_loras_size(kind):
    """PEFT: with its defaults, ‖ΔW‖ after one step is hundreds of times smaller than LoRA's."""

    def moved(model):
        optimizer = adamw(model)
        x = torch.randn(32, 256)
        (model(x) - torch.randn(32, 256)).square().mean().backward()
        optimizer.step()
        layer = next(m for m in model.modules() if hasattr(m, "get_delta_weight"))
        return float(layer.get_delta_weight("default").norm())

    def base():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(256, 256))

    lora = moved(get_peft_model(base(), LoraConfig(r=8, lora_alpha=8, target_modules=["0"])))
    if kind is Ours:
        model = get_peft_model(base(), LoraConfig(r=12, lora_alpha=12, target_modules=["0"]))
        adalora.attach(model, target_rank=8, total_steps=100)
    else:
        config = PeftAdaLoraConfig(
            target_r=8, init_r=12, lora_alpha=8, total_step=100, tinit=10, tfinal=40, target_modules=["0"]
        )
        model = get_peft_model(base(), config)
    assert moved(model) > lora / 3


@BOTH
def test_24_the_user_is_told_when_nothing_happens(kind):
    """PEFT: trained without a call, no warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if kind is Ours:
            run = kind()
            model = run.model
            model(torch.randn(4, 8)).sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=0.1)
            run.controller.finalize()
        else:
            train(kind(call=False))
    assert any(issubclass(w.category, UserWarning) and "rank" in str(w.message) for w in caught)


@BOTH
def test_25_few_operations_on_every_step(kind):
    """PEFT: it walks over all parameters in Python on every step, thousands of tensor operations for BERT."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    def count(run):
        optimizer = adamw(run.model, foreach=True)
        x = torch.randn(4, 8)
        for step in range(2):
            with Count() as counter:
                loss = run.model(x).square().mean()
                loss.backward()
                run.after(step)
            optimizer.zero_grad()
        return counter.calls

    class Plain:
        def __init__(self):
            self.model = get_peft_model(Net(), LoraConfig(r=6, target_modules=["first", "second"]))

        def after(self, step):
            pass

    assert inspect.isclass(kind)
    assert count(kind()) <= 1.5 * count(Plain())
