"""The recipes that come with the package, beside that each is valid (test_recipe.py)."""

import pytest

from adalora.tasks.recipe_files import catalogue, load_recipe

PAPER = [entry.name for entry in catalogue() if entry.name.startswith("paper/")]
ROWS = {
    "mnli": 392_702, "rte": 2_490, "qnli": 104_743, "mrpc": 3_668, "qqp": 363_846, "sst2": 67_349, "cola": 8_551,
    "stsb": 5_749, "squad": 87_599, "squad-v2": 130_319, "xsum": 204_045, "cnn-dailymail": 287_113,
}  # fmt: skip
GLUE = ("mnli", "rte", "qnli", "mrpc", "qqp", "sst2", "cola", "stsb")
# Task → batch, epochs, γ, t_i, ΔT, t_f, alpha of the paper's appendix.
SETTINGS = {
    "mnli": (32, 7, 0.1, 8000, 100, 50000, 16),
    "rte": (32, 50, 0.3, 600, 1, 1800, 32),
    "qnli": (32, 5, 0.1, 2000, 100, 8000, 32),
    "mrpc": (32, 30, 0.1, 600, 1, 1800, 32),
    "qqp": (32, 5, 0.1, 8000, 100, 25000, 16),
    "sst2": (32, 24, 0.1, 6000, 100, 22000, 16),
    "cola": (32, 25, 0.5, 800, 10, 3500, 32),
    "stsb": (32, 25, 0.1, 800, 10, 2000, 32),
    "squad": (16, 10, 0.1, 5000, 100, 25000, 16),
    "squad-v2": (16, 12, 0.1, 5000, 100, 50000, 16),
    "xsum": (64, 25, 0.1, 6000, 100, 50000, 32),
    "cnn-dailymail": (32, 15, 0.1, 5000, 100, 85000, 32),
}


def test_every_task_of_the_paper_is_there_at_every_budget():
    expected = {f"paper/{task}" for task in SETTINGS}
    expected |= {f"paper/{task}:{r}" for task in GLUE for r in ("r2", "r1")}
    expected |= {f"paper/{task}:{r}" for task in ("squad", "squad-v2") for r in ("r4", "r2", "r1")}
    expected |= {"paper/xsum:r8", "paper/xsum:r1", "paper/cnn-dailymail:r2"}
    assert set(PAPER) == expected


@pytest.mark.parametrize("name", PAPER)
def test_settings_are_the_papers(name):
    recipe = load_recipe(name)
    task = name.removeprefix("paper/").partition(":")[0]
    training, adalora = recipe.training, recipe.adalora
    assert (
        training.batch_size * training.gradient_accumulation,
        training.epochs,
        adalora.orthogonality_weight,
        adalora.warmup,
        adalora.allocation_interval,
        adalora.final,
        recipe.lora["lora_alpha"],
    ) == SETTINGS[task]
    assert (adalora.sensitivity_beta, adalora.uncertainty_beta, adalora.scale) == (0.85, 0.85, "initial")
    steps = training.epochs * ROWS[task] // SETTINGS[task][0]
    assert adalora.warmup + adalora.final < steps
    assert recipe.lora["r"] > adalora.target_rank


@pytest.mark.parametrize("name", PAPER)
def test_published_results_are_fractions_of_measured_metrics(name):
    published = load_recipe(name).published
    if published is None:
        assert name.endswith((":r1", ":r2", ":r8"))  # budgets of the released scripts alone
        return
    assert all(0.15 < value < 1 for value in [*published.metrics.values(), *published.lora.values()])
    assert set(published.lora) <= set(published.metrics)


@pytest.mark.parametrize(
    ("name", "metric", "adalora", "lora"),
    [
        ("paper/mnli", "accuracy", 0.9076, 0.9065),
        ("paper/cola:r2", "matthews", 0.7004, 0.6871),
        ("paper/cola:r1", "matthews", 0.7021, None),
        ("paper/stsb", "correlation", 0.9184, 0.9160),
        ("paper/squad:r1", "f1", 0.934, 0.928),
        ("paper/squad-v2", "exact_match", 0.860, 0.850),
        ("paper/xsum", "rouge1", 0.4472, 0.4395),
        ("paper/cnn-dailymail", "rouge2", 0.2083, 0.2063),
    ],
)
def test_published_numbers(name, metric, adalora, lora):
    published = load_recipe(name).published
    assert published.metrics[metric] == adalora
    assert published.lora.get(metric) == lora
