"""The whole method once more, step by step, on plain numbers and `torch.linalg` in float64: what a controller must do.

`Oracle` is told the weights and gradients of every step and says what has to come out: gradients with the
orthogonality term, averages, scores, budget, masks, the weights after the step. It reads the config and shares no
code with the package but `adalora.core.reference`.
"""

import math
from fractions import Fraction

import torch
from torch import nn

from adalora.core.reference import ReferenceModule, reference_budget
from adalora.core.reference_allocation import reference_buy, reference_deal, reference_share

MEASURED = ("magnitude", "lambda_magnitude", "random")


class Module:
    """One adapted layer as the oracle knows it.

    Attributes:
        groups: Of a convolution. The k-th triplets of all groups are one: a column of P, the rows of Q that feed it.
        averages: Of its triplets that are still in memory.
        live: Which of those are not pruned.
        length: ρ, what decoupled regularisation and singular vectors give Q's rows; fixed when training starts.
    """

    def __init__(self, layer, adapter, own_lambda):
        self.layer, self.adapter, self.own_lambda = layer, adapter, own_lambda
        self.live = [True]
        self.groups = 1 if adapter in layer.lora_embedding_A else getattr(layer.lora_B[adapter], "groups", 1)
        P, Q = self.matrices()[:2]
        self.d_out, self.d_in, self.live = len(P), Q.shape[1], [True] * len(Q)
        self.length = float((Q.square().sum(dim=1) / self.groups).mean().sqrt())
        self.forget()

    @property
    def rank(self):
        return len(self.live)

    def forget(self):
        self.averages = ReferenceModule(self.d_out, self.d_in, self.rank)

    @property
    def parameters(self):
        """P, Q and, where it is one, λ."""
        if not self.rank:
            return []
        layer, name = self.layer, self.adapter
        if name in layer.lora_embedding_A:
            found = [layer.lora_embedding_A[name], layer.lora_embedding_B[name]]
        else:
            found = [layer.lora_B[name].weight, layer.lora_A[name].weight]
        return [*found, layer.lora_lambda[name]] if self.own_lambda else found

    def matrix(self, number, tensor):
        """[d_out, r], [r, d_in] and [r] in float64 on the CPU, a copy, of what is shaped like one of the parameters.

        Of a convolution with groups: [d_out, r], [r, groups · d_in] and [groups, r].
        """
        tensor = tensor.detach().cpu().double().clone()
        if self.groups > 1 and number:
            rank = len(tensor) // self.groups
            rows = [tensor[k::rank].flatten() for k in range(rank)]  # triplet k of the first group, of the second, …
            return torch.stack(rows, dim=number - 1)
        if number == 2:
            return tensor
        return tensor.T if self.adapter in self.layer.lora_embedding_A else tensor.flatten(1)

    def by_group(self, parts):
        """P, Q and, where it is one, λ of each group alone: what has singular vectors of its own."""
        P, Q, *rest = parts
        weights = [w.view(self.groups, -1) for w in rest]
        return list(zip(P.chunk(self.groups), Q.chunk(self.groups, dim=1), *weights))

    def matrices(self):
        return [self.matrix(k, p) for k, p in enumerate(self.parameters)]

    def gradients(self):
        """None where the layer has none this step, zeros where one parameter of it has none."""
        if all(p.grad is None for p in self.parameters):
            return None
        return [
            self.matrix(k, torch.zeros_like(p) if p.grad is None else p.grad) for k, p in enumerate(self.parameters)
        ]


