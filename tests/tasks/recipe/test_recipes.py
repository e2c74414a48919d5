"""The recipes that come with the package, beside that each is valid (test_recipe.py)."""

import pytest

from adalora.config import AdaLoraConfig
from adalora.tasks.recipe.files import catalogue, load_recipe

PAPER = [entry.name for entry in catalogue() if entry.name.startswith("paper/")]
ROWS = {
    "mnli": 392_702, "rte": 2_490, "qnli": 104_743, "mrpc": 3_668, "qqp": 363_846, "sst2": 67_349, "cola": 8_551,
    "stsb": 5_749, "squad": 87_599, "squad-v2": 130_319, "xsum": 204_045, "cnn-dailymail": 287_113,
}  # fmt: skip
GLUE = ("mnli", "rte", "qnli", "mrpc", "qqp", "sst2", "cola", "stsb")
# Task → batch, epochs, γ, t_i, ΔT, t_f, alpha, learning rate of the paper's appendix.
SETTINGS = {
    "mnli": (32, 7, 0.1, 8000, 100, 50000, 16, 5e-4),
    "rte": (32, 50, 0.3, 600, 1, 1800, 32, 1.2e-3),
    "qnli": (32, 5, 0.1, 2000, 100, 8000, 32, 1.2e-3),
    "mrpc": (32, 30, 0.1, 600, 1, 1800, 32, 1e-3),
    "qqp": (32, 5, 0.1, 8000, 100, 25000, 16, 5e-4),
    "sst2": (32, 24, 0.1, 6000, 100, 22000, 16, 8e-4),
    "cola": (32, 25, 0.5, 800, 10, 3500, 32, 5e-4),
    "stsb": (32, 25, 0.1, 800, 10, 2000, 32, 2.2e-3),
    "squad": (16, 10, 0.1, 5000, 100, 25000, 16, 1e-3),
    "squad-v2": (16, 12, 0.1, 5000, 100, 50000, 16, 1e-3),
    "xsum": (64, 25, 0.1, 6000, 100, 50000, 32, 5e-4),
    "cnn-dailymail": (32, 15, 0.1, 5000, 100, 85000, 32, 5e-4),
}
# What the paper is silent about, from the released scripts. GLUE's tasks → dropout of the head, weight decay, warm-up
# of the learning rate (steps, or a share of the run), tokens of a row, task, columns with the texts.
GLUE_SETTINGS = {
    "mnli": (0.15, 0, 1000, 256, "sentence-pair", ("premise", "hypothesis")),
    "rte": (0.2, 0.01, 200, 320, "sentence-pair", ("sentence1", "sentence2")),
    "qnli": (0.1, 0.01, 500, 512, "sentence-pair", ("question", "sentence")),
    "mrpc": (0.0, 0.01, 0.1, 320, "sentence-pair", ("sentence1", "sentence2")),
    "qqp": (0.15, 0.01, 2000, 320, "sentence-pair", ("question1", "question2")),
    "sst2": (0.0, 0.01, 1000, 128, "classification", ("sentence",)),
    "cola": (0.1, 0, 100, 64, "classification", ("sentence",)),
    "stsb": (0.2, 0.1, 100, 128, "regression", ("sentence1", "sentence2")),
}
# Data set, configuration, tokens of source and target, beams.
SUMMARY_SETTINGS = {
    "xsum": ("EdinburghNLP/xsum", None, 768, 64, 8),
    "cnn-dailymail": ("abisee/cnn_dailymail", "3.0.0", 1024, 160, 4),
}
# The paper adapts query, key, value, the attention's output and both layers of the feed-forward part.
DEBERTA = ["query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense"]  # "output.dense" is two
BART = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


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
        training.learning_rate,
    ) == SETTINGS[task]
    assert (adalora.sensitivity_beta, adalora.uncertainty_beta, adalora.scale) == (0.85, 0.85, "initial")
    assert (adalora.parametrization, adalora.orthogonality, adalora.score_weights) == ("svd", "squared", "before")
    steps = training.epochs * ROWS[task] // SETTINGS[task][0]
    assert adalora.warmup + adalora.final < steps
    assert recipe.lora["r"] > adalora.target_rank


