"""Rows that an evaluation of classes or numbers keeps for the report: the worst mistakes, and examples."""

from __future__ import annotations

import numpy as np
import pytest

from deltaw.data.example import LabeledExample
from deltaw.training.evaluation.base import EXAMPLES, MISTAKES, Outcomes
from deltaw.training.tasks import labels
from deltaw.training.tasks.labels import evaluate_labels


class Objective:
    def __init__(self, task: str) -> None:
        self.task = task


@pytest.fixture
def evaluated(monkeypatch):
    """Evaluate given predictions, without a model."""

    def of(task: str, truth, predictions, classes=()):
        monkeypatch.setattr(labels, "predicted", lambda *_: np.asarray(predictions, np.float32))
        rows = [LabeledExample(10 + n, np.array([n]), label) for n, label in enumerate(truth)]
        return evaluate_labels(Objective(task), rows, None, classes).outcomes

    return of


def test_the_most_confident_wrong_class_is_the_worst_mistake(evaluated):
    logits = [[4.0, 0.0], [1.0, 0.0], [0.0, 3.0], [0.0, 9.0]]
    found = evaluated("sequence-classification", [1, 1, 0, 1], logits, ("no", "yes"))
    assert [(row.row, expected, given) for row, expected, given, _ in found.mistakes] == [
        *((10, "yes", "no"), (12, "no", "yes"), (11, "yes", "no"))
    ]
    assert found.mistakes[0][3] == pytest.approx(1 / (1 + np.exp(-4.0)))
    assert [row.row for row, *_ in found.examples] == [10, 11, 12, 13]


def test_classes_without_names_are_numbered(evaluated):
    ((_, expected, given, _),) = evaluated("sequence-classification", [0], [[0.0, 1.0]]).mistakes
    assert (expected, given) == ("0", "1")


def test_the_largest_error_of_a_regression_is_the_worst(evaluated):
    found = evaluated("regression", [1.0, 2.0, 3.0], [1.0, 4.5, 2.0])
    assert [(row.row, expected, given, score) for row, expected, given, score in found.mistakes] == [
        *((11, "2", "4.5", 2.5), (12, "3", "2", 1.0))
    ]


@pytest.mark.parametrize("rows", [1, 2, EXAMPLES, 10_000])
def test_few_rows_are_kept_of_many_and_none_twice(rows):
    found = Outcomes.of_errors("error", np.arange(rows), lambda place: (place, "", "", 0.0))
    assert [one[0] for one in found.mistakes] == list(range(rows))[::-1][: min(MISTAKES, rows - 1)]
    places = [one[0] for one in found.examples]
    assert len(set(places)) == len(places) == min(rows, EXAMPLES) and places[0] == 0 and places[-1] == rows - 1
