"""The page of a run: predictions, clamped texts, JSON answers, and numbers in place of charts of few points."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from deltaw.data.example import LabeledExample
from deltaw.reports.page.write import run_page
from deltaw.runs.folder import read_run
from deltaw.training.evaluation.base import CONFUSIONS, MISTAKES, Evaluation, Outcomes, confusion, paired_difference
from tests.reports.html_pages import Page
from tests.reports.run_folders import write_run

HOSTILE = '<script>alert(1)</script></textarea></div>\u202eRTL & "quotes" {{ 7*7 }} \ud800'


def add_line(folder, values: dict) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


def page_of(folder) -> Page:
    """The page as it is written, which must be sound."""
    text = run_page(read_run(folder)).encode("utf-8", "strict").decode()
    found = Page(text)
    assert found.faults == []
    found.source = text
    return found


def recorded(truth, predicted, classes) -> dict:
    """What a run records of these predictions."""
    counts = confusion(np.array(truth), np.array(predicted), len(classes))
    rows = [LabeledExample(n + 1, np.array([n]), one) for n, one in enumerate(truth)]
    errors = (np.array(truth) != predicted) * (0.5 + np.arange(len(truth)) / 1000)

    shown = [(row, classes[a], classes[b]) for row, a, b in zip(rows, truth, predicted, strict=True)]
    outcomes = Outcomes.of_errors("confidence", errors, lambda place: (*shown[place], 0.5 + place / 1000))
    found = Evaluation({"accuracy": 0.5}, "accuracy", classes=classes, confusion=counts, outcomes=outcomes)
    return found.outcomes_as_dict(lambda one: one if isinstance(one, str) else f"text {one.row}")


def test_a_classifier_has_a_confusion_matrix_mistakes_and_examples(tmp_path):
    folder = write_run(tmp_path / "one")
    truth, predicted = [0, 0, 0, 1, 1, 2] * 4, [0, 0, 1, 1, 1, 0] * 4
    add_line(folder, {"step": 60, "predictions": {"": recorded(truth, predicted, ["cat", "dog", "bird"])}})
    page = page_of(folder)
    rows = re.findall(r'<tr><th scope="row">(\w+)</th>(.*?)</tr>', page.source)
    counts = {name: re.findall(r">([\d,]*)</td>", cells) for name, cells in rows if "<td" in cells}
    assert counts["cat"] == ["8", "4", ""] and counts["dog"] == ["", "8", ""] and counts["bird"] == ["4", "", ""]
    assert "The worst mistakes" in page.text and "row 24 text 24 bird cat 52.3%" in page.text
    assert page.text.index("row 24 text 24") < page.text.index("row 21 text 21"), "the most confident comes first"


def test_many_classes_are_shown_by_their_most_frequent_confusions(tmp_path):
    classes = [f"class {n}" for n in range(300)]
    truth = [n % 300 for n in range(3000)]
    predicted = [(n + 1) % 300 if n % 300 == 7 else n % 300 for n in range(3000)]
    kept = recorded(truth, predicted, classes)
    assert kept["classes"] == [] and kept["confusion"] == [["class 7", "class 8", 10, 10]]
    folder = write_run(tmp_path / "one")
    add_line(folder, {"step": 60, "predictions": {"": kept}})
    assert "class 7 class 8 10 100%" in page_of(folder).text


def test_what_is_recorded_is_bounded():
    draw = np.random.default_rng(0)
    classes = ["x" * 5000 + str(n) for n in range(500)]
    kept = recorded(draw.integers(0, 500, 20_000).tolist(), draw.integers(0, 500, 20_000).tolist(), classes)
    assert len(kept["confusion"]) == CONFUSIONS and len(kept["mistakes"]) == MISTAKES
    assert max(len(pair[0]) for pair in kept["confusion"]) <= 80


@pytest.mark.parametrize(
    "told",
    [
        *({"": None}, {"": []}, {"": {"mistakes": 3, "classes": 4, "confusion": "x"}}, [], 7, {"": {"classes": ["a"]}}),
        {"": {"mistakes": [None, 1, {"score": "x"}, {"row": {}, "score": 1}], "confusion": [[1], [[], {}, "x", None]]}},
        {"": {"score_name": HOSTILE, "classes": [HOSTILE, "b"], "confusion": [[HOSTILE, "b", 3, 0]]}},
        {HOSTILE: {"mistakes": [{"row": HOSTILE, "text": HOSTILE, "expected": HOSTILE, "predicted": 1, "score": 2.0}]}},
        {
            "": {
                "examples": [
                    {"row": 1, "text": "x" * 10**6, "score": float("nan")},
                    {"text": "y" * 10**6, "score": 0.1},
                ]
            }
        },
    ],
)
def test_damaged_or_hostile_predictions_do_not_break_the_page(tmp_path, told):
    folder = write_run(tmp_path / "one")
    add_line(folder, {"step": 60, "predictions": told})
    page = page_of(folder)
    assert "<script>alert" not in page.source and len(page.source) < 500_000


def sample(folder, base: str, adapter: str, expected: str | None, prompt: str = "a prompt?") -> Page:
    for step, answer in ((0, base), (60, adapter)):
        row = {"row": 3, "prompt": prompt, "expected": expected, "answer": answer}
        add_line(folder, {"step": step, "samples": [row]})
    return page_of(folder)


def test_json_answers_are_compared_with_the_expected_one(tmp_path):
    page = sample(write_run(tmp_path / "one"), "no JSON", '{"film":"x","good":true}', '{"film": "x", "good": false}')
    assert "<ins>  &#34;good&#34;: true</ins>" in page.source and "<del>  &#34;good&#34;: false</del>" in page.source
    assert page.text.count("✗ not valid JSON") == 1


def test_equal_json_in_another_form_is_said_to_be_so(tmp_path):
    page = sample(write_run(tmp_path / "one"), "", '{"a":  1}', '{"a": 1}')
    assert "✗ same JSON, written differently" in page.text and "<ins>  " not in page.source


def test_plain_answers_are_not_called_invalid_json(tmp_path):
    page = sample(write_run(tmp_path / "one"), "one", "two", "three")
    assert "JSON" not in page.text


@pytest.mark.parametrize(
    "answer",
    [HOSTILE, "x" * 10**6, "[" * 50_000, '{"a": NaN}', json.dumps({"a": HOSTILE}), json.dumps([[["y" * 9000]]]), ""],
    ids=["markup", "long", "deep", "nan", "hostile-json", "large-json", "nothing"],
)
@pytest.mark.parametrize("place", ["base", "adapter", "expected", "prompt"])
def test_hostile_answers_stay_text(tmp_path, place, answer):
    texts = {"base": '{"a": 1}', "adapter": '{"a": 2}', "expected": '{"a": 3}', "prompt": "?"} | {place: answer}
    page = sample(write_run(tmp_path / "one"), **texts)
    assert "<script>alert" not in page.source and len(page.source) < 400_000


def test_long_texts_can_be_opened_without_a_script_and_short_ones_have_no_button(tmp_path):
    short = sample(write_run(tmp_path / "short"), "one", "two", "three").source
    assert 'class="clamp"' not in short
    tall = sample(write_run(tmp_path / "tall"), "one", "line\n" * 9, "three").source
    (part,) = re.findall(r'<div class="clamp">.*?</label></div>', tall, re.DOTALL)
    assert part.count('<input type="checkbox">') == 1 and part.count("line\n") >= 8
    assert "-webkit-line-clamp: 8" in tall and ".clamp:has(:checked)" in tall
    printed = tall[tall.index("@media print") :]
    assert ".clamp > .text { display: block" in printed and ".more" in printed


def test_two_evaluations_are_numbers_and_three_are_a_chart(tmp_path):
    two = page_of(write_run(tmp_path / "two", steps=60, every=60))
    assert not re.search(r'id="metric-1-t"', two.source) and 'id="metric-1-numbers"' in two.source
    assert "<summary>Numbers: Exact match" not in two.source
    three = page_of(write_run(tmp_path / "three", steps=60, every=30))
    assert re.search(r'id="metric-1-t"', three.source) and "<summary>Numbers: Exact match" in three.source


def test_a_run_of_one_step_has_no_chart_over_steps(tmp_path):
    page = page_of(write_run(tmp_path / "one", steps=1, every=1))
    assert 'id="loss-t"' not in page.source and 'id="loss-numbers"' in page.source


def test_the_headline_says_among_how_many_passages(tmp_path):
    folder = write_run(tmp_path / "one", state="finished")
    add_line(folder, {"step": 60, "eval": {"exact_match": 0.8, "passages_searched": 5000.0}})
    assert "among 5,000 passages" in page_of(folder).text


def test_the_difference_of_two_evaluations_is_paired():
    rows = np.random.default_rng(0).uniform(size=200)
    before, after = (Evaluation({"ndcg@10": float(r.mean())}, "ndcg@10", per_row=r) for r in (rows, rows + 0.01))
    change, (low, high) = paired_difference(before, after)
    assert change == pytest.approx(0.01) and low == pytest.approx(0.01) and high == pytest.approx(0.01)
    same, bounds = paired_difference(before, before)
    assert (same, *bounds) == (0, 0, 0)
    assert paired_difference(before, Evaluation({"spearman": 1.0}, "spearman")) is None
