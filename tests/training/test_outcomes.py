"""Rows that an evaluation stores for the report: the worst mistakes, and examples."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from deltaw.data.example import LabeledExample
from deltaw.tasks.classification import task as labels
from deltaw.tasks.classification.task import evaluate_labels
from deltaw.training.evaluation.base import MAX_MISTAKES, NUM_EXAMPLES, Outcomes


@pytest.fixture
def evaluated(monkeypatch):
    """Return a function that evaluates given predictions without a model."""

    def evaluate(task: str, truth, predictions, classes=()):
        monkeypatch.setattr(labels, "predict_rows", lambda *_: np.asarray(predictions, np.float32))
        rows = [LabeledExample(10 + n, np.array([n]), label) for n, label in enumerate(truth)]
        return evaluate_labels(SimpleNamespace(task=task, label_scale=(1.0,)), rows, None, classes).outcomes

    return evaluate


def test_mistakes_are_sorted_by_confidence(evaluated):
    logits = [[4.0, 0.0], [1.0, 0.0], [0.0, 3.0], [0.0, 9.0]]
    outcomes = evaluated("sequence-classification", [1, 1, 0, 1], logits, ("no", "yes"))
    mistakes = [(row.row, expected, predicted) for row, expected, predicted, _ in outcomes.mistakes]
    assert mistakes == [(10, "yes", "no"), (12, "no", "yes"), (11, "yes", "no")]
    assert outcomes.mistakes[0][3] == pytest.approx(1 / (1 + np.exp(-4.0)))
    assert [row.row for row, *_ in outcomes.examples] == [10, 11, 12, 13]


def test_unnamed_classes_are_numbered(evaluated):
    ((_, expected, predicted, _),) = evaluated("sequence-classification", [0], [[0.0, 1.0]]).mistakes
    assert (expected, predicted) == ("0", "1")


def test_regression_mistakes_are_sorted_by_error(evaluated):
    outcomes = evaluated("regression", [1.0, 2.0, 3.0], [1.0, 4.5, 2.0])
    mistakes = [(row.row, *more) for row, *more in outcomes.mistakes]
    assert mistakes == [(11, "2", "4.5", 2.5), (12, "3", "2", 1.0)]


@pytest.mark.parametrize("rows", [1, 2, NUM_EXAMPLES, 10_000])
def test_stored_rows_are_limited_and_distinct(rows):
    outcomes = Outcomes.of_errors("error", np.arange(rows), lambda index: (index, "", "", 0.0))
    assert [mistake[0] for mistake in outcomes.mistakes] == list(range(rows))[::-1][: min(MAX_MISTAKES, rows - 1)]
    indices = [mistake[0] for mistake in outcomes.examples]
    assert len(set(indices)) == len(indices) == min(rows, NUM_EXAMPLES) and indices[0] == 0 and indices[-1] == rows - 1
