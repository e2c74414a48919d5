"""From scores per token to answers, and SQuAD's measures of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Offsets = list[tuple[int, ...] | None]


class Window(NamedTuple):
    """What the model said about one window of a context.

    Attributes:
        row: The question's row.
        offsets: Per token its characters in the context; None outside the context.
        start: Score of each token as the answer's first, (tokens,) or longer by padding.
        end: The same as its last.
    """

    row: int
    offsets: Offsets
    start: np.ndarray
    end: np.ndarray


class Candidate(NamedTuple):
    """The best answer to one question, and how much better it is to say that there is none."""

    text: str
    no_answer_margin: float

    def answer(self, threshold: float | None) -> str:
        """The text, or an empty one where "no answer" wins by more than the threshold (None: never)."""
        return "" if threshold is not None and self.no_answer_margin > threshold else self.text


def best_answers(
    windows: Sequence[Window], contexts: Sequence[str], *, candidates: int, longest: int
) -> list[Candidate]:
    """The best span of each row over all its windows.

    The score of "no answer" is that of the first token, at its lowest over the windows, as in the reference
    implementation: a window without the answer must not speak for the others.

    Args:
        windows: Of all rows, in any order.
        contexts: One per row.
        candidates: Best starts and ends of a window that are combined.
        longest: Tokens an answer may have.
    """
    by_row: dict[int, list[Window]] = defaultdict(list)
    for window in windows:
        by_row[window.row].append(window)
    found = []
    for row, context in enumerate(contexts):
        best, text = -np.inf, ""
        for window in by_row[row]:
            score, span = _best_span(window, candidates=candidates, longest=longest)
            if span is not None and score > best:
                best, text = score, context[span[0] : span[1]]
        nothing = min(float(window.start[0] + window.end[0]) for window in by_row[row])
        found.append(Candidate(text, nothing - best if np.isfinite(best) else np.inf))
    return found


def _best_span(window: Window, *, candidates: int, longest: int) -> tuple[float, tuple[int, int] | None]:
    inside = np.array([offset is not None for offset in window.offsets])
    start = np.where(inside, window.start[: len(inside)], -np.inf)
    end = np.where(inside, window.end[: len(inside)], -np.inf)
    firsts, lasts = np.argsort(-start)[:candidates], np.argsort(-end)[:candidates]
    first, last = np.meshgrid(firsts, lasts, indexing="ij")
    score = np.where((last >= first) & (last - first < longest), start[first] + end[last], -np.inf)
    place = np.unravel_index(int(np.argmax(score)), score.shape)
    if not np.isfinite(score[place]):
        return -np.inf, None
    begin, stop = window.offsets[int(first[place])], window.offsets[int(last[place])]
    assert begin is not None
    assert stop is not None
    return float(score[place]), (begin[0], stop[1])


def squad_scores(answers: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
    """Exact match and F1 (0 to 1) with SQuAD's normalisation, by torchmetrics; the best reference counts.

    An unanswerable question has no reference: only the empty answer is right. Where there are both kinds, each
    is also measured apart.
    """
    exact, f1 = per_row_scores(answers, references)
    answerable = np.array([bool(reference["text"]) for reference in references])
    scores = {"exact_match": float(exact.mean()), "f1": float(f1.mean())}
    if answerable.any() and not answerable.all():
        scores |= {
            "f1_answerable": float(f1[answerable].mean()),
            "exact_match_answerable": float(exact[answerable].mean()),
            "accuracy_unanswerable": float(exact[~answerable].mean()),
        }
    return scores


def per_row_scores(answers: Sequence[str], references: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Exact match and F1 of each row, (rows,), 0 to 1."""
    from torchmetrics.functional.text.squad import squad

    exact, f1 = np.zeros(len(answers)), np.zeros(len(answers))
    for row, (answer, reference) in enumerate(zip(answers, references)):
        wanted = {"text": list(reference["text"]) or [""], "answer_start": [0] * max(1, len(reference["text"]))}
        score = squad([{"prediction_text": answer, "id": "0"}], [{"answers": wanted, "id": "0"}])
        exact[row], f1[row] = float(score["exact_match"]) / 100, float(score["f1"]) / 100
    return exact, f1


def tune_threshold(candidates: Sequence[Candidate], references: Sequence[Any]) -> float:
    """The threshold with the highest mean F1 over these rows."""
    answered = per_row_scores([candidate.text for candidate in candidates], references)[1]
    empty = per_row_scores([""] * len(candidates), references)[1]
    margins = np.array([candidate.no_answer_margin for candidate in candidates])
    order = np.argsort(margins)
    # Threshold just below the k-th smallest margin: the first k rows answer, the others do not.
    gains = np.concatenate([[0.0], np.cumsum(answered[order] - empty[order])])
    count = int(np.argmax(gains))
    bounds = np.concatenate([[margins.min() - 1.0], margins[order], [margins.max() + 1.0]])
    finite = bounds[np.isfinite(bounds)]
    low, high = bounds[count], bounds[count + 1]
    if count == 0 or not np.isfinite(high):
        return float(low if np.isfinite(low) else finite.max())
    return float((low + high) / 2)
