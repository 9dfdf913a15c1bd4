"""Which evaluation is the best, and when a run has waited long enough for a better one."""

from __future__ import annotations

import json
import math

from deltaw.training.evaluation.base import Evaluation
from deltaw.training.monitoring.best import BestScore, deciding_metric, usual_eval_every


def of_text(loss, exact=0.0):
    return Evaluation({"loss": loss, "perplexity": math.exp(loss), "exact_match": exact}, "exact_match")


def of_classes(accuracy, loss=1.0):
    return Evaluation({"loss": loss, "accuracy": accuracy}, "accuracy")


def seen(best, losses):
    return [best.see(10 * n, of_text(loss), writes_text=True) for n, loss in enumerate(losses, best.waited + 1)]


def test_language_models_are_judged_by_their_loss_and_classifiers_by_their_metric():
    assert deciding_metric(of_text(1.0), writes_text=True) == ("loss", False)
    assert deciding_metric(of_classes(0.5), writes_text=False) == ("accuracy", True)
    numbers = Evaluation({"mse": 2.0, "loss": 2.0}, "mse", False)
    assert deciding_metric(numbers, writes_text=False) == ("mse", False)
    pairs = Evaluation({"preferred": 0.5}, "preferred", True)
    assert deciding_metric(pairs, writes_text=True) == ("preferred", True)


def test_the_best_is_the_lowest_loss_or_the_highest_accuracy():
    best = BestScore()
    assert seen(best, [2.0, 1.0, 1.5, 0.9]) == [True, True, False, True]
    assert (best.step, best.value, best.metric, best.waited) == (40, 0.9, "loss", 0)
    best = BestScore()
    found = [best.see(n, of_classes(a), writes_text=False) for n, a in enumerate([0.5, 0.7, 0.6, 0.7])]
    assert found == [True, True, False, False]
    assert best.as_dict() == {"step": 1, "metric": "accuracy", "value": 0.7}


def test_a_run_has_waited_long_enough_after_its_patience_in_a_row():
    best = BestScore(patience=2)
    for loss, exhausted in [(2.0, False), (2.1, False), (1.9, False), (1.9, False), (1.95, True)]:
        best.see(1, of_text(loss), writes_text=True)
        assert best.exhausted is exhausted
    assert "2 evaluations since step" in best.why() and "loss 1.9" in best.why()
    assert not BestScore(patience=None, waited=10**6).exhausted


def test_a_loss_that_is_not_finite_is_no_improvement():
    for value in (math.nan, math.inf, -math.inf):
        best = BestScore(patience=1)
        assert not best.see(1, Evaluation({"loss": value}, "loss", False), writes_text=True)
        assert best.step is None and best.exhausted and best.as_dict() is None
        assert best.see(2, of_text(5.0), writes_text=True)


def test_it_goes_on_from_its_state():
    one = BestScore(patience=3)
    seen(one, [2.0, 1.0, 1.5])
    other = BestScore(patience=3)
    other.restore(json.loads(json.dumps(one.state())))
    assert other == one
    for best in (one, other):
        best.see(90, of_text(1.2), writes_text=True)
        best.see(99, of_text(1.2), writes_text=True)
    assert one.exhausted and other.exhausted


def test_evaluations_are_as_frequent_as_their_cost_allows():
    for *given, every in [
        (1000, 16, 100, 100),  # ten evaluations: 1,600 rows between them are more than five times 100
        (100, 10, 50, 25),  # 250 rows between evaluations of 50
        (100, 10, 10_000, 25),  # at least four, however large the set
        (3, 16, 5, 1),
        (1, 1, 1, 1),
    ]:
        assert usual_eval_every(*given).value == every