class Oracle:
    """What `adalora.attach(model, config, total_steps=…)` has to do; spans of the config are whole steps here."""

    def __init__(self, modules, config, *, total_steps, prices, targets, groups, floors, caps):
        """
        Args:
            modules: Layers in the model's order.
            config: The `AdaLoraConfig`.
            total_steps: T.
            prices: Of a triplet of each module.
            targets: b_T of each group.
            groups: Number of each module's group.
            floors: Of each module.
            caps: Of each module.
        """
        self.modules, self.config, self.total = modules, config, total_steps
        self.prices, self.targets, self.groups = prices, targets, groups
        self.floors, self.caps = floors, caps
        self.step = 0
        self.triplets = sum(m.rank for m in modules)
        self.full = [
            sum(m.rank * price for m, price, g in zip(modules, prices, groups) if g == group)
            for group in range(len(targets))
        ]
        self.end = min(total_steps - config.final, total_steps - 1)
        self.random = torch.Generator().manual_seed(config.seed)
        self.ends = config.schedule != "constant"

    @property
    def observes(self):
        return self.ends and self.step < self.end and (self.step >= self.config.warmup or not self.config.handover)

    @property
    def budget(self):
        """b(t) of the whole model."""
        config, initial, target = self.config, sum(self.full), sum(self.targets)
        if config.released_schedule and config.warmup <= self.step < self.end:  # its code: floating point, cut off
            share = 1 - (self.step - config.warmup) / (self.end - config.warmup)
            return int((initial - target) * share**3 + target)
        return reference_budget(
            self.step,
            initial_budget=initial,
            target_budget=target,
            warmup=config.warmup,
            final=self.total - self.end,
            total=self.total,
            shape=config.schedule,
        )

    @property
    def allocates(self):
        if not self.ends or not self.config.warmup <= self.step <= self.end:
            return False
        origin = 0 if self.config.released_schedule else self.config.warmup
        on_time = self.step > self.config.warmup and (self.step - origin) % self.config.allocation_interval == 0
        return self.step == self.end or on_time

    def with_term(self, weights, gradients):
        """Gradients that the optimizer has to get: with γR's, by autograd, where it is part of the objective."""
        config = self.config
        if config.orthogonality not in ("squared", "released") or not config.orthogonality_weight:
            return gradients
        factors = [[t.clone().requires_grad_() for t in parts[:2]] for parts in weights if parts]
        alone = [pair for m, pair in zip([m for m in self.modules if m.rank], factors) for pair in m.by_group(pair)]
        gaps = [gram - torch.eye(len(gram), dtype=torch.float64) for P, Q in alone for gram in (P.T @ P, Q @ Q.T)]
        if config.orthogonality == "squared":
            term = config.orthogonality_weight * sum(gap.square().sum() for gap in gaps)
        else:
            term = config.orthogonality_weight * sum(gap.norm() for gap in gaps) / len(gaps)
        added = iter(torch.autograd.grad(term, [t for pair in factors for t in pair]))
        result = []
        for parts, mine in zip(weights, gradients):
            if parts:
                extra = [next(added), next(added)]
                mine = [torch.zeros_like(t) for t in parts] if mine is None else mine
                mine = [a + b for a, b in zip(mine, extra)] + mine[2:]
            result.append(mine)
        return result

    def lengthened(self, before, after):
        """The weights after a step that moves P as many times as far as there were triplets for each one left."""
        left = sum(sum(m.live) for m in self.modules)
        if self.config.pace == "fixed" or not left:
            return after
        ratio = self.triplets / left
        if self.modules[0].layer.use_rslora.get(self.modules[0].adapter):
            ratio = math.sqrt(ratio)
        return [[old[0] + ratio * (new[0] - old[0]), *new[1:]] if new else new for old, new in zip(before, after)]

    def observe(self, before, after, task, total):
        """Take one step's weights and gradients into the averages; a step that is not finite is left out."""
        config = self.config
        if not self.observes or config.importance in MEASURED:
            return
        weights = before if config.score_weights == "before" else after
        gradients = total if config.score_gradient == "total" else task
        if not all(bool(t.isfinite().all()) for parts in gradients if parts for t in parts):
            return
        for m, parts, mine in zip(self.modules, weights, gradients):
            if parts and mine is not None:
                named = {"weights": parts[2], "grad_weights": mine[2]} if m.own_lambda else {}
                if m.own_lambda and m.groups > 1:  # ∂/∂c of a factor c on the λ of all groups
                    slope = (parts[2] * mine[2]).sum(dim=0)
                    named = {"weights": torch.ones_like(slope), "grad_weights": slope}
                m.averages.observe(
                    P=parts[0],
                    grad_P=mine[0],
                    Q=parts[1],
                    grad_Q=mine[1],
                    beta1=config.sensitivity_beta,
                    beta2=config.uncertainty_beta,
                    **named,
                )

    def regularised(self, weights, *, lr):
        """The weights after γR's own step, where it acts apart from the loss."""
        config = self.config
        if config.orthogonality != "decoupled":
            return weights
        if config.parametrization == "lora" and self.step >= self.end:
            return weights  # ranks are final: nothing is compared any more
        result, rate = [], 8 * lr * config.orthogonality_weight
        for m, parts in zip(self.modules, weights):
            angles = config.parametrization == "lora"  # λ is in the lengths, which are left alone
            if not parts or not rate or (angles and m.rank < 2):
                result.append(parts)
                continue
            moved = [t.clone() for t in parts[:2]]
            for P, Q in m.by_group(moved):
                for V, length in ((P.T, None), (Q, m.length)):
                    V.copy_(by_angles(V, rate=rate, length=length) if angles else towards_orthonormal(V, rate=rate))
            result.append(moved + parts[2:])
        return result

    def scores(self, weights, *, draw=False):
        """S of every triplet in memory, layer after layer. None for random scores that are not drawn now."""
        kind = self.config.importance
        if kind == "random":
            return torch.rand(sum(m.rank for m in self.modules), generator=self.random).tolist() if draw else None
        if kind not in MEASURED:
            return [s for m in self.modules for s in (m.averages.scores(kind) if m.rank else [])]
        result = []
        for m, parts in zip(self.modules, weights):
            for i in range(m.rank):
                sizes = []
                for P, Q, *weights in m.by_group(parts):
                    size = abs(float(weights[0][i])) if weights else 1.0
                    if kind == "magnitude":
                        size *= float(P[:, i].norm() * Q[i].norm()) * self.scale(m)
                    sizes.append(size)
                result.append(math.hypot(*sizes))
        return result

    @staticmethod
    def scale(m):
        """S as PEFT's forward and λ's have it."""
        return m.layer.scaling[m.adapter] * (m.layer.lora_gain[m.adapter] if m.own_lambda else 1.0)

    def keep(self, scores):
        """Which triplets b(t) leaves, each group with its share."""
        module = [k for k, m in enumerate(self.modules) for _ in range(m.rank)]
        live = [alive for m in self.modules for alive in m.live]
        if not self.config.revival:
            scores = [s if alive else -float("inf") for s, alive in zip(scores, live)]
        result = [False] * len(scores)
        for group, (initial, target) in enumerate(zip(self.full, self.targets)):
            mine = [i for i, k in enumerate(module) if self.groups[k] == group]
            amount = self.budget
            if len(self.targets) > 1:
                whole = {"initial": sum(self.full), "target": sum(self.targets)}
                amount = reference_share(amount, group_initial=initial, group_target=target, **whole)
            bounds = {"budget": amount, "floors": self.floors, "caps": self.caps}
            part = [scores[i] for i in mine], [module[i] for i in mine]
            if set(self.prices) == {1}:
                kept = reference_deal(*part, **bounds)
            else:
                kept = reference_buy(*part, prices=self.prices, **bounds)
            for i, stays in zip(mine, kept):
                result[i] = stays
        return result

    def prune(self, keep):
        """Take over a mask."""
        start = 0
        for m in self.modules:
            m.live = list(keep[start : start + m.rank])
            start += m.rank

    def zeroes(self):
        """Whether pruned triplets are held at zero after this step."""
        return self.allocates or not self.config.revival or self.step > self.end

    def pruned_weights(self, weights):
        """λ of the pruned triplets 0, or P's column where it carries λ."""
        result = []
        for m, parts in zip(self.modules, weights):
            parts = [t.clone() for t in parts]
            for i, alive in enumerate(m.live):
                if not alive:
                    parts[2 if m.own_lambda else 0][..., i] = 0
            result.append(parts)
        return result

    def removes(self):
        """Whether pruned triplets leave memory after this step."""
        config = self.config
        if not config.compact or not self.allocates:
            return False
        if self.step == self.end:
            return True
        done = Fraction(self.step - config.warmup, self.end - config.warmup)
        last = done - Fraction(config.allocation_interval, self.end - config.warmup)
        return any(last < Fraction(stage) <= done for stage in config.compact_at or ())

    def remove(self, weights):
        """Pruned triplets are gone, averages of the others go on; the weights that are left."""
        result = []
        for m, parts in zip(self.modules, weights):
            index = [i for i, alive in enumerate(m.live) if alive]
            m.averages.remove(m.live)
            m.live = [True] * len(index)
            result.append([t[..., index] if k != 1 else t[index] for k, t in enumerate(parts)] if index else [])
        return result


