"""Whether a model learned to tell rows apart."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

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


def test_one_class_for_every_row_is_found():
    assert one_answer(*classified([0, 1, 2, 1], [1, 1, 1, 1])) == "b"
    assert one_answer(*classified([0, 1, 2, 1], [1, 1, 0, 1])) is None


def test_rows_that_all_have_one_class_say_nothing():
    assert one_answer(*classified([1, 1, 1], [1, 1, 1])) is None
    assert one_answer(*written([[5, 2], [5, 2]], [[5, 2], [5, 2]])) is None


def test_one_written_answer_is_found_whatever_the_answers_lengths():
    decode = lambda tokens: "-".join(map(str, tokens))  # noqa: E731
    assert one_answer(*written([[5, 2], [6, 2], [5, 2]], [[5, 2]] * 3), decode) == "5-2"
    assert one_answer(*written([[5, 2], [6, 7, 2]], [[5, 2], [5, 2, 9]]), decode) == "5-2"
    assert one_answer(*written([[5, 2], [6, 2]], [[5, 2], [6, 2]]), decode) is None


def test_one_number_for_every_row_is_found():
    truth = [1.0, 2.0, 3.0, 4.0]
    assert one_answer(*measured(truth, [2.5, 2.5, 2.501, 2.5])) == "2.5"
    assert one_answer(*measured(truth, [2.0, 2.2, 2.6, 3.0])) is None
    assert one_answer(*measured([2.0, 2.0], [2.0, 2.0])) is None


def test_text_without_answers_cannot_be_told():
    evaluation = Evaluation({"loss": 1.0}, "loss", False, np.ones(3))
    assert one_answer(evaluation, []) is None and constant_scores(evaluation, []) is None


def test_the_best_answer_to_every_row():
    answer, scores = constant_scores(*classified([0, 1, 2, 1], [0, 0, 0, 0]))
    assert answer == "b" and scores.tolist() == [0, 1, 0, 1]
    answer, scores = constant_scores(*measured([1.0, 3.0], [0.0, 0.0]))
    assert answer == "2" and scores.tolist() == [1, 1]
    answer, scores = constant_scores(*written([[5], [6], [5]], [[1], [1], [1]]))
    assert answer == "5" and scores.tolist() == [1, 0, 1]
    assert constant_scores(*written([[n] for n in range(20)], [[1]] * 20)) is None, "none is frequent"
