"""Predictions, long texts, JSON answers and short series on the page of a run."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from deltaw.data.example import LabeledExample
from deltaw.reports.page.write import run_page
from deltaw.runs.folder import read_run
from deltaw.training.evaluation.base import (
    MAX_CONFUSIONS,
    MAX_MISTAKES,
    Evaluation,
    Outcomes,
    confusion_matrix,
    paired_difference,
)
from tests.reports.html_pages import Page
from tests.reports.run_folders import write_run

HOSTILE = '<script>alert(1)</script></textarea></div>\u202eRTL & "quotes" {{ 7*7 }} \ud800'


def add_line(folder, values: dict) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


def page_of(folder) -> Page:
    """Return the page of a run and assert that it has no faults."""
    text = run_page(read_run(folder)).encode("utf-8", "strict").decode()
    page = Page(text)
    assert page.faults == []
    page.source = text
    return page


def predictions_record(truth, predicted, classes) -> dict:
    """Return the record of these predictions in a run."""
    counts = confusion_matrix(np.array(truth), np.array(predicted), len(classes))
    rows = [LabeledExample(n + 1, np.array([n]), label) for n, label in enumerate(truth)]
    errors = (np.array(truth) != predicted) * (0.5 + np.arange(len(truth)) / 1000)

    cases = [(row, classes[a], classes[b]) for row, a, b in zip(rows, truth, predicted, strict=True)]
    outcomes = Outcomes.of_errors("confidence", errors, lambda index: (*cases[index], 0.5 + index / 1000))
    evaluation = Evaluation({"accuracy": 0.5}, "accuracy", classes=classes, confusion=counts, outcomes=outcomes)
    return evaluation.outcomes_as_dict(lambda label: label if isinstance(label, str) else f"text {label.row}")


def test_classifier_page_has_confusion_matrix_and_mistakes(tmp_path):
    folder = write_run(tmp_path / "one")
    truth = [0, 0, 0, 1, 1, 2] * 4
    predicted = [0, 0, 1, 1, 1, 0] * 4
    add_line(folder, {"step": 60, "predictions": {"": predictions_record(truth, predicted, ["cat", "dog", "bird"])}})
    page = page_of(folder)
    rows = re.findall(r'<tr><th scope="row">(\w+)</th>(.*?)</tr>', page.source)
    counts = {name: re.findall(r">([\d,]*)</td>", cells) for name, cells in rows if "<td" in cells}
    assert counts["cat"] == ["8", "4", ""] and counts["dog"] == ["", "8", ""] and counts["bird"] == ["4", "", ""]
    assert "Worst mistakes" in page.text and "row 24 text 24 bird cat 52.3%" in page.text
    assert page.text.index("row 24 text 24") < page.text.index("row 21 text 21"), "the most confident comes first"


def test_many_classes_show_most_frequent_confusions(tmp_path):
    classes = [f"class {n}" for n in range(300)]
    truth = [n % 300 for n in range(3000)]
    predicted = [(n + 1) % 300 if n % 300 == 7 else n % 300 for n in range(3000)]
    record = predictions_record(truth, predicted, classes)
    assert record["classes"] == [] and record["confusion"] == [["class 7", "class 8", 10, 10]]
    folder = write_run(tmp_path / "one")
    add_line(folder, {"step": 60, "predictions": {"": record}})
    assert "class 7 class 8 10 100%" in page_of(folder).text


def test_recorded_predictions_are_bounded():
    rng = np.random.default_rng(0)
    classes = ["x" * 5000 + str(n) for n in range(500)]
    record = predictions_record(rng.integers(0, 500, 20_000).tolist(), rng.integers(0, 500, 20_000).tolist(), classes)
    assert len(record["confusion"]) == MAX_CONFUSIONS and len(record["mistakes"]) == MAX_MISTAKES
    assert max(len(pair[0]) for pair in record["confusion"]) <= 80


HOSTILE_PREDICTIONS = [
    *({"": None}, {"": []}, {"": {"mistakes": 3, "classes": 4, "confusion": "x"}}, [], 7, {"": {"classes": ["a"]}}),
    {"": {"mistakes": [None, 1, {"score": "x"}, {"row": {}, "score": 1}], "confusion": [[1], [[], {}, "x", None]]}},
    {"": {"score_name": HOSTILE, "classes": [HOSTILE, "b"], "confusion": [[HOSTILE, "b", 3, 0]]}},
    {HOSTILE: {"mistakes": [{"row": HOSTILE, "text": HOSTILE, "expected": HOSTILE, "predicted": 1, "score": 2.0}]}},
    {"": {"examples": [{"row": 1, "text": "x" * 10**6, "score": float("nan")}, {"text": "y" * 10**6, "score": 0.1}]}},
]


@pytest.mark.parametrize("predictions", HOSTILE_PREDICTIONS)
def test_damaged_or_hostile_predictions_are_harmless(tmp_path, predictions):
    folder = write_run(tmp_path / "one")
    add_line(folder, {"step": 60, "predictions": predictions})
    page = page_of(folder)
    assert "<script>alert" not in page.source and len(page.source) < 500_000


def page_with_sample(folder, base: str, adapter: str, expected: str | None, prompt: str = "a prompt?") -> Page:
    for step, answer in ((0, base), (60, adapter)):
        row = {"row": 3, "prompt": prompt, "expected": expected, "answer": answer}
        add_line(folder, {"step": step, "samples": [row]})
    return page_of(folder)


def test_json_answers_are_diffed_with_expected(tmp_path):
    answers = ("no JSON", '{"film":"x","good":true}', '{"film": "x", "good": false}')
    page = page_with_sample(write_run(tmp_path / "one"), *answers)
    assert "<ins>  &#34;good&#34;: true</ins>" in page.source and "<del>  &#34;good&#34;: false</del>" in page.source
    assert page.text.count("✗ not valid JSON") == 1


def test_equal_json_with_other_formatting_is_reported(tmp_path):
    page = page_with_sample(write_run(tmp_path / "one"), "", '{"a":  1}', '{"a": 1}')
    assert "✗ same JSON, different formatting" in page.text and "<ins>  " not in page.source


def test_plain_answers_are_not_reported_as_invalid_json(tmp_path):
    page = page_with_sample(write_run(tmp_path / "one"), "one", "two", "three")
    assert "JSON" not in page.text


@pytest.mark.parametrize(
    "answer",
    [HOSTILE, "x" * 10**6, "[" * 50_000, '{"a": NaN}', json.dumps({"a": HOSTILE}), json.dumps([[["y" * 9000]]]), ""],
    ids=["markup", "long", "deep", "nan", "hostile-json", "large-json", "nothing"],
)
@pytest.mark.parametrize("field", ["base", "adapter", "expected", "prompt"])
def test_hostile_answers_are_escaped(tmp_path, field, answer):
    texts = {"base": '{"a": 1}', "adapter": '{"a": 2}', "expected": '{"a": 3}', "prompt": "?"} | {field: answer}
    page = page_with_sample(write_run(tmp_path / "one"), **texts)
    assert "<script>alert" not in page.source and len(page.source) < 400_000


def test_long_texts_expand_without_script(tmp_path):
    short = page_with_sample(write_run(tmp_path / "short"), "one", "two", "three").source
    assert 'class="clamp"' not in short
    tall = page_with_sample(write_run(tmp_path / "tall"), "one", "line\n" * 9, "three").source
    (element,) = re.findall(r'<div class="clamp">.*?</label></div>', tall, re.DOTALL)
    assert element.count('<input type="checkbox">') == 1 and element.count("line\n") >= 8
    assert "-webkit-line-clamp: 8" in tall and ".clamp:has(:checked)" in tall
    print_style = tall[tall.index("@media print") :]
    assert ".clamp > .text { display: block" in print_style and ".more" in print_style


def test_chart_needs_three_evaluations(tmp_path):
    two_evaluations = page_of(write_run(tmp_path / "two", steps=60, every=60))
    assert not re.search(r'id="metric-1-t"', two_evaluations.source)
    assert 'id="metric-1-numbers"' in two_evaluations.source
    assert "<summary>Values: Exact match" not in two_evaluations.source
    three_evaluations = page_of(write_run(tmp_path / "three", steps=60, every=30))
    assert re.search(r'id="metric-1-t"', three_evaluations.source)
    assert "<summary>Values: Exact match" in three_evaluations.source


def test_single_step_run_has_no_chart(tmp_path):
    page = page_of(write_run(tmp_path / "one", steps=1, every=1))
    assert 'id="loss-t"' not in page.source and 'id="loss-numbers"' in page.source


def test_headline_contains_number_of_passages(tmp_path):
    folder = write_run(tmp_path / "one", state="finished")
    add_line(folder, {"step": 60, "eval": {"exact_match": 0.8, "passages_searched": 5000.0}})
    assert "among 5,000 passages" in page_of(folder).text


def test_difference_of_evaluations_is_paired():
    rows = np.random.default_rng(0).uniform(size=200)
    before, after = (Evaluation({"ndcg@10": float(r.mean())}, "ndcg@10", per_row=r) for r in (rows, rows + 0.01))
    change, (low, high) = paired_difference(before, after)
    assert change == pytest.approx(0.01) and low == pytest.approx(0.01) and high == pytest.approx(0.01)
    same, bounds = paired_difference(before, before)
    assert (same, *bounds) == (0, 0, 0)
    right = [np.array([share] * 12 + [1.0] * 3) for share in (0.0, 1.0)]
    before, after = (Evaluation({"accuracy": float(r.mean())}, "accuracy", per_row=r) for r in right)
    assert paired_difference(before, after)[1][1] == 1 and paired_difference(after, before)[1][0] == -1
    assert paired_difference(before, Evaluation({"spearman": 1.0}, "spearman")) is None
