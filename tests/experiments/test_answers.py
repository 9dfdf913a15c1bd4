"""Detection of models that give the same answer to every row."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from deltaw.experiments.constant_answers import best_constant_answer, single_answer
from deltaw.tasks.classification.task import _evaluate_classes, evaluate_numbers
from deltaw.training.evaluation.base import Evaluation


def make_classified(truth, predicted):
    logits = np.eye(3)[list(predicted)]
    rows = [SimpleNamespace(label=label) for label in truth]
    return _evaluate_classes(np.array(truth), logits, ("a", "b", "c")), rows


def make_measured(truth, predicted):
    rows = [SimpleNamespace(label=label) for label in truth]
    evaluation, _, _ = evaluate_numbers(np.array(truth, float), np.array(predicted, float), scale=[1.0])
    return evaluation, rows


def make_generated(expected, predicted):
    pairs = [(np.array(g), np.array(e)) for e, g in zip(expected, predicted, strict=True)]
    rows = [SimpleNamespace(answer=str(e[0])) for e in expected]
    scores = np.array([np.array_equal(*pair) for pair in pairs], float)
    return Evaluation({"exact_match": scores.mean()}, "exact_match", True, scores, predicted=pairs), rows


CONSTANT_ANSWERS = [
    (make_classified, [0, 1, 2, 1], [1, 1, 1, 1], "b"),
    (make_classified, [0, 1, 2, 1], [1, 1, 0, 1], None),
    (make_classified, [1, 1, 1], [1, 1, 1], None),  # not detectable if all rows have one class
    (make_generated, [[5, 2], [5, 2]], [[5, 2], [5, 2]], None),
    (make_generated, [[5, 2], [6, 2], [5, 2]], [[5, 2]] * 3, "5-2"),
    # Compared up to the length of the expected answer.
    (make_generated, [[5, 2], [6, 7, 2]], [[5, 2], [5, 2, 9]], "5-2"),
    (make_generated, [[5, 2], [6, 2]], [[5, 2], [6, 2]], None),
    (make_measured, [1.0, 2.0, 3.0, 4.0], [2.5, 2.5, 2.501, 2.5], "2.5"),
    (make_measured, [1.0, 2.0, 3.0, 4.0], [2.0, 2.2, 2.6, 3.0], None),
    (make_measured, [2.0, 2.0], [2.0, 2.0], None),
]


@pytest.mark.parametrize(("kind", "truth", "predicted", "expected"), CONSTANT_ANSWERS)
def test_constant_answer_is_detected(kind, truth, predicted, expected):
    assert single_answer(*kind(truth, predicted), lambda tokens: "-".join(map(str, tokens))) == expected


def test_text_without_answers_has_no_constant_answer():
    evaluation = Evaluation({"loss": 1.0}, "loss", False, np.ones(3))
    assert single_answer(evaluation, []) is None and best_constant_answer(evaluation, []) is None


def test_best_constant_answer():
    for evaluation, best, expected_scores in (
        (make_classified([0, 1, 2, 1], [0, 0, 0, 0]), "b", [0, 1, 0, 1]),
        (make_measured([1.0, 3.0], [0.0, 0.0]), "2", [1, 1]),
        (make_generated([[5], [6], [5]], [[1], [1], [1]]), "5", [1, 0, 1]),
    ):
        answer, scores = best_constant_answer(*evaluation)
        assert (answer, scores.tolist()) == (best, expected_scores)
    assert best_constant_answer(*make_generated([[n] for n in range(20)], [[1]] * 20)) is None, "none is frequent"