def product(parts, live):
    """P·Λ·Q of the live triplets."""
    P, Q, *rest = parts
    left = P * rest[0] if rest else P
    return left[:, live] @ Q[live]


def towards_orthonormal(V, *, rate):
    """A step of γR down its slope, but of a size at which no direction turns around or grows by more than half."""
    V = V.clone().requires_grad_()
    gap = V @ V.T - torch.eye(len(V), dtype=torch.float64)
    (slope,) = torch.autograd.grad(gap.square().sum(), V)
    return (V - min(rate, 0.25, 1 / float(gap.detach().norm() or 1.0)) / 8 * slope).detach()


def by_angles(V, *, rate, length=None):
    """The same for angles, as the longest vector weighs them. Then every vector is as long as it was, or, with a
    length that is wanted, a hundredth as strongly nearer to that."""
    lengths, V = V.norm(dim=1, keepdim=True), V.clone().requires_grad_()
    longest = lengths.max() ** 2
    gap = (V @ V.T) * (1 - torch.eye(len(V), dtype=torch.float64))
    (slope,) = torch.autograd.grad(gap.square().sum(), V)
    size = min(rate, 0.25, float(longest / gap.detach().norm().clamp_min(1e-300))) / 8
    moved = (V - size * slope / longest.clamp_min(1e-300)).detach()
    if length is not None:
        lengths = lengths / (1 + min(0.01 * rate / 2, 0.5) * ((lengths / length) ** 2 - 1))
    return moved * (lengths / moved.norm(dim=1, keepdim=True).clamp_min(1e-300))


