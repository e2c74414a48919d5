"""What `nested` costs and gains: one training with it and one without, cut to every budget, over seeds.

    python benchmarks/nested.py --seeds 3 --steps 240 --out benchmarks/results/nested.json

MiniLM-L6 on airline tweets, LoRA r=12 on all linear layers, target rank 4. Both runs of a seed differ in `nested`
alone.
"""

from __future__ import annotations

import io
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.console import Console

from adalora.report.curves import plot_curve
from adalora.tasks.curve import budget_curve
from adalora.tasks.recipe_files import load_recipe
from adalora.tasks.runner import run_recipe

BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)


def measure(folder: Path, *, nested: bool, seed: int, steps: int, rows: int) -> dict[str, Any]:
    changes = {
        "output": str(folder),
        "training.max_steps": steps,
        "training.seed": seed,
        "adalora.target_rank": 4,
        "adalora.nested": nested,
        "data.limit.test": rows,
    }
    recipe = load_recipe("airline-sentiment", overrides=[f"{name}={json.dumps(v)}" for name, v in changes.items()])
    run_recipe(recipe, console=Console(file=io.StringIO()))
    curves = {order: budget_curve(folder, order=order, budgets=BUDGETS) for order in ("score", "energy")}
    return {
        "nested": nested,
        "seed": seed,
        "curves": {
            order: [{"budget": p.budget, "parameters": p.parameters, **p.scores} for p in curve.points]
            for order, curve in curves.items()
        },
    }


def main(
    seeds: int = 3, steps: int = 240, rows: int = 1500, out: Path = Path("benchmarks/results/nested.json")
) -> None:
    """Train, cut, measure, write."""
    runs: list[dict[str, Any]] = []
    for seed in range(seeds):
        for nested in (False, True):
            with tempfile.TemporaryDirectory() as work:
                runs.append(measure(Path(work) / "run", nested=nested, seed=seed, steps=steps, rows=rows))
            print(seed, nested, [round(p["macro_f1"], 3) for p in runs[-1]["curves"]["score"]], flush=True)
            write(runs, out, settings={"steps": steps, "test_rows": rows, "target_rank": 4})


def write(runs: list[dict[str, Any]], out: Path, *, settings: dict[str, int]) -> None:
    packages = ("adalora", "torch", "peft", "transformers")
    machine = {"cpu": platform.machine(), "system": platform.system(), "python": platform.python_version()}
    versions = {name: version(name) for name in packages}
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {"settings": settings, "machine": machine, "versions": versions, "runs": runs}
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    curves = {}
    for nested in (False, True):
        for order in ("score", "energy"):
            mine = [r["curves"][order] for r in runs if r["nested"] == nested]
            if mine:
                points = zip(*mine)
                curves[f"{'nested' if nested else 'usual'}, cut by {order}"] = [
                    (float(np.mean([q["parameters"] for q in p])), float(np.mean([q["macro_f1"] for q in p])))
                    for p in points
                ]
    figure = plot_curve(curves, metric="macro_f1", split=f"test, mean of {max(1, len(runs) // 2)} seeds")
    figure.savefig(out.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    typer.run(main)
