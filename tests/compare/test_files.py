import json

import pytest

from adalora.compare.files import load_suite
from adalora.errors import RecipeError
from adalora.tasks.recipe.files import catalogue_folder


@pytest.fixture
def write(tmp_path, recipe_file):
    """Writes a suite as it stands: nothing is added."""
    base = {
        "tasks": [{"recipe": str(recipe_file), "name": "moods", "steps": 6}],
        "methods": ["lora", "ours"],
        "learning_rates": [0.01],
        "seeds": [1, 2],
        "budgets": [2],
        "description": "The first",
    }

    def write(name, **fields):
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps(fields or base))
        return file

    return write


def test_a_suite_has_what_it_leaves_out_from_the_one_that_it_extends(write):
    base = load_suite(write("base"))
    suite = load_suite(write("more", extends="base.yaml", methods=["lora", "head"], seeds=[3]))
    assert [method.name for method in suite.methods] == ["lora", "head"]
    assert (suite.seeds, suite.budgets, suite.learning_rates) == ([3], [2], [0.01])
    assert suite.tasks == base.tasks


def test_name_description_and_folder_are_never_another_suite_s(write):
    write("base")
    suite = load_suite(write("more", extends="base.yaml"))
    assert (suite.name, suite.description, suite.output) == ("more", "", "runs/compare-more")


def test_extending_goes_on_through_several_and_finds_those_of_the_package(write):
    write("middle", extends="smoke", seeds=[7])
    suite = load_suite(write("last", extends="middle.yaml", budgets=[3]))
    smoke = load_suite("smoke")
    assert (suite.seeds, suite.budgets, suite.tasks) == ([7], [3], smoke.tasks)


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ("smok", r"more\.yaml: extends: suite 'smok': unknown; did you mean 'smoke'"),
        ("more.yaml", r"more\.yaml: extends: extends='more\.yaml' leads back"),
        (3, r"more\.yaml: extends: suite '3': unknown"),
    ],
)
def test_what_cannot_be_extended_is_named(write, extends, message):
    with pytest.raises(RecipeError, match=message):
        load_suite(write("more", extends=extends))


def test_suites_of_the_package_are_valid():
    for file in (catalogue_folder() / "suites").glob("*.yaml"):
        assert load_suite(file.stem).tasks
    with pytest.raises(RecipeError, match="did you mean 'smoke'"):
        load_suite("smok")
