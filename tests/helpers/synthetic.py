"""Histories as a training would write them: scores of every triplet evolve, a budget cuts them.

The numbers hang together as in a real run: ranks add up to `live`, the threshold is the smallest kept score,
`pruned` and `revived` are what changed between two masks, the histogram counts every triplet.
"""

from __future__ import annotations

import numpy as np

from adalora.report.history import History

BERT = {
    "attention.self.query": (384, 384),
    "attention.self.key": (384, 384),
    "attention.self.value": (384, 384),
    "attention.output.dense": (384, 384),
    "intermediate.dense": (1536, 384),
    "output.dense": (384, 1536),
}
LLAMA = {
    "self_attn.q_proj": (512, 512),
    "self_attn.k_proj": (128, 512),
    "self_attn.v_proj": (128, 512),
    "self_attn.o_proj": (512, 512),
    "mlp.gate_proj": (1408, 512),
    "mlp.up_proj": (1408, 512),
    "mlp.down_proj": (512, 1408),
}


def modules_of(layers, types, rank, prefix="base_model.model.bert.encoder.layer"):
    return [
        {
            "name": f"{prefix}.{layer}.{kind}",
            "kind": "Linear",
            "d_out": d_out,
            "d_in": d_in,
            "rank": rank,
            "parameters_per_triplet": d_out + d_in,
        }
        for layer in range(layers)
        for kind, (d_out, d_in) in types.items()
    ]


def importance_of(layers, types):
    """Late layers and the feed-forward matter most, early queries and keys least."""
    weight = np.array([3.0 if d_out != d_in else 1.0 for d_out, d_in in types.values()])
    weight[:2] *= 0.4
    depth = np.linspace(0.3, 2.0, layers)
    return (depth[:, None] * weight[None, :]).ravel()


