import pytest

from adalora.errors import DataError

from ..tiny import make_recipe, run, write_rows


def rows(count, *, entities):
    names = {"flight": "B-THING", "bag": "B-THING", "my": "I-THING"} if entities else {"flight": "noun", "bag": "noun"}
    rest = "O" if entities else "other"
    for n in range(count):
        words = [["good", "flight", "my"], ["the", "bag", "was", "lost"], ["bad", "bag"]][n % 3]
        yield {"tokens": words, "tags": [names.get(word, rest) for word in words]}


@pytest.mark.parametrize(("entities", "metrics"), [(True, {"f1", "precision", "recall"}), (False, {"macro_f1"})])
def test_labels_of_words_are_learnt(tiny_model, tmp_path, entities, metrics):
    recipe = make_recipe(
        tmp_path,
        tiny_model,
        task="token-classification",
        data={"files": write_rows(tmp_path / "rows.jsonl", rows(60, entities=entities)), "test_fraction": 0.2},
        training={"max_steps": 40, "batch_size": 8, "learning_rate": 1e-2},
    )
    result = run(recipe).metrics
    assert metrics <= result.keys()
    assert result["accuracy"] > 0.9


def test_tokens_and_tags_of_different_length_are_refused(tiny_model, tmp_path):
    wrong = [{"tokens": ["good", "bag"], "tags": ["O"]}] * 4
    recipe = make_recipe(
        tmp_path,
        tiny_model,
        task="token-classification",
        data={"files": write_rows(tmp_path / "rows.jsonl", wrong)},
    )
    with pytest.raises(DataError, match="2 tokens but 1 tags"):
        run(recipe)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("role", ["tokens", "tags"])
def test_text_where_a_list_must_stand_is_refused(role, streaming, tiny_model, tmp_path):
    """Each letter would be a word, or the whole text one label."""
    wrong = {"tokens": ["good", "bag"], "tags": ["O", "O"], role: "good bag"}
    recipe = make_recipe(
        tmp_path,
        tiny_model,
        task={"name": "token-classification", "labels": ["O"]},
        data={"files": write_rows(tmp_path / "rows.jsonl", [wrong] * 4), "streaming": streaming},
        training={"max_steps": 1},
    )
    with pytest.raises(DataError, match=f"column '{role}' has 'good bag' where a list of words or tags must stand"):
        run(recipe)
