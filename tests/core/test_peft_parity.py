"""PEFT's own AdaLoRA allocator against the core functions, on the same weights and gradients.

Step numbering: PEFT's `global_step` is our step, with warmup_steps = tinit, decrease_end = total_step - tfinal and
interval = deltaT. PEFT allocates where global_step is a multiple of deltaT, we where step - warmup_steps is one: the
same steps where tinit is a multiple of deltaT. After decrease_end PEFT repeats its last mask at every step; we deal
out once.
"""

import pytest
import torch
from peft import AdaLoraConfig as PeftAdaLoraConfig
from peft import get_peft_model
from torch import nn

from adalora.core.allocation import allocate
from adalora.core.importance import SmoothedImportance, left_products, right_products, triplet_score
from adalora.core.schedule import BudgetSchedule

STEPS, TINIT, TFINAL, DELTA, R, TARGET = 80, 10, 10, 5, 6, 2
BETA1, BETA2 = 0.85, 0.9


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(7, 16)
        self.middle = nn.Linear(16, 16)
        self.down = nn.Linear(16, 3)

    def forward(self, x):
        return self.down(torch.tanh(self.middle(torch.tanh(self.up(x)))))


def peft_model():
    config = PeftAdaLoraConfig(
        target_modules=["up", "middle", "down"],
        init_r=R,
        target_r=TARGET,
        tinit=TINIT,
        tfinal=TFINAL,
        deltaT=DELTA,
        total_step=STEPS,
        beta1=BETA1,
        beta2=BETA2,
        lora_alpha=16,
    )
    return get_peft_model(Net(), config)


def factors(model):
    """(name, P, λ, Q) of each module, in the order of PEFT's parameters."""
    named = dict(model.base_model.named_parameters())
    stems = [n.replace("lora_A", "%s") for n in named if "lora_A.default" in n]
    return [(s, named[s % "lora_B"], named[s % "lora_E"], named[s % "lora_A"]) for s in stems]


class Ours:
    """Averages of our core for every module; each module is a stack of one."""

    def __init__(self, modules):
        self.averages = [
            tuple(SmoothedImportance.zeros_like(t[None]) for t in (P, E[:, 0], Q)) for _, P, E, Q in modules
        ]

    def observe(self, modules):
        for (_, P, E, Q), averages in zip(modules, self.averages):
            products = (
                left_products(P.detach()[None], P.grad[None])[0],
                (E.detach() * E.grad)[None, :, 0],
                right_products(Q.detach()[None], Q.grad[None]),
            )
            for average, product in zip(averages, products):
                average.update(product, beta1=BETA1, beta2=BETA2)

    def scores(self):
        kind = "sensitivity_uncertainty"
        return torch.cat([triplet_score(E.score(kind), P.score(kind), Q.score(kind))[0] for P, E, Q in self.averages])


def peft_scores(allocator, modules):
    """S as PEFT's mask_to_budget puts it together, from PEFT's own element scores."""
    parts = []
    for stem, *_ in modules:
        score = {part: allocator._element_score(stem % part) for part in ("lora_A", "lora_B", "lora_E")}
        vectors = [score["lora_A"].mean(dim=1, keepdim=True), score["lora_B"].mean(dim=0).view(-1, 1)]
        parts.append(allocator._combine_ipt(score["lora_E"], torch.cat(vectors, dim=1)))
    return torch.cat(parts)


