"""Every score, gradient, weight and orthogonality mode against plain loops over numbers, for more than 100 steps."""

import itertools

import pytest
import torch
from toys import adamw, batch, lora

import adalora
from adalora.core.reference import Average, reference_budget, reference_keep

STEPS, WARMUP, FINAL, GAMMA = 130, 6, 14, 0.2
SCORES = ["sensitivity_uncertainty", "ratio", "sensitivity", "lambda_sensitivity", "magnitude", "lambda_magnitude"]
MODES = [
    *[("svd", "squared", importance, "total", "after") for importance in SCORES],
    *[("lora", "decoupled", importance, "total", "after") for importance in SCORES[:-1]],
    *[
        ("svd", orthogonality, "sensitivity_uncertainty", gradient, weights)
        for orthogonality, gradient, weights in itertools.product(
            ["squared", "released"], ["total", "task"], ["before", "after"]
        )
    ],
    ("svd", "decoupled", "sensitivity_uncertainty", "total", "before"),
    ("svd", "off", "sensitivity_uncertainty", "total", "before"),
    ("lora", "off", "sensitivity_uncertainty", "total", "before"),
]


class Oracle:
    """Running averages of every number of every module, and what the scores are made of."""

    def __init__(self, handles):
        self.averages = [[[Average() for _ in range(p.numel())] for p, _ in h.factors.values()] for h in handles]
        self.lambdas = [[Average() for _ in range(h.rank)] for h in handles]

    def observe(self, number, weights, gradients):
        """One module's [P, Q] or [P, Q, λ] as matrices and vectors."""
        P, Q, *rest = weights
        dP, dQ, *drest = gradients
        for averages, w, g in zip(self.averages[number], (P, Q), (dP, dQ)):
            for average, product in zip(averages, (w * g).flatten().tolist()):
                average.update(product, beta1=0.85, beta2=0.85)
        products = (rest[0] * drest[0]).tolist() if rest else (P * dP).sum(dim=0).tolist()
        for average, product in zip(self.lambdas[number], products):
            average.update(product, beta1=0.85, beta2=0.85)

    def scores(self, handles, importance):
        """S of every triplet."""

        def value(average):
            if importance == "ratio":
                return average.sensitivity / max(average.uncertainty, torch.finfo(torch.float32).tiny)
            if importance in ("sensitivity", "lambda_sensitivity"):
                return average.sensitivity
            return average.score()

        result = []
        for number, h in enumerate(handles):
            P, Q = h.P_or.double(), h.Q_ri.double()
            weights = torch.ones(h.rank) if h.lambda_parameter is None else h.lambda_parameter.detach().double()
            for i in range(h.rank):
                if importance == "lambda_magnitude":
                    result.append(abs(float(weights[i])))
                elif importance == "magnitude":
                    result.append(abs(float(weights[i])) * float(P[:, i].norm() * Q[i].norm()) * h.scale)
                else:
                    score = value(self.lambdas[number][i])
                    if importance != "lambda_sensitivity":
                        left, right = self.averages[number][:2]
                        score += sum(value(left[j * h.rank + i]) for j in range(len(P))) / len(P)
                        score += sum(value(right[i * Q.shape[1] + j]) for j in range(Q.shape[1])) / Q.shape[1]
                    result.append(score)
        return result


def matrices(h):
    """P, Q and λ of a layer, in float64, copies."""
    return [p.detach().double().clone() for p, _ in h.factors.values()]


def orthogonality_gradients(handles, kind):
    """∇γR by autograd, for every layer's P and Q (and 0 for λ)."""
    terms = []
    factors = [[t.requires_grad_() for t in matrices(h)[:2]] for h in handles]
    for P, Q in factors:
        for gram in (P.T @ P, Q @ Q.T):
            gap = gram - torch.eye(len(gram), dtype=torch.float64)
            terms.append(gap.square().sum() if kind == "squared" else gap.norm())
    total = GAMMA * (sum(terms) if kind == "squared" else sum(terms) / len(terms))
    flat = torch.autograd.grad(total, [t for pair in factors for t in pair])
    return [list(flat[2 * k : 2 * k + 2]) for k in range(len(handles))]


@pytest.mark.filterwarnings("ignore:unstable-scores")  # true of the ratio, which is dimensionless noise near a minimum
@pytest.mark.parametrize(("kind", "orthogonality", "importance", "gradient", "weights"), MODES)
def test_scores_and_masks_at_every_step(kind, orthogonality, importance, gradient, weights):
    model = lora(r=3, targets=["query", "down", "head"])
    coupled = orthogonality in ("squared", "released")
    fields = {
        "orthogonality": orthogonality,
        "importance": importance,
        **({"orthogonality_weight": GAMMA} if orthogonality != "off" else {}),
        **({"score_gradient": gradient} if coupled and "magnitude" not in importance else {}),
        **({"score_weights": weights} if "magnitude" not in importance else {}),
        # Orthonormal factors have ∇R = 0 to rounding, and rounding is nothing to compare.
        **({"handover": False} if kind == "lora" else {"initialization": "gaussian"}),
    }
    controller = adalora.attach(
        model,
        parametrization=kind,
        total_rank=5,
        total_steps=STEPS,
        warmup=WARMUP,
        final=FINAL,
        allocation_interval=4,
        compact=False,
        **fields,
    )
    handles = controller.handles
    oracle, optimizer = Oracle(handles), adamw(model)
    masks = set()
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        before = [matrices(h) for h in handles]
        gradients = [[p.grad.double().clone() for p, _ in h.factors.values()] for h in handles]
        if coupled:
            extra = orthogonality_gradients(handles, orthogonality)
            total = [[g + e for g, e in zip(mine, term)] + mine[2:] for mine, term in zip(gradients, extra)]
        else:
            total = gradients
        after = []
        hook = optimizer.register_step_post_hook(lambda *_, after=after: after.extend(matrices(h) for h in handles))
        optimizer.step()  # an optimizer's own hooks run before the global ones: the controller has moved nothing yet
        hook.remove()
        if step < STEPS - FINAL:
            for number in range(len(handles)):
                used = before[number] if weights == "before" else after[number]
                oracle.observe(number, used, total[number] if gradient == "total" else gradients[number])
            expected = oracle.scores(handles, importance)
            wanted = torch.tensor(expected, dtype=torch.float64)
            ours = controller._scorer.scores().double()
            if "magnitude" not in importance or not controller.schedule.allocates(step):
                torch.testing.assert_close(ours, wanted, rtol=2e-3, atol=2e-5 * float(wanted.max()))
        if step < STEPS - FINAL and controller.schedule.allocates(step) and "magnitude" not in importance:
            budget = reference_budget(step, initial_budget=15, target_budget=5, warmup=WARMUP, final=FINAL, total=STEPS)
            mask = torch.cat([h.mask for h in handles]).tolist()
            assert mask == reference_keep(ours.tolist(), budget=budget)
            masks.add(tuple(mask))
    assert controller.live == 5
    assert "magnitude" in importance or len(masks) > 4
