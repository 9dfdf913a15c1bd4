"""Findings, pages and figures of comparisons, from numbers."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from deltaw.experiments.comparison import Comparison, MethodResult, SeedResult, duration, findings, size
from deltaw.experiments.comparison_page import comparison_markdown
from deltaw.reports.comparison import comparison_tables, draw_comparison
from tests.reports.consoles import render_text

SVG = "{http://www.w3.org/2000/svg}"


def make_result(method, score, *, difference_interval=(-0.5, -0.1), trained=1000, **overrides):
    cost = {"peak_bytes": 10**9, "planned_bytes": 1_100_000_000, "seconds": 10.0, "total_parameters": 10**6}
    scores = {"score": score, "interval": (score - 0.1, score + 0.1), "difference_interval": difference_interval}
    return MethodResult(method, learning_rate=1e-3, trained_parameters=trained, **cost, **scores, **overrides)


def seeds(*scores, flattened=True, single_answer=()):
    return tuple(
        SeedResult(n, score, 40, 30, flattened, 9.0, 0.5, ((10, 0.6), (30, 0.5)), "0" if n in single_answer else None)
        for n, score in enumerate(scores)
    )


def make_comparison(*results, reference=None, **overrides):
    best = next((r.method for r in results if r.ranked), None)
    metadata = {"reference": reference or best, "requested_reference": reference, "seeds": (0, 1, 2)}
    return Comparison("out", "model", "causal-lm", "exact_match", True, 50, tuple(results), **{**metadata, **overrides})


BEST = make_result("lora", 0.8, difference_interval=(0.0, 0.0))


NEAR = make_result("prompt", 0.75, difference_interval=(-0.2, 0.1), trained=10)


def test_indistinguishable_methods_are_reported_with_cheapest():
    text = "\n".join(findings(make_comparison(BEST, NEAR, make_result("bias", 0.3))))
    assert "lora is best: exact_match 80.0 % (70.0–90.0) on 50 held-out rows, mean of 3 seeds." in text
    assert "No clear difference to prompt on these seeds and rows" in text and "Clearly worse: bias." in text
    assert "prompt needs the fewest parameters (10)" in text


def test_degraded_generation_is_marked_and_reported_first():
    broken = tuple(replace(seed, worse="generation got worse: all answers are empty") for seed in seeds(0.8)[:1])
    comparison = make_comparison(replace(BEST, seeds=broken), NEAR)
    assert findings(comparison)[0] == "lora, seed 0: generation got worse: all answers are empty"
    assert "| lora (generation got worse) |" in comparison_markdown(comparison)
    assert "| prompt |" in comparison_markdown(comparison)


def test_equal_scores_tie_and_are_compared_with_untrained_model():
    text = findings(make_comparison(BEST, make_result("bias", 0.8, difference_interval=(0.0, 0.0))))
    assert text[0].startswith("lora and bias share the best score")
    for bound, word in ((-0.6, "clearly"), (0.1, "not clearly")):
        base = MethodResult("untrained", score=0.1, difference=-0.7, difference_interval=(-0.8, bound))
        assert f"lora is {word} better than the untrained model." in findings(make_comparison(BEST, base=base))


@pytest.mark.parametrize(("rate", "word"), [(1e-4, "lowest"), (1e-3, None), (1e-2, "highest")])
def test_rate_at_edge_of_grid_is_reported(rate, word):
    rates = ((1e-4, 1.0), (1e-3, 1.0), (1e-2, None))
    text = findings(make_comparison(replace(BEST, learning_rate=rate, rates=rates)))
    assert (word is None) == (len(text) == 1) and (word is None or word in text[1])


def test_failed_methods_are_listed_in_page_and_json():
    failed = MethodResult("prompt", error="images have no tokens")
    comparison = make_comparison(BEST, failed)
    assert "- prompt: images have no tokens" in comparison_markdown(comparison)
    assert json.dumps(comparison.as_dict(), allow_nan=False)
    failed_only = make_comparison(failed)
    assert findings(failed_only) == [] and "- prompt: images" in comparison_markdown(failed_only)
    assert "No method has a score." in figure_texts(failed_only)[0]


def test_sizes_and_durations_are_formatted_briefly():
    sizes = {900: "0.9 kB", 47_000: "47.0 kB", 257_000: "257 kB", 19_600_000: "19.6 MB", 1_234_000_000: "1.23 GB"}
    assert [size(n) for n in sizes] == list(sizes.values())
    assert [duration(s) for s in (1.23, 42.4, 412, 765, 9000)] == ["1.2 s", "42 s", "6.9 min", "13 min", "2.5 h"]


def test_single_seed_is_reported_as_weak_evidence():
    assert not any("weak evidence" in line for line in findings(make_comparison(BEST)))
    near = make_result("bias", 0.75, difference_interval=(-0.2, 0.1))
    text = "\n".join(findings(make_comparison(BEST, near, seeds=(0,))))
    assert "One seed is weak evidence" in text and "No clear difference to bias on these rows" in text


def test_constant_answer_is_neither_ranked_nor_reference():
    same = make_result("bias", 0.9, seeds=seeds(0.9, 0.9, 0.9, single_answer=(0, 1, 2)))
    comparison = make_comparison(BEST, NEAR, same)
    text = "\n".join(findings(comparison))
    assert "lora is best" in text and "difference to prompt" in text
    assert "bias learned nothing with any seed: it gives every row the same answer ('0')" in text
    assert comparison.ranked == [BEST, NEAR] and "difference to bias" not in text
    line = next(row for row in comparison_markdown(comparison).splitlines() if row.startswith("| bias"))
    assert line.endswith("| constant answer |")
    assert comparison.as_dict()["methods"][-1]["learned_nothing"] is True


def test_constant_answer_of_some_seeds_is_reported_and_ranked():
    comparison = make_comparison(replace(BEST, seeds=seeds(0.8, 0.8, 0.6, single_answer=(2,))))
    assert "lora gives one answer to every row with 1 of 3 seeds." in findings(comparison)
    assert comparison.ranked == list(comparison.results)


def test_score_near_best_constant_answer_is_reported():
    comparison = [replace(BEST, over_constant_interval=bounds) for bounds in ((-0.1, 0.2), (0.1, 0.2))]
    line = "lora is not clearly better than the answer 'no' to every row (61.3 %)."
    text = [findings(make_comparison(r, constant_answer="no", constant_score=0.613)) for r in comparison]
    assert [line in lines for lines in text] == [True, False]


def test_methods_that_did_not_flatten_are_reported():
    mixed_seeds = seeds(0.8, 0.8, flattened=False) + seeds(0.8)
    slow = make_result("bias", 0.5, seeds=seeds(0.5, 0.5, 0.5, flattened=False))
    flat = make_result("head", 0.4, seeds=seeds(0.4, 0.4, 0.4))
    comparison = make_comparison(replace(BEST, seeds=mixed_seeds), slow, flat)
    text = "\n".join(findings(comparison))
    assert "Not flattened when the budget ended: lora (2 of 3 seeds) and bias." in text
    page = comparison_markdown(comparison)
    for line, word in ((r"\| +lora ", "1 of 3"), (r"\| +bias ", "no"), (r"\| +head ", "yes")):
        assert re.search(rf"(?m)^{line}.*\| +{word} +\|", page)
    assert "| bias | 2 | 50.0 % | 40 | 30 | no | 0.5000 |" in page


def test_other_methods_are_compared_with_explicit_reference():
    full = make_result("full", 0.7, difference_interval=(0.0, 0.0))
    better = replace(make_result("lora", 0.8, difference_interval=(0.05, 0.15)), difference=0.1)
    near = replace(make_result("last", 0.72, difference_interval=(-0.1, 0.1)), difference=0.02)
    worse = replace(make_result("head", 0.2, difference_interval=(-0.6, -0.4)), difference=-0.5)
    comparison = make_comparison(better, near, full, worse, reference="full")
    text = "\n".join(findings(comparison))
    assert "lora is best" in text
    assert "Compared with full, clearly better: lora; clearly worse: head; no clear difference: last." in text
    assert "Clearly worse" not in text and "from it" not in text
    page = comparison_markdown(comparison)
    assert "to full (95 % interval)" in page and "| reference |" in page
    unranked_reference = make_comparison(better, requested_reference="full")
    assert "full cannot be the reference because it is not ranked." in findings(unranked_reference)


def test_lower_loss_is_better():
    low = replace(make_result("lora", 0.3, difference_interval=(-0.2, -0.1)), difference=-0.15)
    full = make_result("full", 0.45, difference_interval=(0.0, 0.0))
    comparison = replace(make_comparison(low, full, reference="full"), metric="loss", higher_is_better=False)
    assert "Compared with full, clearly better: lora." in findings(comparison)


def test_columns_fit_terminal_width():
    comparison = make_comparison(replace(BEST, seeds=seeds(0.8, 0.8, 0.8), steps=1234, adapter_bytes=10**6))
    for width in (80, 152):
        output = "".join(render_text(table, width) for table in comparison_tables(comparison, width))
        assert "…" not in output and "flattened" in output


def figure_texts(comparison):
    """Return the visible texts of the figure, and the texts shown on hover."""
    root = ElementTree.fromstring(draw_comparison(comparison))
    texts = [text.text or "" for text in root.iter(SVG + "text")]
    return texts, [title.text for rect in root.iter(SVG + "rect") for title in rect]


def test_figure_shows_score_memory_and_state_of_each_method():
    results = (
        replace(BEST, seeds=seeds(0.7, 0.8, 0.9)),
        replace(NEAR, seeds=seeds(0.7, 0.8, 0.75, flattened=False), peak_bytes=None),
        make_result("<b>&'\x00", 0.5, seeds=seeds(0.5, 0.5, 0.5, single_answer=(0, 1, 2)), trained=22_713_986),
    )
    base = MethodResult("untrained", score=0.25)
    texts, hovers = figure_texts(make_comparison(*results, base=base, constant_score=0.5))
    assert {
        "80.0 % (70.0–90.0), 1,000 trained",
        "75.0 % (65.0–85.0), 10 trained, not flattened",
        "50.0 % (40.0–60.0), 22.71 M trained, one answer to every row",
        "1.10 GB planned, 1.00 GB measured",
        "1.10 GB planned",
    } < set(texts)
    assert texts.count("lora") == texts.count("prompt") == texts.count("<b>&'\ufffd") == 2  # score and memory
    assert {"seed 0: 70.0 %", "untrained: 25.0 %", "one answer to every row: 50.0 %", "95 % interval"} < set(hovers)


def test_figure_leaves_out_unknown_values():
    unknown = replace(make_result("bias", math.nan), peak_bytes=None, planned_bytes=None)
    texts, hovers = figure_texts(make_comparison(unknown, replace(BEST, interval=None)))
    assert {"–, 1,000 trained", "80.0 %, 1,000 trained", "–"} < set(texts)
    assert not any("nan" in text for text in [*texts, *hovers]) and "95 % interval" not in hovers


@pytest.mark.parametrize("count", [1, 40])
def test_figure_grows_with_number_of_methods(count):
    results = [make_result(f"method-{n}", 0.8 - n / 80) for n in range(count)]
    svg = draw_comparison(make_comparison(*results))
    assert "nan" not in svg
    root = ElementTree.fromstring(svg)
    names = [text for text in root.iter(SVG + "text") if text.get("class") == "name"]
    assert [text.text for text in names] == 2 * [result.method for result in results]
    assert int(root.get("height")) > 2 * max(float(text.get("y")) for text in names)


def test_figure_of_loss_has_axis_around_values():
    comparison = replace(make_comparison(make_result("lora", 2.35)), metric="loss", higher_is_better=False)
    texts, _ = figure_texts(comparison)
    assert "Lower is better." in texts and "2.3500 (2.2500–2.4500), 1,000 trained" in texts and "2.3000" in texts
