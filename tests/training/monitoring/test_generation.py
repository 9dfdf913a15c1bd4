"""The comparison of greedy completions before and after training detects broken text and accepts healthy changes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from deltaw.decoding.generation import GeneratedCompletion
from deltaw.runs.fit import fit
from deltaw.tasks.preference.task import FEW_ROWS_RATE
from deltaw.training.monitoring import generation
from deltaw.training.monitoring.generation import (
    DATA,
    FINE,
    GENERAL,
    UNCLEAR,
    WORSE,
    AnswerComparison,
    answer_metrics,
    distinct_share,
    verdict_of,
    word_overlap,
)
from deltaw.training.planning.plan_run import plan
from tests.conftest import COLORS, write_rows
from tests.training.runs import ADAPTER, build_session, slow_except

COUNT = 20


def completion(text, tokens=None, stopped=True):
    ids = np.arange(len(text.split())) if tokens is None else np.asarray(tokens)
    return GeneratedCompletion(ids, text, stopped)


def metrics(answers, *, expected="the right answer", log_prob=-1.0, base=None):
    texts = expected if isinstance(expected, list) else [expected] * len(answers)
    base_scores = () if base is None else [np.full(len(answer.tokens), base) for answer in answers]
    return answer_metrics(answers, texts, [np.array([log_prob])] * len(answers), base_scores)


def compare(after, before=None, *, name=DATA, trained=True, **options):
    expected = "the right answer" if trained else None
    first = metrics(before or [completion(f"some other answer number {n}") for n in range(COUNT)], expected=expected)
    last = metrics(after, expected=expected, **options)
    comparison = AnswerComparison(name, 32, first, last, 5.0 if trained else None, checks_cut=trained)
    return verdict_of([comparison])


BROKEN = {
    "one token again and again": ([completion("a a a", [7] * 30)] * COUNT, {}, "repetition"),
    "a phrase again and again": ([completion("ab ab", [1, 2, 3, 4, 5] * 6)] * COUNT, {}, "repetition"),
    "word salad": ([completion("x " * 12)] * COUNT, {"base": -7.0}, "word salad"),
    "empty answers": ([completion(" \n", [])] * COUNT, {}, "empty"),
    "a few broken answers": ([completion("", [])] * 6 + [completion("some other answer")] * 14, {}, "empty"),
    "answers without an end": ([completion(f"1. a{n} 2. b", stopped=False) for n in range(COUNT)], {}, "32 tokens"),
    "unlikely expected answers": ([completion("some other answer number 1")] * COUNT, {"log_prob": -3.0}, "-3.00 nats"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_text_is_worse_and_reason_is_reported(kind):
    answers, options, reason = BROKEN[kind]
    report = compare(answers, **options)
    assert report["verdict"] == WORSE and reason in report["line"]
    assert report["line"].startswith("generation got worse: ")


def test_lost_exact_answers_are_worse():
    correct = completion("the right answer")
    incorrect = completion("a wrong reply")
    report = compare([correct] * 5 + [incorrect] * 15, [correct] * 15 + [incorrect] * 5)
    assert report["verdict"] == WORSE and "exact match" in report["line"] and "75% to 25%" in report["line"]


def test_insignificant_decline_is_unclear():
    correct = completion("the right answer")
    incorrect = completion("a wrong reply")
    report = compare([correct] * 9 + [incorrect] * 11, [correct] * 10 + [incorrect] * 10)
    assert report["verdict"] == UNCLEAR and "may be chance" in report["line"]


@pytest.mark.parametrize(
    "answers",
    [
        [completion("the right answer")] * COUNT,
        [completion(f"some other answer number {n}") for n in range(COUNT)],
        [completion("the right answer in twice as many words as before")] * COUNT,
    ],
    ids=["learned", "unchanged", "longer"],
)
def test_healthy_answers_are_not_worse(answers):
    report = compare(answers, base=-1.5)
    assert report["verdict"] == FINE and report["line"] is None


def test_short_answers_may_be_unlikely_for_base_model():
    assert compare([completion("0")] * COUNT, base=-9.0, trained=False)["verdict"] == FINE


def test_general_answers_unlikely_after_training_are_worse():
    answers = [completion(f"some other answer number {n}") for n in range(COUNT)]
    assert compare(answers, name=GENERAL, trained=False, log_prob=-2.5)["verdict"] == WORSE
    assert compare(answers, name=GENERAL, trained=False, log_prob=-1.5)["verdict"] == FINE


def test_distinct_share_and_word_overlap_match_expected_values():
    assert distinct_share(np.arange(20)) == 1 and distinct_share(np.full(20, 3)) == pytest.approx(1 / 17)
    assert distinct_share(np.full(4, 3)) == 1  # too short to count as repetition
    assert word_overlap("A b c", "a B d") == pytest.approx(2 / 3) and word_overlap("", "a") == 0


@pytest.fixture
def preference_run(settings, tmp_path):
    rows = [{"prompt": f"paint it {c}", "chosen": c[0], "rejected": c[1:3]} for c in COLORS]
    file = write_rows(tmp_path / "pairs.jsonl", rows)

    def make(output, **train):
        changes = {"task": "preference", "data": {"train": str(file), "eval": 2}, "precision": "fp32"}
        return settings(tmp_path / output, **changes, train={"samples": 0, "drift": False, **train})

    return make


@pytest.mark.parametrize("method", slow_except("full", names=("lora", "full", "prompt")))
def test_run_that_breaks_model_is_reported_in_result_and_folder(preference_run, method):
    config = preference_run("run", learning_rate=3.0, epochs=8) | {"method": method}
    result = fit(config)
    assert result.generation["verdict"] == WORSE
    assert result.generation[DATA]["prompts"] > 2  # training prompts supplement a small evaluation set
    assert result.generation["line"] in (result.output / "README.md").read_text()
    stored = json.loads((result.output / "run.json").read_text())["result"]["generation"]
    assert stored == json.loads(json.dumps(result.as_dict()["generation"]))


@pytest.mark.parametrize(("loss", "factor"), [("dpo", 0.1), ("orpo", 0.4), ("simpo", 0.05)])
def test_automatic_rate_depends_on_loss_and_reports_reason(preference_run, settings, tmp_path, loss, factor):
    usual = build_session(settings(tmp_path / "sft", train={"learning_rate": "auto"})).learning_rate
    session = build_session(preference_run("run", learning_rate="auto") | {"preference": {"loss": loss}})
    assert session.learning_rate == pytest.approx(factor * FEW_ROWS_RATE * usual, rel=0.06)
    assert f"times {factor:g}" in session.chosen["train.learning_rate"].why


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_answers_before_training_are_those_of_start_from(preference_run, method):
    first = fit(preference_run("first", learning_rate=0.3, epochs=4) | {"method": method})
    tiny = preference_run("second", learning_rate=1e-9, max_steps=1)
    second = fit(tiny | {"method": method, "start_from": str(first.output)})
    before = second.generation[DATA]["before"]
    after = second.generation[DATA]["after"]
    assert before["log_prob"] == pytest.approx(after["log_prob"], abs=1e-4)
    assert before["log_prob"] != pytest.approx(first.generation[DATA]["before"]["log_prob"], abs=1e-2)


def test_plan_of_preference_run_includes_generation(preference_run):
    assert plan(preference_run("run")).phases["rollouts"] > 0


def test_supervised_runs_are_not_checked(finished_run):
    assert not json.loads((finished_run / "run.json").read_text())["result"]["generation"]


def test_check_of_untrained_adapter_is_fine_and_does_not_change_it(preference_run, monkeypatch):
    checked = fit(preference_run("checked", learning_rate=1e-5))
    monkeypatch.setattr(generation.GenerationProbe, "measure", lambda self: {})
    unchecked = fit(preference_run("unchecked", learning_rate=1e-5))
    assert checked.generation["verdict"] == FINE and not unchecked.generation
    assert (checked.output / ADAPTER).read_bytes() == (unchecked.output / ADAPTER).read_bytes()


def test_preference_range_test_stops_when_answers_become_unlikely(preference_run, monkeypatch):
    from deltaw.training.monitoring.rates import search_rate

    session = build_session(preference_run("run", learning_rate="search", epochs=10))
    with session.running():
        unbounded = search_rate(session)
        monkeypatch.setattr(generation, "WATCHED_FALL", -100.0)  # every step falls by more
        bounded = search_rate(session)
    assert len(bounded.rates) == 6 < len(unbounded.rates)
