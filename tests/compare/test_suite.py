import pytest

from adalora.compare.cells import cells_of_rate
from adalora.compare.suite import Rate
from adalora.errors import RecipeError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["lorra"], "baseline": "lorra"}, "did you mean 'lora'"),
        ({"baseline": "dora"}, "baseline='dora' is not among methods: lora, ours"),
        ({"steps": None}, "moods needs steps"),
        ({"seeds": [1, 1]}, "seeds: 1 comes twice"),
        ({"learning_rates": [0.0]}, "0.0 must be above 0"),
        ({"methods": ["lora", {"name": "ours", "learning_rates": [-1.0]}]}, "-1.0 must be above 0"),
        ({"head_learning_rates": [0.1]}, "head_learning_rates"),
        ({"learnin_rates": [1.0]}, "did you mean 'learning_rates'"),
        (
            {"methods": ["lora", {"name": "x", "base": "lora", "adalora": {"importance": "ratio"}}]},
            "base: svd-lora, random, ours",
        ),
        ({"methods": ["lora", {"name": "x", "base": "svd-lora", "start": 2}]}, "start=2 needs base: random, ours"),
        ({"methods": ["lora", {"name": "x", "base": "ours", "start": 2, "lora": {"r": 4}}]}, "leave one of them out"),
        ({"methods": ["lora", {"name": "x", "base": "ours", "start": 0.5}]}, "greater than or equal to 1"),
        ({"methods": ["lora", {"name": "ours", "rate_of": "lore"}]}, "rate_of='lore'; methods to follow: lora"),
        ({"methods": ["lora", "head", {"name": "ours", "rate_of": "head"}]}, "methods to follow: lora"),
        ({"tasks": ["no-such-recipe"]}, "no-such-recipe"),
    ],
)
def test_wrong_fields_are_named_with_what_is_allowed(make_suite, changes, message):
    with pytest.raises(RecipeError, match=message):
        make_suite(**changes)


def test_a_start_is_a_multiple_of_each_budget(make_suite):
    suite = make_suite(methods=["lora", {"name": "double", "base": "ours", "start": 2}], budgets=[1, 3])
    (_, double) = suite.methods
    cells = [cells_of_rate(suite, suite.tasks[0], budget, double, rate=Rate(0.1))[0] for budget in (1, 3)]
    assert [cell.recipe["lora"]["r"] for cell in cells] == [2, 6]
    assert [cell.recipe["adalora"]["target_rank"] for cell in cells] == [1, 3]


def test_a_suite_s_start_is_that_of_the_methods_that_allocate_and_have_none(make_suite):
    methods = [
        "lora",
        "ours",
        {"name": "double", "base": "ours", "start": 2},
        {"name": "five", "base": "ours", "lora": {"r": 5}},
        "svd-lora",
        "peft-adalora",
    ]
    suite = make_suite(methods=methods, budgets=[2], start=3)
    cells = [cells_of_rate(suite, suite.tasks[0], 2, method, rate=Rate(0.1))[0] for method in suite.methods]
    assert [cell.recipe["lora"]["r"] for cell in cells] == [2, 6, 4, 5, 2, 3]


def test_rates_of_a_task_are_above_0(make_suite, recipe_file):
    with pytest.raises(RecipeError, match=r"0\.0 must be above 0"):
        make_suite(tasks=[{"recipe": str(recipe_file), "learning_rates": [0.0]}])


@pytest.mark.parametrize(
    ("rates", "message"),
    [([-0.1], "-0.1 must be above 0"), ([None, 0.1, 0.1], "head_learning_rates: 0.1 comes twice"), ([], "at least 1")],
)
def test_rates_of_the_head_are_a_task_s_and_above_0(make_suite, recipe_file, rates, message):
    with pytest.raises(RecipeError, match=message):
        make_suite(tasks=[{"recipe": str(recipe_file), "head_learning_rates": rates}])


def test_a_method_s_grid_for_the_head_comes_before_the_task_s(make_suite, recipe_file):
    methods = ["lora", {"name": "head", "head_learning_rates": [0.3, None]}, {"name": "ours", "rate_of": "lora"}]
    suite = make_suite(
        tasks=[{"recipe": str(recipe_file), "head_learning_rates": [0.1]}], methods=methods, learning_rates=[0.01]
    )
    found = [suite.rates(suite.tasks[0], method) for method in suite.methods]
    assert found == [[Rate(0.01, 0.1)], [Rate(0.01, 0.3), Rate(0.01, None)], [Rate(0.01, 0.1)]]


@pytest.mark.parametrize("grid", ["learning_rates", "head_learning_rates"])
def test_a_grid_beside_rate_of_is_refused(make_suite, grid):
    with pytest.raises(RecipeError, match=f"method 'ours': {grid} has no effect beside rate_of; leave one of them out"):
        make_suite(methods=["lora", {"name": "ours", "rate_of": "lora", grid: [0.1]}])


def test_unknown_override_of_a_recipe_is_refused(make_suite, recipe_file):
    with pytest.raises(RecipeError, match="batch_size"):
        make_suite(tasks=[{"recipe": str(recipe_file), "set": {"training.batch_sise": 4}}])
