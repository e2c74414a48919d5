import numpy as np
import pytest
from PIL import Image

from ..small import vit
from ..tiny import make_recipe, run, write_rows


@pytest.fixture
def model(tmp_path):
    vit(tmp_path / "vit")
    return tmp_path / "vit"


def test_dark_is_told_from_light(model, tmp_path):
    noise = np.random.default_rng(0)
    rows = []
    for n in range(40):
        pixels = noise.integers(0, 100, (20, 24, 3)) + (150 if n % 2 else 0)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{n}.png")
        rows.append({"file": str(tmp_path / f"{n}.png"), "label": "light" if n % 2 else "dark"})
    recipe = make_recipe(
        tmp_path,
        model,
        task="image-classification",
        data={
            "files": write_rows(tmp_path / "rows.jsonl", rows),
            "columns": {"image": "file"},
            "test_fraction": 0.25,
        },
        training={"max_steps": 30, "batch_size": 8, "learning_rate": 1e-2, "length_grouping": True},
    )
    result = run(recipe)
    assert result.metrics["accuracy"] == 1
    modules = set(result.metrics["ranks"])
    assert modules
    assert not any("classifier" in name for name in modules)  # the head is trained whole, not by LoRA
