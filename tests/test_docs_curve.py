"""docs/budget-curve.md holds the numbers of benchmarks/results/nested.json."""

import json
import re
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]


def test_the_table_is_the_measurement():
    found = json.loads((ROOT / "benchmarks" / "results" / "nested.json").read_text())
    text = (ROOT / "docs" / "budget-curve.md").read_text()
    rows = re.findall(r"\| (\d+) % \| ([\d.]+) ± ([\d.]+) \| ([\d.]+) ± ([\d.]+) \|", text)
    budgets = [point["budget"] for point in found["runs"][0]["curves"]["score"]]
    assert [int(row[0]) for row in rows] == [round(100 * b) for b in budgets]
    for at, row in enumerate(rows):
        for nested, (mean, deviation) in zip((False, True), (row[1:3], row[3:5])):
            mine = [r["curves"]["score"][at]["accuracy"] for r in found["runs"] if r["nested"] == nested]
            assert float(mean) == round(float(np.mean(mine)), 3)
            assert float(deviation) == round(float(np.std(mine, ddof=1)), 3)
    settings = found["settings"]
    assert f"{settings['test_rows']} held-out digits" in text
    assert f"over {settings['seeds']} seeds" in text
    own = found["trained_at_the_budget"]
    means = [np.mean([r["accuracy"] for r in own if r["budget"] == budget]) for budget in (0.2, 0.4, 0.6)]
    assert "reach {:.3f}, {:.3f} and\n{:.3f}.".format(*means) in text
