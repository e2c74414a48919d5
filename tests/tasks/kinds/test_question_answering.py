import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from adalora.errors import DataError
from adalora.tasks.data.rows import load_splits
from adalora.tasks.kinds.question_answering import QuestionAnsweringTask
from adalora.tasks.runs.training import make_trainer

from ..tiny import WORDS, make_recipe, run, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qa")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "where", "is", "it", "here", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    BertModel(
        BertConfig(vocab_size=29, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    ).save_pretrained(folder)
    return folder


def row(number, *, answerable=True, before=4, after=4):
    """The answer is the word `here`, if it is there."""
    head = [WORDS[(number + k) % 20] for k in range(before)]
    tail = [WORDS[(number * 3 + k) % 20] for k in range(after)]
    context = " ".join([*head, *(["here"] if answerable else []), *tail])
    answers = {"text": ["here"], "answer_start": [context.index("here")]} if answerable else {}
    return {
        "question": "where is it",
        "context": context,
        "answers": answers or {"text": [], "answer_start": []},
    }


def test_answers_are_learnt_and_told_from_none(model, tmp_path):
    rows = [row(n, answerable=n % 3 > 0) for n in range(90)]
    recipe = make_recipe(
        tmp_path,
        model,
        task={"name": "question-answering", "no_answer": True, "no_answer_threshold": "tune"},
        data={
            "files": write_rows(tmp_path / "rows.jsonl", rows),
            "test_fraction": 0.2,
            "validation_fraction": 0.2,
        },
        training={"max_steps": 80, "batch_size": 16, "learning_rate": 2e-2},
    )
    metrics = run(recipe).metrics
    assert metrics["f1"] > 0.8
    assert metrics["exact_match"] <= metrics["f1"]
    assert {"f1_answerable", "accuracy_unanswerable", "no_answer_threshold"} <= metrics.keys()
    assert metrics["final_rank_total"] == metrics["target_rank_total"]


def test_a_long_context_is_read_in_windows(model, tmp_path):
    rows = [row(1, before=40, after=10)]
    recipe = make_recipe(
        tmp_path,
        model,
        task={"name": "question-answering", "stride": 4},
        data=write_rows(tmp_path / "r.jsonl", rows) and {"files": str(tmp_path / "r.jsonl")},
        training={"max_length": 24},
    )
    splits = load_splits(recipe)
    task = QuestionAnsweringTask(recipe, splits)
    tokenizer = task.processor(str(model))
    features = task.features(splits.train, tokenizer)
    assert len(features) > 2
    assert all(len(ids) <= 24 for ids in features["input_ids"])
    here = tokenizer.convert_tokens_to_ids("here")
    for ids, start, end in zip(features["input_ids"], features["start_positions"], features["end_positions"]):
        if here in ids:
            assert ids[start : end + 1] == [here]
        else:
            assert (start, end) == (0, 0)


class Finder(torch.nn.Module):
    """Answers with the word of highest number in the context, and says of a window without words that it has none."""

    def __init__(self, words):
        super().__init__()
        self.register_buffer("words", torch.tensor(words))
        self.weight = torch.nn.Parameter(torch.zeros(()))  # the Trainer wants one

    def forward(self, input_ids, token_type_ids, **given):
        places = (input_ids[..., None] == self.words).float() * torch.arange(1, len(self.words) + 1)
        scores = places.sum(dim=-1) * token_type_ids + self.weight
        scores[:, 0] += 0.5  # no answer: less than any word
        return QuestionAnsweringModelOutput(loss=scores.sum(), start_logits=scores, end_logits=scores)


@pytest.mark.parametrize("no_answer", [False, True])
def test_an_answer_in_a_later_window_is_scored(no_answer, model, tmp_path):
    """Between short rows, whose answers are other words, so that every window must go to its row."""
    words = ["w17", "here", "w19"]
    rows = []
    for place, before in ((0, 3), (1, 40), (2, 5)):
        context = " ".join([*(WORDS[:15] * 3)[:before], words[place], *WORDS[:4]])
        answers = {"text": [words[place]], "answer_start": [context.index(words[place])]}
        rows.append({"question": "where is it", "context": context, "answers": answers})
    if no_answer:
        rows.append({**rows[0], "context": " ".join(WORDS[:14] * 3), "answers": {"text": [], "answer_start": []}})
    recipe = make_recipe(
        tmp_path, model,
        task={"name": "question-answering", "stride": 4, "no_answer": no_answer},
        data={"files": write_rows(tmp_path / "rows.jsonl", rows)},
        training={"max_length": 24, "batch_size": 2, "eval_batch_size": 2},
    )  # fmt: skip
    splits = load_splits(recipe)
    task = QuestionAnsweringTask(recipe, splits)
    tokenizer = task.processor(str(model))
    places = task.features(splits.train, tokenizer)["start_positions"][:]
    assert places[0] > 0
    assert places[1:3] == [0, 0]  # the long row's first windows do not have it
    finder = Finder(tokenizer.convert_tokens_to_ids(words))
    trainer = make_trainer(recipe, task, model=finder, processor=tokenizer, splits=splits)
    scores = task.evaluate(trainer, splits.train, tokenizer)
    assert scores["exact_match"] == scores["f1"] == 1
    if no_answer:
        assert scores["accuracy_unanswerable"] == scores["exact_match_answerable"] == 1


def test_tuning_needs_a_validation_split(model, tmp_path):
    recipe = make_recipe(
        tmp_path,
        model,
        task={"name": "question-answering", "no_answer": True, "no_answer_threshold": "tune"},
        data={"files": write_rows(tmp_path / "rows.jsonl", [row(n) for n in range(8)])},
        training={"max_steps": 5, "batch_size": 4},
    )
    with pytest.raises(DataError, match="validation_fraction"):
        run(recipe)
