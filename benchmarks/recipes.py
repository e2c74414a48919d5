"""Trains recipes of the catalogue to their end, as `adalora train NAME` does, and writes down what they reach.

    python -m benchmarks.recipes [NAME ...]

Without names: those whose model and data this machine can have without the hub. A recipe that stands in the results is
not run again; the table of docs/recipes.md is made anew each time. Data comes from ADALORA_DATA.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from adalora.compare.running import machine, versions
from adalora.tasks.recipe.files import load_recipe
from adalora.tasks.runs.runner import run_recipe
from benchmarks import pages

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "recipes.jsonl"
PAGE = ROOT / "docs" / "recipes.md"
NAMES = ("airline-sentiment", "banking77:package", "stsb:package", "embedding-squad:package", "squad2-half:package")
# At most this many scores of one recipe stand in the table.
SHOWN = 3


def measure(name: str) -> dict[str, Any]:
    """Train one recipe in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = run_recipe(load_recipe(name, overrides=[f"output={folder}/run"])).metrics
    kept = ("task", "main_metric", "scores", "evaluated_on", "steps", "seconds", "adapter_parameters")
    ranks = ("initial_rank_total", "final_rank_total")
    return {
        "recipe": name,
        **{key: metrics[key] for key in (*kept, *ranks)},
        "machine": machine(),
        "versions": versions(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for people; the recipe's main score first."""
    lines = ["| recipe | scores | of | ranks in all | steps | minutes |", "| --- | --- | --- | --- | --- | --- |"]
    for row in sorted(rows, key=lambda row: row["recipe"]):
        names = sorted(row["scores"], key=lambda name: name != row["main_metric"])[:SHOWN]
        scores = ", ".join(f"{name.replace('_', ' ')} {row['scores'][name]:.3f}" for name in names)
        ranks = f"{row['initial_rank_total']} → {row['final_rank_total']}"
        lines.append(
            f"| `{row['recipe']}` | {scores} | {row['evaluated_on']} | {ranks} | {row['steps']:,} "
            f"| {row['seconds'] / 60:.0f} |"
        )
    return "\n".join(lines)


def read() -> list[dict[str, Any]]:
    """What was measured so far."""
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()] if RESULTS.exists() else []


def main() -> None:
    """Run what is missing, and write the table."""
    for name in sys.argv[1:] or NAMES:
        if name not in {row["recipe"] for row in read()}:
            row = measure(name)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    pages.put(PAGE, "recipes", table(read()))


if __name__ == "__main__":
    main()
