"""What a comparison says and shows, from numbers alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from PIL import Image

from deltaw.experiments.comparison import (
    Comparison,
    MethodResult,
    SeedResult,
    as_json,
    comparison_markdown,
    duration,
    findings,
    size,
)
from deltaw.reports.comparison import comparison_tables, draw_comparison
from tests.reports.consoles import printed


def result(method, score, *, away=(-0.5, -0.1), trained=1000, **other):
    cost = {"peak_bytes": 10**9, "planned_bytes": 1_100_000_000, "seconds": 10.0, "total_parameters": 10**6}
    found = {"score": score, "interval": (score - 0.1, score + 0.1), "difference_interval": away}
    return MethodResult(method, learning_rate=1e-3, trained_parameters=trained, **cost, **found, **other)


def seeds(*scores, flattened=True, one_answer=()):
    return tuple(
        SeedResult(n, score, 40, 30, flattened, 9.0, 0.5, ((10, 0.6), (30, 0.5)), "0" if n in one_answer else None)
        for n, score in enumerate(scores)
    )


def comparison(*results, reference=None, **other):
    best = next((r.method for r in results if r.ranked), None)
    named = {"reference": reference or best, "asked_reference": reference, "seeds": (0, 1, 2)}
    return Comparison("out", "model", "causal-lm", "exact_match", True, 50, tuple(results), **{**named, **other})


BEST = result("lora", 0.8, away=(0.0, 0.0))


NEAR = result("prompt", 0.75, away=(-0.2, 0.1), trained=10)


def test_methods_that_rows_do_not_tell_apart_are_named_with_the_cheapest():
    said = "\n".join(findings(comparison(BEST, NEAR, result("bias", 0.3))))
    assert "lora is best: exact_match 80.0 % (70.0–90.0) on 50 held-out rows, mean of 3 seeds." in said
    assert "These seeds and rows do not tell prompt from it" in said and "Clearly worse: bias." in said
    assert "prompt takes the fewest parameters (10)" in said


def test_a_method_whose_text_got_worse_is_marked_in_the_table_and_named_first():
    broken = tuple(replace(seed, worse="generation got worse: all answers are empty") for seed in seeds(0.8)[:1])
    made = comparison(replace(BEST, seeds=broken), NEAR)
    assert findings(made)[0] == "lora, seed 0: generation got worse: all answers are empty"
    assert "| lora (generation got worse) |" in comparison_markdown(made)
    assert "| prompt |" in comparison_markdown(made)


def test_equal_scores_share_the_first_place_and_the_untrained_model_is_set_against_it():
    said = findings(comparison(BEST, result("bias", 0.8, away=(0.0, 0.0))))
    assert said[0].startswith("lora and bias share the best score")
    for bound, word in ((-0.6, "clearly"), (0.1, "not clearly")):
        base = MethodResult("untrained", score=0.1, difference=-0.7, difference_interval=(-0.8, bound))
        assert f"lora is {word} better than the untrained model." in findings(comparison(BEST, base=base))


@pytest.mark.parametrize(("rate", "word"), [(1e-4, "lowest"), (1e-3, None), (1e-2, "highest")])
def test_a_rate_at_the_end_of_those_tried_is_said(rate, word):
    tried = ((1e-4, 1.0), (1e-3, 1.0), (1e-2, None))
    said = findings(comparison(replace(BEST, learning_rate=rate, rates=tried)))
    assert (word is None) == (len(said) == 1) and (word is None or word in said[1])


def test_page_and_numbers_hold_what_could_not_run(tmp_path):
    failed = MethodResult("prompt", error="images have no tokens")
    made = comparison(BEST, failed)
    assert "- prompt: images have no tokens" in comparison_markdown(made)
    assert json.dumps(as_json(made), allow_nan=False)
    alone = comparison(failed)
    assert findings(alone) == [] and "- prompt: images" in comparison_markdown(alone)
    draw_comparison(alone, tmp_path / "figure.png")


def test_sizes_and_times_are_short():
    sizes = {900: "0.9 kB", 47_000: "47.0 kB", 257_000: "257 kB", 19_600_000: "19.6 MB", 1_234_000_000: "1.23 GB"}
    assert [size(n) for n in sizes] == list(sizes.values())
    assert [duration(s) for s in (1.23, 42.4, 412, 765, 9000)] == ["1.2 s", "42 s", "6.9 min", "13 min", "2.5 h"]


def test_one_seed_is_called_weak_evidence():
    assert not any("weak evidence" in line for line in findings(comparison(BEST)))
    said = "\n".join(findings(comparison(BEST, result("bias", 0.75, away=(-0.2, 0.1)), seeds=(0,))))
    assert "One seed is weak evidence" in said and "These rows do not tell bias from it" in said


def test_what_gives_one_answer_is_neither_ranked_nor_a_reference():
    same = result("bias", 0.9, seeds=seeds(0.9, 0.9, 0.9, one_answer=(0, 1, 2)))
    made = comparison(BEST, NEAR, same)
    said = "\n".join(findings(made))
    assert "lora is best" in said and "prompt from it" in said
    assert "bias learned nothing with every seed: it gives every row the same answer ('0')" in said
    assert made.ranked == [BEST, NEAR] and "bias from it" not in said
    line = next(text for text in comparison_markdown(made).splitlines() if text.startswith("| bias"))
    assert line.endswith("| one answer to all |")
    assert as_json(made)["methods"][-1]["learned_nothing"] is True


def test_one_answer_with_some_seeds_is_said_and_ranked():
    made = comparison(replace(BEST, seeds=seeds(0.8, 0.8, 0.6, one_answer=(2,))))
    assert "lora gives one answer to every row with 1 of 3 seeds." in findings(made)
    assert made.ranked == list(made.results)


def test_no_better_than_the_most_frequent_answer_is_said():
    made = [replace(BEST, over_constant_interval=bounds) for bounds in ((-0.1, 0.2), (0.1, 0.2))]
    line = "lora is not clearly better than the answer 'no' to every row (61.3 %)."
    said = [findings(comparison(r, constant_answer="no", constant_score=0.613)) for r in made]
    assert [line in lines for lines in said] == [True, False]


def test_what_had_not_flattened_is_warned_of():
    some = seeds(0.8, 0.8, flattened=False) + seeds(0.8)
    slow = result("bias", 0.5, seeds=seeds(0.5, 0.5, 0.5, flattened=False))
    made = comparison(replace(BEST, seeds=some), slow, result("head", 0.4, seeds=seeds(0.4, 0.4, 0.4)))
    said = "\n".join(findings(made))
    assert "Not flattened when the budget ended: lora (2 of 3 seeds) and bias." in said
    page = comparison_markdown(made)
    for line, word in ((r"\| +lora ", "1 of 3"), (r"\| +bias ", "no"), (r"\| +head ", "yes")):
        assert re.search(rf"(?m)^{line}.*\| +{word} +\|", page)
    assert "| bias | 2 | 50.0 % | 40 | 30 | no | 0.5000 |" in page


def test_a_named_reference_is_what_others_are_compared_with():
    full = result("full", 0.7, away=(0.0, 0.0))
    better = replace(result("lora", 0.8, away=(0.05, 0.15)), difference=0.1)
    near = replace(result("last", 0.72, away=(-0.1, 0.1)), difference=0.02)
    worse = replace(result("head", 0.2, away=(-0.6, -0.4)), difference=-0.5)
    made = comparison(better, near, full, worse, reference="full")
    said = "\n".join(findings(made))
    assert "lora is best" in said
    assert "Compared with full, clearly better: lora; clearly worse: head; not told apart: last." in said
    assert "Clearly worse" not in said and "from it" not in said
    page = comparison_markdown(made)
    assert "to full (95 % interval)" in page and "| reference |" in page
    lost = comparison(better, asked_reference="full")
    assert "full cannot be the reference: it has no score that is ranked." in findings(lost)


def test_a_lower_loss_is_better():
    low = replace(result("lora", 0.3, away=(-0.2, -0.1)), difference=-0.15)
    full = result("full", 0.45, away=(0.0, 0.0))
    made = replace(comparison(low, full, reference="full"), metric="loss", higher_is_better=False)
    assert "Compared with full, clearly better: lora." in findings(made)


def test_all_columns_fit_their_terminal():
    made = comparison(replace(BEST, seeds=seeds(0.8, 0.8, 0.8), steps=1234, adapter_bytes=10**6))
    for width in (80, 152):
        shown = "".join(printed(table, width) for table in comparison_tables(made, width))
        assert "…" not in shown and "flattened" in shown


def test_the_figure_shows_seeds_and_what_did_not_flatten(tmp_path):
    """Other pixels with other seeds, when not flattened, for one answer, and with many methods."""
    many = [result(f"method{n}", 0.8 - n / 20, trained=10 ** (n % 4 + 3)) for n in range(8)]
    drawn = set()
    kinds = ({}, {"flattened": False}, {"one_answer": (0, 1, 2)})
    for results in (*([replace(BEST, seeds=seeds(0.7, 0.8, 0.9, **kind))] for kind in kinds), many):
        draw_comparison(comparison(*results), tmp_path / "figure.png")
        with Image.open(tmp_path / "figure.png") as image:
            assert image.format == "PNG" and image.width == 1800
            drawn.add(image.convert("L").resize((360, 160)).tobytes())
    assert len(drawn) == 4 and all(len(set(pixels)) > 20 for pixels in drawn)
