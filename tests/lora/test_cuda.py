"""On a CUDA device: nothing waits, graphs see the masks, memory falls, and the numbers are the CPU's."""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import adalora
from benchmarks.operations import DeviceWaits
from helpers.compiling import in_one_graph

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]
DEVICE = torch.device("cuda")
STEPS, WIDTH = 24, 16
KINDS = {"lora": {}, "svd": {"parametrization": "svd"}}
TARGETS = r".*(up|down)\.\d+"


class Net(nn.Module):
    """Blocks of two Linears."""

    def __init__(self, blocks, width=WIDTH):
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(blocks))

    def forward(self, x):
        for up, down in zip(self.up, self.down):
            x = x + down(torch.tanh(up(x)))
        return x


def attached(*, blocks=2, width=WIDTH, device=DEVICE, dtype=torch.float32, rank=4, dropout=0.0, steps=STEPS, **options):
    """A model on its device and its controller, which allocates in every third step."""
    torch.manual_seed(1)
    config = LoraConfig(r=rank, lora_alpha=8, lora_dropout=dropout, target_modules=TARGETS)
    model = get_peft_model(Net(blocks, width).to(device, dtype), config, autocast_adapter_dtype=False)
    options = {"target_rank": rank // 2, "allocation_interval": 3, **options}
    return model, adalora.attach(model, total_steps=steps, **options)


def adamw(model, *, kind="foreach", lr=1e-2):
    """Torch's AdamW in one of its forms; "capturable" keeps its learning rate on the device."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if kind == "capturable":
        rate = torch.tensor(lr, device=parameters[0].device)
        return torch.optim.AdamW(parameters, lr=rate, capturable=True, foreach=True)
    return torch.optim.AdamW(parameters, lr=lr, fused=kind == "fused", foreach=kind == "foreach")


def batch(step, *, width=WIDTH, device=DEVICE, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, width, generator=generator, dtype=torch.float64)
    return x.to(device, dtype), torch.tanh(x.roll(1, dims=1) * 2).to(device, dtype)


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


def train(model, optimizer, steps, *, run=None, **where):
    """Train; returns the losses."""
    losses = []
    for step in steps:
        torch.manual_seed(1000 + step)
        loss = loss_of(model if run is None else run, *batch(step, **where))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


def kind_of(schedule, step):
    """What a step of the run does beside training."""
    if step == schedule.warmup_steps - 1:
        return "handover"
    return "mask" if schedule.allocates(step) else schedule.phase(step)


@contextmanager
def synchronising(mode):
    """Torch's own watch over calls that wait for the device: "error", or "warn" and a list of the warnings."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode(mode)
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")


def update_of(model):
    """ΔW of every layer: what a change of the singular vectors' signs leaves as it is."""
    layers = [m for m in model.modules() if hasattr(m, "get_delta_weight") and "default" in m.lora_A]
    return [m.get_delta_weight("default").detach().cpu() for m in layers]


def assert_same(first, second, **close):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("optimizer", ["foreach", "fused", "capturable"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_steps_do_not_wait(kind, dropout, optimizer):
    model, controller = attached(dropout=dropout, **KINDS[kind])
    optimizer, schedule = adamw(model, kind=optimizer), controller.schedule
    batches, seen = [batch(step) for step in range(STEPS)], set()
    for step, (x, y) in enumerate(batches):
        what = kind_of(schedule, step)
        ordinary = step > 0 and what not in ("mask", "handover")
        with synchronising("error" if ordinary else "default"), DeviceWaits() as counter:
            loss_of(model, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        if ordinary:
            assert not counter.waits, (what, counter.waits)
        seen.add(what)
    assert seen == {"warmup", "handover", "decrease", "mask", "final"}


@pytest.mark.parametrize(("kind", "what"), [("lora", "mask"), ("lora", "handover"), ("svd", "mask")])
def test_waits_of_the_other_steps_do_not_grow_with_modules(kind, what):
    most = []
    for blocks in (2, 6):
        model, controller = attached(blocks=blocks, **KINDS[kind])
        optimizer, counts = adamw(model), []
        for step in range(STEPS):
            loss_of(model, *batch(step)).backward()
            with synchronising("warn") as seen:
                optimizer.step()
            optimizer.zero_grad()
            if kind_of(controller.schedule, step) == what:
                counts.append(sum("synchroniz" in str(warning.message) for warning in seen))
        most.append(max(counts))
    print(f"{kind}: {what} steps wait {most[0]} times with 4 modules, {most[1]} with 12")
    assert 0 < most[1] <= most[0] + 1  # a layer of rank 0 more or less makes another shape


class Captured:
    """Forward and backward as one CUDA graph; gradients stay where they are."""

    def __init__(self, model, x, y):
        self.x, self.y, self.graph = x.clone(), y.clone(), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                loss_of(model, self.x, self.y).backward()
        torch.cuda.current_stream().wait_stream(stream)
        model.zero_grad(set_to_none=True)
        with torch.cuda.graph(self.graph):
            self.loss = loss_of(model, self.x, self.y)
            self.loss.backward()

    def __call__(self, x, y):
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        return self.loss.detach().clone()


@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_graph_sees_the_masks(kind):
    """Captured once, before the first step: hand-over, masks and steps of the optimizer change the weights in place."""
    where = {"dtype": torch.float64}
    eager, controller = attached(compact=False, **where, **KINDS[kind])
    wanted = train(eager, adamw(eager), range(STEPS), **where)
    model, other = attached(compact=False, **where, **KINDS[kind])
    optimizer, step_once = adamw(model), Captured(model, *batch(0, **where))
    losses = []
    for step in range(STEPS):
        losses.append(step_once(*batch(step, **where)))
        optimizer.step()
    torch.testing.assert_close(torch.stack(losses).cpu(), wanted, rtol=1e-9, atol=1e-12)
    assert [h.mask.tolist() for h in other.handles] == [h.mask.tolist() for h in controller.handles]
    assert other.live < sum(h.rank for h in other.handles)
    assert_same(update_of(model), update_of(eager), rtol=1e-8, atol=1e-10)


def test_a_captured_graph_draws_dropout_anew():
    model, _ = attached(dropout=0.5)
    train(model, adamw(model), range(2))
    step_once, (x, y) = Captured(model, *batch(0)), batch(1)
    torch.manual_seed(5)
    first, second = step_once(x, y), step_once(x, y)
    torch.manual_seed(5)
    assert torch.equal(step_once(x, y), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")  # what a compiler says of the machine it is on
def test_compiled_code_is_made_once_and_gives_the_same(kind, mode):
    where = {"dtype": torch.float64}
    eager, controller = attached(compact=False, **where, **KINDS[kind])
    wanted = train(eager, adamw(eager), range(STEPS), **where)
    model, other = attached(compact=False, **where, **KINDS[kind])
    torch._dynamo.reset()
    compiled = torch.compile(in_one_graph(model), fullgraph=True, mode=mode)
    loss_of(compiled, *batch(0, **where)).backward()
    model.zero_grad()
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = train(model, adamw(model), range(STEPS), run=compiled, **where)
    torch.testing.assert_close(losses, wanted, rtol=1e-8, atol=1e-12)
    assert [h.mask.tolist() for h in other.handles] == [h.mask.tolist() for h in controller.handles]
    assert_same(update_of(model), update_of(eager), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("optimizer", ["foreach", "fused", "capturable"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_the_cpu_s(kind, optimizer, dtype):
    """Hand-over, masks and removal among its steps; the step-by-step oracle is in `tests/method`."""
    results = []
    for device in ("cpu", DEVICE):
        model, controller = attached(device=device, dtype=dtype, **KINDS[kind])
        chosen = "foreach" if device == "cpu" else optimizer
        losses = train(model, adamw(model, kind=chosen), range(STEPS), device=device, dtype=dtype)
        assert controller.live == sum(h.rank for h in controller.handles) == 8
        results.append((losses, list(controller.ranks.values()), update_of(model)))
    (losses, ranks, updates), (cuda_losses, cuda_ranks, cuda_updates) = results
    exact = dtype == torch.float64 and optimizer != "capturable"  # that one counts its steps in float32
    torch.testing.assert_close(cuda_losses, losses, rtol=1e-8 if exact else 1e-5, atol=0)
    assert cuda_ranks == ranks
    assert_same(cuda_updates, updates, rtol=0, atol=1e-8 if exact else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast(kind):
    """As PEFT's LoRA of the same start while the adapter trains as LoRA; averages in fp32; ends at its target."""
    model, controller = attached(dropout=0.1, **KINDS[kind])
    optimizer, losses = adamw(model), []
    for step in range(STEPS):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            loss = loss_of(model, *batch(0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        stacks = [*controller._scorer._left.values(), *controller._scorer._right.values()]
        assert all(s.factors.sensitivity.dtype == torch.float32 for s in stacks), step
    assert losses[-1] < 0.9 * losses[0]
    assert controller.live == 8


@pytest.mark.parametrize("optimizer", ["foreach", "fused"])
def test_float16_with_a_scaler_and_overflows(optimizer):
    """Steps that overflow are no steps of the run, and a fused optimizer is asked once a step, no more."""
    model, controller = attached()
    fused, optimizer = optimizer == "fused", adamw(model, kind=optimizer)
    scaler, bad = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**8), {5, 12}
    for turn in range(STEPS + len(bad)):
        what = kind_of(controller.schedule, controller.step)
        with torch.autocast(DEVICE.type, dtype=torch.float16):
            loss = loss_of(model, *batch(turn))
        scaler.scale(loss * (1e30 if turn in bad else 1.0)).backward()
        with synchronising("warn") as seen:
            scaler.step(optimizer)
        waits = sum("synchroniz" in str(warning.message) for warning in seen)
        scaler.update()
        optimizer.zero_grad()
        if fused and turn > 0 and what not in ("mask", "handover"):
            assert waits <= 1, (turn, what)
        if controller._scorer._left:
            assert bool(controller._scorer.scores().isfinite().all())
    assert controller.step == STEPS
    assert controller.live == 8
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("optimizer", ["foreach", "fused"])
def test_removal_frees_parameters_gradients_and_moments(optimizer):
    model, controller = attached(width=128, rank=8, dtype=torch.float32)  # a triplet's vectors fill whole blocks
    optimizer, end = adamw(model, kind=optimizer), controller.schedule.decrease_end
    for step in range(end + 1):
        loss_of(model, *batch(step, width=128)).backward()
        if step == end:
            torch.cuda.synchronize()
            before, rank = torch.cuda.memory_allocated(), sum(h.rank for h in controller.handles)
            averages = [s.factors for s in (*controller._scorer._left.values(), *controller._scorer._right.values())]
            freed = sum(2 * 4 * average.sensitivity.numel() for average in averages)
            del averages
        optimizer.step()  # gradients stay
        if step < end:
            optimizer.zero_grad()
    removed = rank - sum(h.rank for h in controller.handles)
    assert removed == 16
    cost = 4 * 4 * 3 * 128  # weight, gradient and two moments of d_in + d_out = 3 · 128 numbers
    fell = before - torch.cuda.memory_allocated()
    print(f"memory fell by {fell} bytes; {removed} triplets are {removed * cost}, the averages {freed}")
    assert fell >= removed * cost + freed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moment", [10, STEPS])
def test_saved_adapter_loads_in_stock_peft(tmp_path, kind, moment):
    model, controller = attached(**KINDS[kind])
    base = copy.deepcopy(model.get_base_model())
    for layer in list(base.up) + list(base.down):
        assert layer.base_layer.weight.device.type == DEVICE.type
    train(model, adamw(model), range(moment))
    if moment == STEPS:
        controller.finalize()
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(Net(2).to(DEVICE), tmp_path).eval()
    x, _ = batch(99)
    torch.testing.assert_close(loaded(x), model.eval()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("moment", [2, 8, 20])
def test_a_resumed_run_goes_on_to_the_bit(tmp_path, moment):
    whole, controller = attached(dropout=0.1)
    train(whole, adamw(whole), range(STEPS))
    model, first = attached(dropout=0.1)
    optimizer = adamw(model)
    train(model, optimizer, range(moment))
    torch.save({"optimizer": optimizer.state_dict(), "adalora": first.state_dict()}, tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True, map_location=DEVICE)
    model, second = attached(dropout=0.1)
    second.load_state_dict(saved["adalora"])
    optimizer = adamw(model)
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(moment, STEPS))
    assert second.ranks == controller.ranks
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in whole.state_dict().items())