def test_averages_scores_budgets_and_masks_are_those_of_peft():
    model = peft_model()
    allocator = model.base_model.rankallocator
    modules = factors(model)
    ours = Ours(modules)
    schedule = BudgetSchedule(
        initial_budget=R * len(modules),
        target_budget=TARGET * len(modules),
        warmup_steps=TINIT,
        decrease_end=STEPS - TFINAL,
        total_steps=STEPS,
        interval=DELTA,
        shape="cubic",
    )
    module = torch.arange(len(modules)).repeat_interleave(R)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, teacher = torch.randn(64, 7), torch.randn(7, 3)
    observed, allocations, patterns = 0, 0, set()
    for step in range(STEPS):
        batch = x[torch.randint(64, (16,))]
        optimizer.zero_grad()
        (model(batch) - batch @ teacher).square().mean().backward()
        optimizer.step()
        if step < schedule.decrease_end:
            ours.observe(modules)
            observed += 1
        budget, pattern = allocator.update_and_allocate(model.base_model, step)

        for (stem, *_), averages in zip(modules, ours.averages):
            for part, average in zip(("lora_B", "lora_E", "lora_A"), averages):
                name = stem % part
                peft_sensitivity = allocator.exp_avg_ipt[name].view_as(average.sensitivity)
                peft_uncertainty = allocator.exp_avg_unc[name].view_as(average.uncertainty)
                torch.testing.assert_close(average.sensitivity, peft_sensitivity, rtol=1e-5, atol=1e-12)
                # |I - Ī| loses digits where I is close to Ī: compare to the size of I.
                slack = 1e-6 * float(peft_sensitivity.max())
                torch.testing.assert_close(average.uncertainty, peft_uncertainty, rtol=1e-4, atol=slack)
        scores = ours.scores()
        expected = peft_scores(allocator, modules)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))
        assert schedule.budget(step) == budget
        if step <= schedule.decrease_end:
            assert schedule.allocates(step) == (pattern is not None)
        if pattern is not None:
            assert len(scores.unique()) == len(scores)
            keep = allocate(scores, module, budget=schedule.budget(step))
            assert keep.tolist() == [kept for stem, *_ in modules for kept in pattern[stem % "lora_E"]]
            assert int(keep.sum()) == budget
            allocations += 1
            patterns.add(tuple(keep.tolist()))
    assert observed == 70
    assert allocations == 11 + 10  # steps 15, 20, ... 65; from 70 on PEFT masks at each of 71 ... 79, and at 70
    assert len(patterns) > 5  # the masks did change, so their agreement says something
    assert {sum(p) for p in patterns} >= {TARGET * len(modules)}


@pytest.mark.parametrize(("b0", "bT"), [(24, 8), (144, 96), (1000, 7), (97, 96)])
@pytest.mark.parametrize(
    ("tinit", "tfinal", "total", "delta"), [(0, 1, 300, 7), (100, 300, 1000, 10), (16, 33, 150, 1)]
)
def test_budgets_are_those_of_peft(b0, bT, tinit, tfinal, total, delta):
    model = peft_model()
    allocator = model.base_model.rankallocator
    config = allocator.peft_config
    config.tinit, config.tfinal, config.total_step, config.deltaT = tinit, tfinal, total, delta
    allocator.init_bgt, allocator.target_bgt = b0, bT
    schedule = BudgetSchedule(
        initial_budget=b0,
        target_budget=bT,
        warmup_steps=tinit,
        decrease_end=total - tfinal,
        total_steps=total,
        interval=delta,
        shape="cubic",
        released=True,
    )
    assert [schedule.budget(t) for t in range(total)] == [allocator.budget_schedule(t)[0] for t in range(total)]


def test_masks_are_those_of_peft_on_random_scores():
    model = peft_model()
    allocator = model.base_model.rankallocator
    modules = factors(model)
    module = torch.arange(len(modules)).repeat_interleave(R)
    for budget in range(len(module)):  # PEFT cannot keep all: kthvalue of k = 0
        for stem, P, E, Q in modules:
            for part, p in (("lora_A", Q), ("lora_B", P), ("lora_E", E)):
                allocator.exp_avg_ipt[stem % part] = torch.rand_like(p)
                allocator.exp_avg_unc[stem % part] = torch.rand_like(p)
        pattern = allocator.mask_to_budget(model.base_model, budget)
        keep = allocate(peft_scores(allocator, modules), module, budget=budget)
        assert keep.tolist() == [kept for stem, *_ in modules for kept in pattern[stem % "lora_E"]]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_lambda_times_its_gradient_is_the_row_sum_of_P_times_its_gradient(scale):
    # The rescaling P·λ, 1 puts λ into P: ∂L/∂λ itself is autograd's, in float64.
    P = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    weights = (torch.randn(4, dtype=torch.float64) * scale).requires_grad_()
    Q = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 9, dtype=torch.float64)
    loss = (torch.tanh(x @ (P * weights @ Q).T) - y).pow(4).mean()
    by_P, by_weights = torch.autograd.grad(loss, (P, weights))
    expected = weights.detach() * by_weights
    torch.testing.assert_close((P.detach() * by_P).sum(dim=0), expected, rtol=1e-10, atol=1e-14)

    absorbed = (P * weights).detach().requires_grad_()
    loss = (torch.tanh(x @ (absorbed @ Q.detach()).T) - y).pow(4).mean()
    (gradient,) = torch.autograd.grad(loss, absorbed)
    products, row_sums = left_products(absorbed.detach()[None], gradient[None])
    torch.testing.assert_close(row_sums[0].double(), expected, rtol=1e-4, atol=1e-6 * float(products.abs().max()))
    assert row_sums.dtype == torch.float32
