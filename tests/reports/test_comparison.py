"""What a comparison says and shows, from numbers alone."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from PIL import Image

from deltaw.experiments.comparison import (
    Comparison,
    MethodResult,
    comparison_markdown,
    duration,
    findings,
    size,
)
from deltaw.reports.comparison_figure import draw_comparison


def result(method, score, *, away=(-0.5, -0.1), trained=1000, **other):
    return MethodResult(
        method,
        learning_rate=1e-3,
        trained_parameters=trained,
        total_parameters=10**6,
        peak_bytes=10**9,
        planned_bytes=1_100_000_000,
        seconds=10.0,
        score=score,
        interval=(score - 0.1, score + 0.1),
        difference_interval=away,
        **other,
    )


def comparison(*results, **other):
    return Comparison("out", "model", "causal-lm", "exact_match", True, 50, tuple(results), **other)


BEST = result("lora", 0.8, away=(0.0, 0.0))


def test_methods_that_rows_do_not_tell_apart_are_named_with_the_cheapest():
    near = result("prompt", 0.75, away=(-0.2, 0.1), trained=10)
    said = "\n".join(findings(comparison(BEST, near, result("bias", 0.3))))
    assert "lora is best: exact_match 80.0 % (70.0–90.0) on 50 held-out rows." in said
    assert "do not tell prompt from it" in said and "Clearly worse: bias." in said
    assert "prompt takes the fewest parameters (10)" in said


def test_equal_scores_share_the_first_place():
    said = findings(comparison(BEST, result("bias", 0.8, away=(0.0, 0.0))))
    assert said[0].startswith("lora and bias share the best score")


def test_the_untrained_model_is_set_against_the_best():
    base = MethodResult("untrained", score=0.1, difference_interval=(-0.8, -0.6))
    assert "lora is clearly better than the untrained model." in findings(comparison(BEST, base=base))
    base = replace(base, difference_interval=(-0.8, 0.1))
    assert "lora is not clearly better than the untrained model." in findings(comparison(BEST, base=base))


@pytest.mark.parametrize(("rate", "word"), [(1e-4, "lowest"), (1e-3, None), (1e-2, "highest")])
def test_a_rate_at_the_end_of_those_tried_is_said(rate, word):
    tried = ((1e-4, 1.0), (1e-3, 1.0), (1e-2, None))
    said = findings(comparison(replace(BEST, learning_rate=rate, rates=tried)))
    assert (word is None) == (len(said) == 1) and (word is None or word in said[1])


def test_page_and_numbers_hold_what_could_not_run():
    failed = MethodResult("prompt", error="images have no tokens")
    made = comparison(BEST, failed)
    assert "- prompt: images have no tokens" in comparison_markdown(made)
    assert json.dumps(made.as_dict(), allow_nan=False)


def test_nothing_but_failures_can_be_shown_too(tmp_path):
    made = comparison(MethodResult("prompt", error="no"))
    assert findings(made) == [] and "- prompt: no" in comparison_markdown(made)
    draw_comparison(made, tmp_path / "figure.png")


def test_sizes_and_times_are_short():
    assert [size(n) for n in (900, 47_000, 257_000, 19_600_000, 538_000_000, 1_234_000_000)] == [
        "0.9 kB",
        "47.0 kB",
        "257 kB",
        "19.6 MB",
        "538 MB",
        "1.23 GB",
    ]
    assert [duration(s) for s in (1.23, 42.4, 412, 765, 9000)] == [
        "1.2 s",
        "42 s",
        "6.9 min",
        "13 min",
        "2.5 h",
    ]


def test_the_figure_is_the_same_however_many_methods_there_are(tmp_path):
    for count in (1, 3, 8):
        results = [result(f"method{n}", 0.8 - n / 20, trained=10 ** (n % 4 + 3)) for n in range(count)]
        draw_comparison(comparison(*results), tmp_path / "figure.png")
        image = Image.open(io.BytesIO((tmp_path / "figure.png").read_bytes()))
        assert image.format == "PNG" and image.width == 1800
        assert len(set(image.convert("L").resize((180, 80)).tobytes())) > 20