class Run:
    """Make one synthetic history; every knob has an effect a diagnostic looks for."""

    def __init__(
        self,
        *,
        path=None,
        layers=6,
        types=BERT,
        rank=12,
        target=8,
        steps=400,
        warmup=0.12,
        final=0.48,
        interval=5,
        seed=0,
        importance=None,
        score_noise=0.02,
        loss_end=0.3,
        loss_after_masks=0.0,
        orthogonality=0.002,
        dead_modules=(),
        update_ratio=0.01,
        finish=True,
        stop_at=None,
        metrics=True,
        model="minilm-l6",
        prefix="base_model.model.bert.encoder.layer",
    ):
        self.random = np.random.default_rng(seed)
        self.history = History(path)
        self.modules = modules_of(layers, types, rank, prefix)
        self.count, self.rank, self.steps = len(self.modules), rank, steps
        self.first_budget, self.target = self.count * rank, int(self.count * target)
        self.warmup, self.decrease_end = int(warmup * steps), steps - int(final * steps)
        self.interval, self.stop_at = interval, steps if stop_at is None else stop_at
        importance = importance_of(layers, types) if importance is None else np.asarray(importance)
        decay = np.exp(-np.arange(rank) / 4)
        jitter = np.exp(0.3 * np.random.default_rng(1000 + seed).standard_normal((self.count, rank)))
        self.importance = 1e-5 * importance[:, None] * decay * jitter
        self.importance[list(dead_modules)] = 0
        self.dead = list(dead_modules)
        self.noise, self.loss_end, self.loss_after_masks = score_noise, loss_end, loss_after_masks
        self.orthogonality, self.update_ratio, self.metrics = orthogonality, update_ratio, metrics
        self.model, self.finish = model, finish
        self.mask = np.ones((self.count, rank), bool)
        self.allocations = 0
        self.write()

    def budget(self, step):
        if step < self.warmup:
            return self.first_budget
        if step >= self.decrease_end:
            return self.target
        left = 1 - (step - self.warmup) / (self.decrease_end - self.warmup)
        return int(self.target + (self.first_budget - self.target) * left**3)

    def phase(self, step):
        return "warmup" if step < self.warmup else "decrease" if step < self.decrease_end else "final"

    def ranks(self):
        return self.mask.sum(1).tolist()

    def loss(self, step):
        base = self.loss_end + (1.1 - self.loss_end) * np.exp(-6 * step / self.steps)
        harm = self.loss_after_masks * (self.first_budget - self.budget(step)) / self.first_budget
        return float(base + harm + 0.03 * self.random.standard_normal())

    def allocate(self, step):
        scores = self.importance * np.exp(self.noise * self.random.standard_normal(self.importance.shape))
        budget, flat = self.budget(step), scores.ravel()
        order = np.argsort(-flat, kind="stable")
        mask = np.zeros(flat.size, bool)
        mask[order[:budget]] = True
        mask = mask.reshape(scores.shape)
        revived, pruned = mask & ~self.mask, self.mask & ~mask
        self.mask, self.allocations = mask, self.allocations + 1
        positive = flat[flat > 0]
        edges = np.linspace(np.log10(positive.min()), np.log10(positive.max()), 33)
        histogram = np.histogram(np.clip(np.log10(np.maximum(flat, 1e-300)), edges[0], edges[-1]), edges)[0]
        threshold = float(flat[order[budget - 1]])
        quantiles = np.quantile(flat, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
        self.add(
            "allocation",
            step=step,
            phase=self.phase(step),
            budget=budget,
            live=int(mask.sum()),
            threshold=threshold,
            pruned=int(pruned.sum()),
            revived=int(revived.sum()),
            ranks=self.ranks(),
            scores={
                **dict(zip(("min", "q05", "q25", "q50", "q75", "q95", "max"), quantiles.tolist())),
                "histogram": histogram.tolist(),
                "edges_log10": edges.tolist(),
                "below_threshold": int((flat < threshold).sum()),
            },
            module_scores=scores.sum(1).tolist(),
            orthogonality=float(self.orthogonality * np.exp(0.1 * self.random.standard_normal())),
            update_ratio=self.update_ratio,
            skipped_steps=0,
        )

    def add(self, event, **fields):
        fields.setdefault("seconds", round(0.05 * fields.get("step", 0), 3))
        self.history.add(event, **fields)

    def write(self):
        self.add(
            "start",
            version="0.1.0",
            versions={"python": "3.11.9", "torch": "2.13.0", "peft": "0.21.2", "transformers": "5.23.0"},
            machine={"device": "cpu", "processor": "x86_64", "threads": 2},
            config={"target_rank": self.target / self.count, "warmup": 0.12, "final": 0.48, "seed": 0},
            model=self.model,
            total_steps=self.steps,
            warmup_steps=self.warmup,
            decrease_end=self.decrease_end,
            initial_budget=self.first_budget,
            target_budget=self.target,
            modules=self.modules,
        )
        for step in range(self.stop_at):
            self.add(
                "step",
                step=step,
                phase=self.phase(step),
                budget=self.budget(step),
                live=int(self.mask.sum()),
                loss=self.loss(step),
                learning_rate=1e-3 * (1 - step / self.steps),
            )
            if step == self.warmup - 1:
                self.add("handover", step=step, ranks=self.ranks(), update_ratio=self.update_ratio)
            if self.warmup < step < self.decrease_end and (step - self.warmup) % self.interval == 0:
                self.allocate(step)
            if step == self.decrease_end:
                self.allocate(step)
                self.compact(step)
            if self.metrics and step and step % max(1, self.steps // 8) == 0:
                accuracy = 0.88 - 0.3 * np.exp(-5 * step / self.steps)
                self.add(
                    "metric",
                    step=step,
                    split="dev",
                    values={"accuracy": accuracy, "macro_f1": accuracy - 0.04},
                )
        if self.finish and self.stop_at == self.steps:
            self.end()

    def parameters(self, ranks):
        return sum(r * m["parameters_per_triplet"] for r, m in zip(ranks, self.modules))

    def compact(self, step):
        before, after = self.parameters([self.rank] * self.count), self.parameters(self.ranks())
        self.add(
            "compaction", step=step, ranks=self.ranks(), parameters_before=before, parameters_after=after,
            bytes_before=4 * before, bytes_after=4 * after,
            optimizer_bytes_before=8 * before, optimizer_bytes_after=8 * after,
        )  # fmt: skip

    def end(self):
        values = [
            np.sort(0.5 * np.sqrt(scores[kept] * 1e5))[::-1].tolist()
            for scores, kept in zip(self.importance, self.mask)
        ]
        self.add(
            "finish",
            step=self.steps,
            ranks=self.ranks(),
            singular_values=values,
            orthogonality=self.orthogonality,
            seconds=0.05 * self.steps,
            allocations=self.allocations,
        )


def run(**knobs):
    return Run(**knobs).history