def of_tasks(tasks):
    return pytest.mark.parametrize("name", [n for n in PAPER if n.removeprefix("paper/").partition(":")[0] in tasks])


@of_tasks(GLUE_SETTINGS)
def test_glues_tasks_are_those_of_the_released_scripts(name):
    recipe = load_recipe(name)
    task = name.removeprefix("paper/").partition(":")[0]
    dropout, weight_decay, lr_warmup, max_length, kind, columns = GLUE_SETTINGS[task]
    assert (recipe.model.name, recipe.model.config) == ("microsoft/deberta-v3-base", {"cls_dropout": dropout})
    training = recipe.training
    assert (training.weight_decay, training.lr_warmup, training.max_length) == (weight_decay, lr_warmup, max_length)
    assert (recipe.task.name, recipe.data.name, recipe.data.config) == (kind, "nyu-mll/glue", task)
    # The development set, as in the paper's table; nothing is chosen by it during training.
    development = "validation_matched" if task == "mnli" else "validation"
    assert recipe.data.splits == {"train": "train", "validation": None, "test": development}
    assert recipe.data.columns == {**dict(zip(("text", "text_pair"), columns)), "label": "label"}
    assert recipe.lora["target_modules"] == DEBERTA
    assert training.evaluate_every is None


@of_tasks(("squad", "squad-v2"))
def test_questions_are_those_of_the_released_script(name):
    recipe = load_recipe(name)
    version_2 = name.startswith("paper/squad-v2")
    assert (recipe.model.name, recipe.model.config) == ("microsoft/deberta-v3-base", {})
    assert (recipe.task.name, recipe.task.no_answer, recipe.task.stride) == ("question-answering", version_2, 128)
    training = recipe.training
    assert (training.weight_decay, training.lr_warmup, training.max_length) == (0, 1000, 384)
    assert recipe.data.name == ("rajpurkar/squad_v2" if version_2 else "rajpurkar/squad")
    assert recipe.data.splits == {"train": "train", "validation": None, "test": "validation"}
    assert recipe.lora["target_modules"] == DEBERTA


@of_tasks(SUMMARY_SETTINGS)
def test_summaries_are_those_of_the_released_scripts(name):
    recipe = load_recipe(name)
    dataset, config, source, target, beams = SUMMARY_SETTINGS[name.removeprefix("paper/").partition(":")[0]]
    assert (recipe.model.name, recipe.task.name, recipe.task.prefix) == ("facebook/bart-large", "seq2seq", "")
    assert (recipe.data.name, recipe.data.config, recipe.data.splits) == (dataset, config, {})
    training, generation = recipe.training, recipe.task.generation
    assert (training.weight_decay, training.lr_warmup, training.max_length) == (0, 3000, source)
    assert (recipe.task.max_target_length, generation.max_new_tokens, generation.num_beams) == (target, target, beams)
    assert (generation.length_penalty, generation.no_repeat_ngram) == (1, None)  # the checkpoint's own
    assert recipe.lora["target_modules"] == BART


@pytest.mark.parametrize("name", PAPER)
def test_the_method_is_the_papers_unless_the_preset_is_taken_away(name):
    recipe, own = load_recipe(name).adalora, load_recipe(name, overrides=["adalora.preset=null"]).adalora
    fields = own.to_dict()
    assert recipe == AdaLoraConfig.paper(**fields)
    assert own == AdaLoraConfig(**fields) != recipe


@pytest.mark.parametrize(
    ("name", "initial", "target"),
    [
        *[(f"paper/{task}:r1", 3 if task in ("mnli", "cola") else 2, 1) for task in GLUE],
        ("paper/squad-v2:r1", 2, 1),
        ("paper/xsum:r8", 12, 8),
        ("paper/cnn-dailymail:r2", 4, 2),
    ],
)
def test_ranks_are_those_of_the_released_scripts(name, initial, target):
    recipe = load_recipe(name)
    assert (recipe.lora["r"], recipe.adalora.target_rank) == (initial, target)


