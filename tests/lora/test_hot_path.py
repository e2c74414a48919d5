"""What runs after every optimizer step: equal to the slow way, without waiting for a device, in few operations."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import adalora
from adalora.config import AdaLoraConfig
from adalora.core.orthogonality import relative_error
from adalora.lora.layers.triplets import find_triplets
from adalora.lora.measures.scoring import Scorer
from adalora.lora.orthogonality.orthogonal import Groups, decoupled_step, orthogonality_error
from adalora.lora.orthogonality.regularization import coupled_gradients, decoupled_svd_step
from adalora.lora.ranks.masking import zero_pruned
from benchmarks.operations import OperationCounter, count
from tests.method.oracle import by_angles, towards_orthonormal


class Net(nn.Module):
    """Blocks of two Linears, over an embedding."""

    def __init__(self, blocks):
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.up = nn.ModuleList(nn.Linear(8, 12) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(12, 8) for _ in range(blocks))

    def forward(self, words):
        x = self.words(words)
        for up, down in zip(self.up, self.down):
            x = x + down(torch.tanh(up(x)))
        return x


def lora(blocks=2, *, targets=r".*(words|up\.\d+|down\.\d+)", ranks=None, **options):
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, rank_pattern=ranks or {}, **options)
    return get_peft_model(Net(blocks), config)


def backward(model, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 20, (6, 5), generator=generator)
    model(words).square().mean().backward()


def run(model, *, steps=24, **options):
    """Train, and count what every `after_step` dispatches: by phase, mask steps apart."""
    controller = adalora.attach(model, target_rank=2, total_steps=steps, allocation_interval=3, **options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    after_step, counters = controller.after_step, []

    def counted(of):
        kind = "mask" if controller.schedule.allocates(controller.step) else controller.phase
        with OperationCounter() as counter:
            after_step(of)
        counters.append((kind, counter))

    controller.after_step = counted
    for step in range(steps):
        backward(model, seed=step)
        optimizer.step()
        optimizer.zero_grad()
    return controller, counters


@pytest.mark.parametrize("ranks", [{}, {"up.0": 1, "up.1": 3, "down.1": 6}])
def test_decoupled_step_is_that_of_every_module_alone(ranks):
    model = lora(3, ranks=ranks)
    handles = find_triplets(model, "default")
    expected = []
    for h in handles:
        P, Q = h.P_or.clone(), h.Q_ri.clone()
        if h.rank > 1:
            P = by_angles(P.T.double(), rate=8 * 0.3 * 0.2).T.float()
            Q = by_angles(Q.double(), rate=8 * 0.3 * 0.2, length=h.row_norm).float()
        expected.append((P, Q))
    decoupled_step(Groups(handles), weight=0.3, learning_rate=0.2)
    for h, (P, Q) in zip(handles, expected):
        torch.testing.assert_close(h.P_or, P, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(h.Q_ri, Q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranks", [{}, {"up.0": 1, "up.1": 3, "down.1": 6}])
@pytest.mark.parametrize("kind", ["squared", "released", "decoupled"])
def test_terms_of_layers_with_a_lambda_are_those_of_every_module_alone(kind, ranks):
    handles = find_triplets(lora(3, ranks=ranks), "default")
    expected = {}
    for h in handles:
        for parameter, vectors, left in ((h.P_parameter, h.P_or.T, True), (h.Q_parameter, h.Q_ri, False)):
            V = vectors.clone().requires_grad_()
            if kind == "decoupled":
                moved = towards_orthonormal(vectors.double(), rate=8 * 0.3 * 0.2).float()
                expected[parameter] = moved.T if left != h.is_embedding else moved
                continue
            gap = V @ V.T - torch.eye(len(V))
            term = gap.norm() / (2 * len(handles)) if kind == "released" else gap.square().sum()
            slope = torch.autograd.grad(0.3 * term, V)[0]
            expected[parameter] = slope.T if left != h.is_embedding else slope
    if kind == "decoupled":
        decoupled_svd_step(handles, weight=0.3, learning_rate=0.2)
        found = {parameter: parameter.detach() for parameter in expected}
    else:
        found = dict(coupled_gradients(handles, kind=kind, weight=0.3))
    assert found.keys() == expected.keys()
    for parameter, value in expected.items():
        torch.testing.assert_close(found[parameter], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["squared", "released", "decoupled"])
def test_terms_of_layers_with_a_lambda_do_not_grow_with_modules(kind):
    counts = []
    for blocks in (2, 6):
        handles = find_triplets(lora(blocks, targets=r".*(up|down)\.\d+"), "default")
        action = decoupled_svd_step if kind == "decoupled" else coupled_gradients
        options = {"learning_rate": 0.1} if kind == "decoupled" else {"kind": kind}
        counted = count(lambda handles=handles, action=action, options=options: action(handles, weight=0.1, **options))
        copies = counted.operations["clone"]  # what a parameter's gradient gets is its own
        counts.append(counted.total - copies)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("ranks", [{}, {"up.0": 1, "up.1": 3}])
def test_orthogonality_error_is_that_of_every_module_alone(ranks):
    handles = find_triplets(lora(2, ranks=ranks), "default")
    handles[-1].mask = torch.tensor([True, False, True, False])
    handles[-2].mask = torch.tensor([False, False, True, False])
    errors = [
        relative_error(vectors[None])
        for h in handles
        for vectors in (h.P_or.T[h.mask], h.Q_ri[h.mask])
        if len(vectors) > 1
    ]
    assert orthogonality_error(handles) == pytest.approx(float(torch.cat(errors).square().mean().sqrt()), rel=1e-5)


def test_orthogonality_error_without_pairs_is_zero():
    handles = find_triplets(lora(1), "default")
    for h in handles:
        h.mask = torch.tensor([True, False, False, False])
    assert orthogonality_error(handles) == 0.0
    assert orthogonality_error([]) == 0.0


def test_zero_pruned_zeroes_whatever_was_there_and_nothing_else():
    handles = find_triplets(lora(2), "default")
    before = [h.P_or.clone() for h in handles]
    handles[0].mask = torch.tensor([True, False, True, True])
    handles[3].mask = torch.zeros(4, dtype=torch.bool)
    handles[3].P_or[0, 0] = torch.nan
    zero_pruned(handles)
    for h, P in zip(handles, before):
        torch.testing.assert_close(h.P_or[:, h.mask], P[:, h.mask], rtol=0, atol=0)
        assert h.P_or[:, ~h.mask].eq(0).all()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("unused", [False, True])
def test_a_step_that_is_not_finite_leaves_every_average_as_it_was(bad, unused):
    model = lora(2)
    handles = find_triplets(model, "default")
    scorer = Scorer(handles, AdaLoraConfig(target_rank=2))
    backward(model)
    if unused:
        handles[1].P_parameter.grad = None
    scorer.observe()
    before = scorer.scores()
    handles[3].Q_parameter.grad.view(-1)[1] = bad
    scorer.observe()
    assert torch.equal(scorer.scores(), before)
    assert scorer.skipped == 1
    handles[3].Q_parameter.grad.view(-1)[1] = 0.5
    scorer.observe()
    assert not torch.equal(scorer.scores(), before)
    assert scorer.skipped == 1
    model.zero_grad()
    scorer.observe()
    scorer.skipped += 1
    assert scorer.skipped == 3


def test_large_half_precision_gradients_are_finite():
    model = lora(1).half()
    handles = find_triplets(model, "default")
    scorer = Scorer(handles, AdaLoraConfig(target_rank=2))
    for h in handles:
        for parameter in (h.P_parameter, h.Q_parameter):
            parameter.grad = torch.full_like(parameter, 3e4)  # its norm is no fp16 number
    scorer.observe()
    assert scorer.skipped == 0
    assert scorer.scores().isfinite().all()


def test_ordinary_steps_ask_the_device_nothing():
    """On `meta` there are no values: whatever a host would wait for is an error."""
    model = lora(2)
    handles = find_triplets(model, "default")
    scorer = Scorer(handles, AdaLoraConfig(target_rank=2))
    model.to("meta")
    for h in handles:
        for parameter in (h.P_parameter, h.Q_parameter):
            parameter.grad = torch.empty_like(parameter)
    handles[0].mask = torch.tensor([True, False, True, True])
    with torch.no_grad():
        scorer.observe()
        scorer.observe()
        decoupled_step(Groups(handles), weight=0.1, learning_rate=0.1)
        zero_pruned(handles)
    with pytest.raises(RuntimeError, match="meta"):
        _ = scorer.skipped


@pytest.mark.parametrize(
    "options", [{}, {"compact": False}, {"revival": False}, {"handover": False}, {"importance": "sensitivity"}]
)
def test_no_question_to_the_device_in_ordinary_steps(options):
    _, counters = run(lora(2), **options)
    kinds = {kind for kind, _ in counters}
    assert kinds == {"warmup", "decrease", "mask", "final"}
    # The hand-over, at the end of warm-up, takes decompositions.
    for kind, counter in counters[:2] + [entry for entry in counters[3:] if entry[0] != "mask"]:
        assert not counter.syncs, (kind, counter.syncs)


@pytest.mark.parametrize("options", [{}, {"compact": False}, {"revival": False}])
def test_operations_do_not_grow_with_modules_of_equal_shape(options):
    totals = []
    for blocks in (2, 6):
        _, counters = run(lora(blocks, targets=r".*(up|down)\.\d+"), **options)
        totals.append({})
        for kind, counter in counters[4:]:
            compacts = kind == "mask" and options.get("compact", True) and counter is _last_mask(counters)
            if not compacts:
                totals[-1][kind] = max(totals[-1].get(kind, 0), counter.total)
    assert totals[0].keys() == {"decrease", "mask", "final"}
    for kind, most in totals[0].items():
        assert totals[1][kind] <= most + 3, (kind, totals)  # a shape more may be pruned at one of the steps


def _last_mask(counters):
    return [counter for kind, counter in counters if kind == "mask"][-1]


def test_averages_take_twice_the_adapter_and_are_freed_in_the_final_phase():
    model = lora(2)
    controller = adalora.attach(model, target_rank=2, total_steps=20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    sizes = []
    for step in range(20):
        backward(model, seed=step)
        optimizer.step()
        optimizer.zero_grad()
        stacks = [*controller._scorer._left.values(), *controller._scorer._right.values()]
        averages = [getattr(s, name) for s in stacks for name in ("factors", "weights") if hasattr(s, name)]
        sizes.append(sum(a.sensitivity.numel() + a.uncertainty.numel() for a in averages))
    triplets = [(h.P_or.shape[0] + h.Q_ri.shape[1] + 1) * 4 for h in find_triplets(lora(2), "default")]
    assert max(sizes) == 2 * sum(triplets)
    assert sizes[-1] == 0


def test_count_leaves_views_out():
    x = torch.randn(3, 4)
    counter = count(lambda: (x.view(2, 6).T.unbind(), x @ x.T, x.sum().item()))
    assert counter.operations == {"mm": 1, "sum": 1, "_local_scalar_dense": 1}
    assert counter.syncs == {"_local_scalar_dense": 1}


def test_masks_zero_lambda_where_it_is_a_parameter():
    model = lora(2)
    controller = adalora.attach(model, target_rank=2, total_steps=20, parametrization="svd")
    handle = controller.handles[1]
    P = handle.P_or.clone()
    handle.lambda_parameter.data.fill_(0.5)
    handle.mask = torch.tensor([True, False, True, False])
    zero_pruned(controller.handles)
    assert handle.lambda_parameter.tolist() == [0.5, 0, 0.5, 0]
    assert torch.equal(handle.P_or, P)
