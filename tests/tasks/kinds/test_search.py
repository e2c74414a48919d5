"""The recipe's settings of the search are those that the model generates with."""

import pytest
from transformers import BartForConditionalGeneration, LlamaForCausalLM

from adalora.tasks.data.rows import load_splits
from adalora.tasks.kinds.base import make_task
from adalora.tasks.runs.models import build_model, build_processor
from adalora.tasks.runs.training import make_trainer

from ..small import bart, llama
from ..tiny import make_recipe, write_rows

MODELS = {"seq2seq": (bart, BartForConditionalGeneration), "causal-lm": (llama, LlamaForCausalLM)}
COLUMNS = {"seq2seq": ("source", "target"), "causal-lm": ("prompt", "completion")}
GREEDY = {"max_new_tokens": 3, "num_beams": 1, "do_sample": False}
BEAMS = {"num_beams": 2, "length_penalty": 2.5, "no_repeat_ngram": 3}
# Of the recipe → what `generate` is given beside the inputs.
SETTINGS = [
    ({}, GREEDY),
    ({"no_repeat_ngram": 2}, {**GREEDY, "no_repeat_ngram_size": 2}),
    ({"length_penalty": 2.5}, GREEDY),  # of beams only
    (BEAMS, {**GREEDY, "num_beams": 2, "length_penalty": 2.5, "no_repeat_ngram_size": 3}),
]


def generated_with(name, generation, folder, monkeypatch, *, own=None):
    """Keywords of each call of the model's `generate` while a recipe is evaluated; `own` is the checkpoint's config."""
    save, model_class = MODELS[name]
    save(folder / "model")
    if own:
        model = model_class.from_pretrained(folder / "model")
        model.generation_config.update(**own)
        model.save_pretrained(folder / "model")
    first, second = COLUMNS[name]
    rows = [{first: f"w{n} w1", second: "w2"} for n in range(3)]
    recipe = make_recipe(
        folder, folder / "model",
        task={"name": name, "generation": {"max_new_tokens": 3, **generation}},
        data={"files": write_rows(folder / "rows.jsonl", rows), "columns": {first: first, second: second}},
        training={"batch_size": 1, "eval_batch_size": 2},
    )  # fmt: skip
    splits = load_splits(recipe)
    task = make_task(recipe, splits)
    processor = build_processor(recipe, task)
    model = build_model(recipe, task, processor)
    trainer = make_trainer(recipe, task, model=model, processor=processor, splits=splits)
    calls, generate = [], model_class.generate

    def recorded(self, *args, **options):
        calls.append(options)
        return generate(self, *args, **options)

    monkeypatch.setattr(model_class, "generate", recorded)
    scores = task.evaluate(trainer, splits.train, processor)
    assert 0 <= scores["rouge1"] <= 1
    inputs = [options.pop("input_ids") for options in calls]
    assert [len(ids) for ids in inputs] == [2, 1]
    return [{key: value for key, value in options.items() if key != "attention_mask"} for options in calls]


@pytest.mark.parametrize(("generation", "wanted"), SETTINGS)
@pytest.mark.parametrize("name", MODELS)
def test_generate_is_told_what_the_recipe_says(name, generation, wanted, tmp_path, monkeypatch):
    assert generated_with(name, generation, tmp_path, monkeypatch) == [wanted] * 2


@pytest.mark.parametrize(("generation", "more"), [({}, {}), ({"no_repeat_ngram": 0}, {"no_repeat_ngram_size": 0})])
def test_what_a_checkpoint_forbids_stands_until_the_recipe_allows_it(generation, more, tmp_path, monkeypatch):
    """BART's checkpoints forbid repeats: `generate` takes from them what it is not told."""
    own = {"no_repeat_ngram_size": 3}
    assert generated_with("seq2seq", generation, tmp_path, monkeypatch, own=own) == [{**GREEDY, **more}] * 2
