"""What the authors' released code does to a model, written down from its behaviour: an oracle beside PEFT's AdaLoRA.

Budgets, thresholds and moving averages are its arithmetic; each comment names a choice of it that is not the paper's.
"""

import torch
from torch import nn


class Adapted(nn.Module):
    """A frozen Linear with P (out × r), λ (r) and Q (r × in) beside it."""

    def __init__(self, base, r, alpha):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.P = nn.Parameter(torch.randn(base.out_features, r, dtype=base.weight.dtype) * 0.02)
        self.weights = nn.Parameter(torch.zeros(r, dtype=base.weight.dtype))
        self.Q = nn.Parameter(torch.randn(r, base.in_features, dtype=base.weight.dtype) * 0.02)
        self.scale = alpha / (r + 1e-5)  # the initial rank for ever, and the small number

    def forward(self, x):
        return self.base(x) + x @ (self.Q * self.weights[:, None]).T @ self.P.T * self.scale


def regulariser(layers):
    """The mean of unsquared Frobenius norms over all P and all Q."""
    norms = []
    for layer in layers:
        for gram in (layer.P.T @ layer.P, layer.Q @ layer.Q.T):
            norms.append((gram - torch.eye(len(gram), dtype=gram.dtype)).square().sum().sqrt())
    return sum(norms) / len(norms)


class Allocator:
    """Called after each optimizer step, while the gradients of that step are still there."""

    def __init__(self, layers, *, target, warmup, final, interval, total, beta=0.85):
        self.layers, self.target, self.interval, self.beta = layers, target, interval, beta
        self.warmup, self.end = warmup, total - final
        self.full = sum(len(layer.weights) for layer in layers)
        self.sensitivity = [[torch.zeros_like(p) for p in layer.parameters() if p.requires_grad] for layer in layers]
        self.uncertainty = [[torch.zeros_like(p) for p in layer.parameters() if p.requires_grad] for layer in layers]

    def scores(self):
        """S of each layer's triplets: λ's own, plus the means over a column of P and a row of Q."""
        for averages, deviations in zip(self.sensitivity, self.uncertainty):
            P, weights, Q = (a * d for a, d in zip(averages, deviations))
            yield weights + P.mean(dim=0) + Q.mean(dim=1)

    def budget(self, step):
        """Triplets that may live, and whether the threshold is applied at this step."""
        if step <= self.warmup:
            return self.full, False
        if step > self.end:
            return self.target, True  # with scores that stand still: the same triplets every time
        left = 1 - (step - self.warmup) / (self.end - self.warmup)
        return int(self.target + (self.full - self.target) * left**3), step % self.interval == 0

    @torch.no_grad()
    def __call__(self, step):
        """One step; the budget and which triplets are above the threshold, None where it is not applied."""
        if step < self.end:
            for layer, averages, deviations in zip(self.layers, self.sensitivity, self.uncertainty):
                for p, average, deviation in zip((layer.P, layer.weights, layer.Q), averages, deviations):
                    product = (p * p.grad).abs()  # the weight as the optimizer has left it
                    average.mul_(self.beta).add_(product, alpha=1 - self.beta)
                    deviation.mul_(self.beta).add_((product - average).abs(), alpha=1 - self.beta)
        budget, applied = self.budget(step)
        if not applied:
            return budget, None
        scores = list(self.scores())
        threshold = torch.cat(scores).sort().values[self.full - budget - 1]
        masks = [score > threshold for score in scores]  # a tie with the threshold goes too
        for layer, mask in zip(self.layers, masks):
            layer.weights[~mask] = 0
        return budget, [mask.tolist() for mask in masks]
