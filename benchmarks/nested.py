"""What `nested` costs and gains: one training with it and one without, cut to every budget, over seeds.

    python benchmarks/nested.py --seeds 5 --out benchmarks/results/nested.json

A network that reads handwritten digits (scikit-learn's 1,797 scans, 8×8) learns to read them turned by 90 degrees: LoRA
r=8 on its four layers, target rank 3. Both runs of a seed differ in `nested` alone; trainings at three
smaller budgets are there to compare with. About a minute on an idle core.
"""

from __future__ import annotations

import copy
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import adalora
from adalora.export import read_adapter
from adalora.export.compression import score_with
from adalora.export.ordered import TripletOrder, cut_by, energy_order
from adalora.report.figures.budget_curve import plot_curve
from adalora.tasks.runs.curve import recorded_order

TRAINED = (0.2, 0.4, 0.6)  # budgets that a training of its own is made at, to compare with
BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
WIDTH, BATCH = 128, 64
Data = tuple[Tensor, Tensor]


def digits() -> tuple[Data, Data, Data, Data]:
    """Upright digits to train the base on; turned ones to adapt to and, apart, to measure on."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32")
    turned = np.rot90(images.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64).copy()
    rows, held_out = train_test_split(np.arange(len(labels)), test_size=0.4, random_state=0, stratify=labels)
    label = torch.tensor(labels)
    x, y = torch.tensor(images), torch.tensor(turned)
    return (
        (x[rows], label[rows]),
        (x[held_out], label[held_out]),
        (y[rows], label[rows]),
        (y[held_out], label[held_out]),
    )


def fit(model: nn.Module, data: Data, *, steps: int, learning_rate: float) -> None:
    """Train what is trainable, with a learning rate that falls to zero."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        rows = torch.randint(0, len(data[0]), (BATCH,))
        loss = nn.functional.cross_entropy(model(data[0][rows]), data[1][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()


def accuracy(model: nn.Module, data: Data) -> float:
    """Share of right answers."""
    with torch.no_grad():
        return float((model(data[0]).argmax(-1) == data[1]).float().mean())


def measure(
    base: nn.Module, train: Data, test: Data, *, nested: bool, seed: int, steps: int, share: float = 1.0
) -> dict[str, Any]:
    """One training, cut to all budgets in two orders; below a `share` of 1 trained at that budget, and not cut."""
    torch.manual_seed(seed)
    layers = [str(n) for n in (0, 2, 4, 6)]
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, lora_alpha=8, target_modules=layers))
    controller = adalora.attach(model, target_rank=3 * share, total_steps=steps, nested=nested, seed=seed)
    fit(model, train, steps=steps, learning_rate=5e-3)
    controller.finalize()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        adapter = read_adapter(folder)
    recorded = recorded_order(controller.history, adapter)
    assert recorded is not None
    orders: list[TripletOrder] = [recorded, energy_order(adapter)]
    curves = {}
    for order in orders:
        cuts = [(budget, cut_by(adapter, budget, order)) for budget in (BUDGETS if share == 1 else (1.0,))]
        curves[order.name] = [
            {
                "budget": budget,
                "parameters": cut.parameters_after,
                "accuracy": score_with(copy.deepcopy(base), cut.adapter, lambda m: accuracy(m.eval(), test)),
            }
            for budget, cut in cuts
        ]
    return {"nested": nested, "seed": seed, "curves": curves}


def main(seeds: int = 5, steps: int = 800, out: Path = Path("benchmarks/results/nested.json")) -> None:
    """Train, cut, measure, write."""
    upright, upright_test, train, test = digits()
    torch.manual_seed(0)
    parts: list[nn.Module] = [nn.Linear(64, WIDTH), nn.ReLU()]
    parts += [nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)]
    base = nn.Sequential(*parts)
    fit(base, upright, steps=1500, learning_rate=2e-3)
    before = {"upright": accuracy(base, upright_test), "turned": accuracy(base, test)}
    runs = [
        measure(base, train, test, nested=nested, seed=seed, steps=steps)
        for seed in range(seeds)
        for nested in (False, True)
    ]
    trained = []
    for budget in TRAINED:
        for seed in range(seeds):
            run = measure(base, train, test, nested=False, seed=seed, steps=steps, share=budget)
            trained.append({**run["curves"]["score"][-1], "budget": budget, "seed": seed})
        print(f"trained at {budget:.0%}", np.mean([r["accuracy"] for r in trained if r["budget"] == budget]))
    result = {
        "settings": {"steps": steps, "seeds": seeds, "target_rank": 3, "test_rows": len(test[0])},
        "machine": {"cpu": platform.machine(), "system": platform.system(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("adalora", "torch", "peft", "scikit-learn")},
        "accuracy_of_the_base": before,
        "runs": runs,
        "trained_at_the_budget": trained,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(runs, out.with_suffix(".png"))


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Print and draw the means over seeds."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for nested in (False, True):
        for order in ("score", "energy"):
            mine = [r["curves"][order] for r in runs if r["nested"] == nested]
            values = np.array([[p["accuracy"] for p in curve] for curve in mine])
            sizes = np.array([[p["parameters"] for p in curve] for curve in mine]).mean(0)
            name = f"{'nested' if nested else 'usual'}, cut by {order}"
            curves[name] = list(zip(sizes.tolist(), values.mean(0).tolist()))
            cells = [f"{m:.3f} ±{s:.3f}" for m, s in zip(values.mean(0), values.std(0, ddof=1))]
            print(f"{name:24s}", *cells)
    figure = plot_curve(curves, metric="accuracy", split=f"held-out digits, {len(runs) // 2} seeds")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
