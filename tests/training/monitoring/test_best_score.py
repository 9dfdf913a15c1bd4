"""Selection of the best evaluation and early stopping."""

from __future__ import annotations

import json
import math

from deltaw.training.evaluation.base import Evaluation
from deltaw.training.monitoring.best import BestScore, deciding_metric, default_eval_every


def text_evaluation(loss, exact=0.0):
    return Evaluation({"loss": loss, "perplexity": math.exp(loss), "exact_match": exact}, "exact_match")


def class_evaluation(accuracy, loss=1.0):
    return Evaluation({"loss": loss, "accuracy": accuracy}, "accuracy")


def update_all(best, losses):
    numbered = enumerate(map(text_evaluation, losses), best.waited + 1)
    return [best.update(10 * n, evaluation, generates_text=True) for n, evaluation in numbered]


def test_deciding_metric_is_loss_for_text_and_main_metric_otherwise():
    assert deciding_metric(text_evaluation(1.0), generates_text=True) == ("loss", False)
    assert deciding_metric(class_evaluation(0.5), generates_text=False) == ("accuracy", True)
    numbers = Evaluation({"mse": 2.0, "loss": 2.0}, "mse", False)
    assert deciding_metric(numbers, generates_text=False) == ("mse", False)
    pairs = Evaluation({"preferred": 0.5}, "preferred", True)
    assert deciding_metric(pairs, generates_text=True) == ("preferred", True)


def test_best_is_lowest_loss_or_highest_accuracy():
    best = BestScore()
    assert update_all(best, [2.0, 1.0, 1.5, 0.9]) == [True, True, False, True]
    assert (best.step, best.value, best.metric, best.waited) == (40, 0.9, "loss", 0)
    best = BestScore()
    improved = [best.update(n, class_evaluation(a), generates_text=False) for n, a in enumerate([0.5, 0.7, 0.6, 0.7])]
    assert improved == [True, True, False, False] and best.as_dict() == {"step": 1, "metric": "accuracy", "value": 0.7}


def test_score_is_exhausted_after_patience_evaluations():
    best = BestScore(patience=2)
    for loss, exhausted in [(2.0, False), (2.1, False), (1.9, False), (1.9, False), (1.95, True)]:
        best.update(1, text_evaluation(loss), generates_text=True)
        assert best.exhausted is exhausted
    assert "2 evaluations since step" in best.reason() and "loss 1.9" in best.reason()
    assert not BestScore(patience=None, waited=10**6).exhausted


def test_non_finite_loss_is_not_an_improvement():
    for value in (math.nan, math.inf, -math.inf):
        best = BestScore(patience=1)
        assert not best.update(1, Evaluation({"loss": value}, "loss", False), generates_text=True)
        assert best.step is None and best.exhausted and best.as_dict() is None
        assert best.update(2, text_evaluation(5.0), generates_text=True)


def test_restored_score_continues_identically():
    original = BestScore(patience=3)
    update_all(original, [2.0, 1.0, 1.5])
    restored = BestScore(patience=3)
    restored.restore(json.loads(json.dumps(original.state())))
    assert restored == original
    for best in (original, restored):
        best.update(90, text_evaluation(1.2), generates_text=True)
        best.update(99, text_evaluation(1.2), generates_text=True)
    assert original.exhausted and restored.exhausted


def test_evaluation_interval_depends_on_cost():
    for *args, expected in [
        (1000, 16, 100, 100),  # ten evaluations: 1,600 rows between them are more than five times 100
        (100, 10, 50, 25),  # 250 rows between evaluations of 50
        (100, 10, 10_000, 25),  # at least four, however large the set
        (3, 16, 5, 1),
        (1, 1, 1, 1),
    ]:
        assert default_eval_every(*args).value == expected
