import pytest
import typer
from typer.testing import CliRunner

from adalora.cli import train
from adalora.errors import RecipeError
from adalora.tasks.recipe.files import load_recipe
from adalora.tasks.recipe.options import task_names
from adalora.tasks.wizard import guess_columns


@pytest.fixture
def app():
    made = typer.Typer()
    train.register(made)
    return made


@pytest.fixture
def answer(app, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("tweet,label\nhello,good\nbye,bad\n")
    (tmp_path / "chat.jsonl").write_text('{"question": "a", "completion": "b"}\n')

    def give(*lines, out="mine.yaml", **options):
        return CliRunner().invoke(app, ["init", out, *options.get("arguments", [])], input="\n".join(lines) + "\n")

    return give


def test_a_recipe_for_a_file(answer):
    result = answer("classification", "some/model", "rows.csv", "tweet", "4")
    assert result.exit_code == 0, result.output
    assert "columns: tweet, label" in result.output
    recipe = load_recipe("mine.yaml")
    assert (recipe.name, recipe.lora["r"], recipe.adalora.target_rank) == ("mine", 8, 4)
    assert recipe.data.columns == {"text": "tweet"}
    assert recipe.data.test_fraction == 0.1


def test_a_language_model_on_prompts(answer):
    result = answer("causal-lm", "some/model", "chat.jsonl", "question", "completion", "8")
    assert result.exit_code == 0, result.output
    assert load_recipe("mine.yaml").data.columns == {"prompt": "question", "completion": "completion"}


def test_a_hub_name(answer):
    result = answer("regression", "some/model", "someone/set", "text", "label", "2")
    assert result.exit_code == 0, result.output
    assert load_recipe("mine.yaml").data.name == "someone/set"


@pytest.mark.parametrize("task", task_names())
def test_every_task_gives_a_recipe(task, answer):
    columns = [f"my_{role}" for role in guess_columns(task, [])]
    result = answer(task, "some/model", "someone/set", *columns, "8")
    assert result.exit_code == 0, result.output
    recipe = load_recipe("mine.yaml")
    assert recipe.task.name == task
    assert list(recipe.data.columns.values()) == columns


def test_an_existing_file_is_kept(answer, tmp_path):
    (tmp_path / "mine.yaml").write_text("mine")
    result = answer("classification")
    assert isinstance(result.exception, RecipeError)
    assert (tmp_path / "mine.yaml").read_text() == "mine"


def test_an_unknown_task_is_asked_again(answer):
    result = answer("clasification", "classification", "some/model", "airline", "text", "label", "8")
    assert result.exit_code == 0, result.output
    assert load_recipe("mine.yaml").task.name == "classification"
