import numpy as np
import pytest

from adalora.tasks.kinds.spans import Candidate, Window, best_answers, squad_scores, tune_threshold

CONTEXT = "the old river Seine flows"
OFFSETS = [None, (0, 3), (4, 7), (8, 13), (14, 19), (20, 25)]


def window(start, end, *, row=0):
    def scores(hits):
        values = np.full(8, -5.0)  # longer than the offsets, as padded outputs are
        for place, value in hits.items():
            values[place] = value
        return values

    return Window(row, OFFSETS, scores(start), scores(end))


def test_best_span_is_cut_out_of_the_context():
    (found,) = best_answers([window({3: 2, 0: 1}, {4: 3, 0: 1})], [CONTEXT], candidates=5, longest=5)
    assert found.text == "river Seine"
    assert found.no_answer_margin == pytest.approx(2 - 5)


def test_an_end_before_its_start_and_padding_are_not_answers():
    (found,) = best_answers([window({4: 9, 7: 99}, {2: 9, 5: 1, 7: 99})], [CONTEXT], candidates=8, longest=5)
    assert found.text == "Seine flows"


def test_answers_are_not_longer_than_allowed():
    (found,) = best_answers([window({1: 9}, {5: 9, 2: 1})], [CONTEXT], candidates=8, longest=2)
    assert found.text == "the old"


def test_best_of_several_windows_and_lowest_no_answer():
    windows = [window({1: 1, 0: 4}, {1: 1, 0: 4}), window({4: 3, 0: 0}, {4: 3, 0: 1})]
    (found,) = best_answers(windows, [CONTEXT], candidates=5, longest=5)
    assert found.text == "Seine"
    assert found.no_answer_margin == pytest.approx(1 - 6)


def test_squad_normalisation_and_unanswerable_rows():
    references = [{"text": ["the Seine", "a river"]}, {"text": []}, {"text": []}]
    scores = squad_scores(["Seine!", "", "old"], references)
    assert scores["exact_match"] == pytest.approx(2 / 3)
    assert scores["exact_match_answerable"] == 1
    assert scores["accuracy_unanswerable"] == 0.5


def test_threshold_is_the_best_one():
    candidates = [Candidate("x", -3.0), Candidate("x", 1.0), Candidate("x", 2.0), Candidate("x", 5.0)]
    references = [{"text": ["x"]}, {"text": ["x"]}, {"text": []}, {"text": []}]
    threshold = tune_threshold(candidates, references)
    assert 1.0 < threshold < 2.0
    assert [c.answer(threshold) for c in candidates] == ["x", "x", "", ""]


@pytest.mark.parametrize(("answers", "text"), [(["x"], "x"), ([], "")])
def test_threshold_where_all_rows_are_alike(answers, text):
    candidates = [Candidate("x", 1.0), Candidate("x", 3.0), Candidate("x", np.inf)]
    threshold = tune_threshold(candidates, [{"text": answers}] * 3)
    assert [c.answer(threshold) for c in candidates[:2]] == [text, text]
