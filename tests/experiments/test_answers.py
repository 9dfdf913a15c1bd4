"""Whether a model learned to tell rows apart."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from deltaw.experiments.worker import constant_scores, one_answer
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.tasks.labels import _of_classes, _of_numbers


def classified(truth, chosen):
    logits = np.eye(3)[list(chosen)]
    rows = [SimpleNamespace(label=label) for label in truth]
    return _of_classes(np.array(truth), logits, ("a", "b", "c")), rows


def measured(truth, predicted):
    rows = [SimpleNamespace(label=label) for label in truth]
    return _of_numbers(np.array(truth, float), np.array(predicted, float)), rows


def written(expected, given):
    pairs = [(np.array(g), np.array(e)) for e, g in zip(expected, given, strict=True)]
    rows = [SimpleNamespace(answer=str(e[0])) for e in expected]
    scores = np.array([np.array_equal(*pair) for pair in pairs], float)
    return Evaluation({"exact_match": scores.mean()}, "exact_match", True, scores, predicted=pairs), rows


@pytest.mark.parametrize(
    ("kind", "truth", "given", "found"),
    [
        (classified, [0, 1, 2, 1], [1, 1, 1, 1], "b"),
        (classified, [0, 1, 2, 1], [1, 1, 0, 1], None),
        (classified, [1, 1, 1], [1, 1, 1], None),  # rows that all have one class say nothing
        (written, [[5, 2], [5, 2]], [[5, 2], [5, 2]], None),
        (written, [[5, 2], [6, 2], [5, 2]], [[5, 2]] * 3, "5-2"),
        (written, [[5, 2], [6, 7, 2]], [[5, 2], [5, 2, 9]], "5-2"),  # as far as the answers go
        (written, [[5, 2], [6, 2]], [[5, 2], [6, 2]], None),
        (measured, [1.0, 2.0, 3.0, 4.0], [2.5, 2.5, 2.501, 2.5], "2.5"),
        (measured, [1.0, 2.0, 3.0, 4.0], [2.0, 2.2, 2.6, 3.0], None),
        (measured, [2.0, 2.0], [2.0, 2.0], None),
    ],
)
def test_one_answer_to_every_row_is_found(kind, truth, given, found):
    assert one_answer(*kind(truth, given), lambda tokens: "-".join(map(str, tokens))) == found


def test_text_without_answers_cannot_be_told():
    evaluation = Evaluation({"loss": 1.0}, "loss", False, np.ones(3))
    assert one_answer(evaluation, []) is None and constant_scores(evaluation, []) is None


def test_the_best_answer_to_every_row():
    for evaluated, best, right in (
        (classified([0, 1, 2, 1], [0, 0, 0, 0]), "b", [0, 1, 0, 1]),
        (measured([1.0, 3.0], [0.0, 0.0]), "2", [1, 1]),
        (written([[5], [6], [5]], [[1], [1], [1]]), "5", [1, 0, 1]),
    ):
        answer, scores = constant_scores(*evaluated)
        assert (answer, scores.tolist()) == (best, right)
    assert constant_scores(*written([[n] for n in range(20)], [[1]] * 20)) is None, "none is frequent"