def as_singular_vectors(parts, before, live, *, length):
    """Check that one layer's live triplets are the singular vectors of what they were before.

    Args:
        parts: P, Q and, where it is one, λ.
        before: The same before.
        live: Which triplets.
        length: Of Q's rows.
    """
    P, Q, *rest = [t[..., live] if k != 1 else t[live] for k, t in enumerate(parts)]
    close, eye = {"rtol": 1e-4, "atol": 1e-5}, torch.eye(len(Q), dtype=torch.float64)
    torch.testing.assert_close(product(parts, live), product(before, live), **close)
    singular = torch.linalg.svdvals(product(before, live))[: P.shape[1]]
    torch.testing.assert_close(Q @ Q.T, length**2 * eye, **close)
    if rest:
        torch.testing.assert_close(rest[0], singular, **close)
        torch.testing.assert_close(P.T @ P, eye, **close)
    else:
        torch.testing.assert_close(P.T @ P, torch.diag(singular.square()) / length**2, **close)


class Grouped(nn.Module):
    """Convolutions with groups in the middle."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 6)
        self.mix = nn.Conv1d(6, 8, 2, groups=2)
        self.deep = nn.Conv2d(4, 6, (2, 1), groups=2)
        self.out = nn.Linear(6, 3)

    def forward(self, words, *, extra=True):
        h = torch.tanh(self.mix(self.words(words).transpose(1, 2)))
        return self.out(torch.tanh(self.deep(h.unflatten(1, (4, 2)))).mean(dim=(2, 3)))


def layers_of(model, names, *, own_lambda, adapter="default"):
    """The oracle's view of the adapted layers, in the model's order."""
    found = dict(model.base_model.model.named_modules())
    return [Module(found[name], adapter, own_lambda) for name in names]


class Sometimes(nn.Module):
    """A layer of every kind whose triplets differ, and one that is left out in every third step."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 6)
        self.mix = nn.Conv1d(6, 4, 2)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, words, *, extra=True):
        h = torch.tanh(self.mix(self.words(words).transpose(1, 2)).mean(dim=2))
        h = h + torch.tanh(self.first(h))
        if extra:
            h = h + torch.tanh(self.second(h))
        return self.out(h)