# CNN/DailyMail's script starts at twice its target.
@pytest.mark.parametrize("name", [name for name in PAPER if not name.endswith((":r1", "dailymail:r2"))])
def test_other_budgets_start_at_one_and_a_half_of_the_target(name):
    recipe = load_recipe(name)
    assert recipe.lora["r"] == max(2, round(1.5 * recipe.adalora.target_rank))


@pytest.mark.parametrize("name", PAPER)
def test_published_results_are_fractions_of_measured_metrics(name):
    published = load_recipe(name).published
    if published is None:
        assert name.endswith((":r1", ":r2", ":r8"))  # budgets of the released scripts alone
        return
    assert all(0.15 < value < 1 for value in [*published.metrics.values(), *published.lora.values()])
    assert set(published.lora) <= set(published.metrics)


# The paper's tables: task → (AdaLoRA, LoRA) at each budget, in percent.
TABLES = {
    "": {
        "mnli": (90.76, 90.65), "sst2": (96.10, 94.95), "cola": (71.45, 69.82), "qqp": (92.23, 91.99),
        "qnli": (94.55, 93.87), "rte": (88.09, 85.20), "mrpc": (90.69, 89.95), "stsb": (91.84, 91.60),
        "squad": ((87.6, 93.7), (86.7, 93.1)), "squad-v2": ((86.0, 88.9), (85.0, 88.0)),
        "xsum": ((44.72, 21.46, 36.46), (43.95, 20.72, 35.68)),
        "cnn-dailymail": ((43.94, 20.83, 40.96), (43.68, 20.63, 40.71)),
    },
    ":r4": {"squad": ((87.5, 93.7), (86.7, 93.1)), "squad-v2": ((85.5, 88.6), (84.5, 87.4))},
    ":r2": {
        "mnli": (90.66, 90.30), "sst2": (95.80, 94.95), "cola": (70.04, 68.71), "qqp": (91.78, 91.61),
        "qnli": (94.49, 94.03), "rte": (87.36, 85.56), "mrpc": (90.44, 89.71), "stsb": (91.63, 91.68),
        "squad": ((87.5, 93.6), (86.6, 92.9)), "squad-v2": ((85.7, 88.8), (83.6, 86.7)),
    },
    ":r1": {
        "sst2": (95.52, None), "cola": (70.21, None),
        "squad": ((87.2, 93.4), (86.4, 92.8)), "squad-v2": ((85.6, 88.7), (84.7, 87.5)),
        "xsum": ((43.29, 19.95, 35.04), (42.81, 19.68, 34.73)),
    },
}  # fmt: skip
NUMBERS = [(f"paper/{task}{budget}", *pair) for budget, table in TABLES.items() for task, pair in table.items()]


def metrics_of(task, value):
    """The names that a run gives what the paper's tables hold."""
    if value is None:
        return {}
    values = value if isinstance(value, tuple) else (value,)
    by_task = {"cola": ["matthews"], "stsb": ["correlation"]}
    for name in ("squad", "squad-v2"):
        by_task[name] = ["exact_match", "f1"]
    for name in ("xsum", "cnn-dailymail"):
        by_task[name] = ["rouge1", "rouge2", "rougeLsum"]
    names = by_task.get(task, ["accuracy"])
    return {name: pytest.approx(value / 100) for name, value in zip(names, values, strict=True)}


@pytest.mark.parametrize(("name", "adalora", "lora"), NUMBERS)
def test_published_numbers_are_the_papers(name, adalora, lora):
    task = name.removeprefix("paper/").partition(":")[0]
    published = load_recipe(name).published
    assert published.metrics == metrics_of(task, adalora)
    assert published.lora == metrics_of(task, lora)


def test_no_other_recipe_claims_a_number():
    claiming = {entry.name for entry in catalogue() if load_recipe(entry.name).published is not None}
    assert claiming == {name for name, *_ in NUMBERS}
