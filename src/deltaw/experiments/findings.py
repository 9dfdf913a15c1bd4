"""What a comparison's numbers say, in sentences, and its page.

It knows numbers alone. It says no more than the intervals allow: which differences hold, what had not
flattened, and what learned nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from deltaw.experiments.comparison import (
    COLUMNS,
    Comparison,
    MethodResult,
    cells,
    duration,
    joined,
    listed,
    number_text,
    score_text,
    size,
    titles,
    unit,
)


def as_json(comparison: Comparison) -> dict[str, object]:
    """All numbers and what they say, as plain values."""
    return {**comparison.as_dict(), "findings": findings(comparison)}


def failures(comparison: Comparison) -> list[str]:
    """A line for each method without a result."""
    return [f"{result.method}: {result.error}" for result in comparison.results if result.error is not None]


def findings(comparison: Comparison) -> list[str]:
    """What the numbers say."""
    if not comparison.scored:
        return []
    lines = [
        *_ranking(comparison),
        *_against_reference(comparison),
        *_untrained(comparison),
        *[line for result in comparison.scored for line in _learned(comparison, result)],
        *_flattening(comparison),
        *[line for result in comparison.scored for line in _edge(result)],
    ]
    if len(comparison.seeds) == 1:
        lines.append(
            "One seed is weak evidence: the intervals do not cover what another initialization and order of "
            "rows would change (--seeds 3)."
        )
    return lines


def _ranking(comparison: Comparison) -> list[str]:
    """Which method is best, and where no reference was named, which ones cannot be told from it."""
    if not comparison.ranked:
        return []
    best, *others = comparison.ranked
    equal = [r for r in comparison.ranked if r.score == best.score]
    are = f"{best.method} is best" if len(equal) == 1 else f"{listed(equal)} share the best score"
    lines = [f"{are}: {comparison.metric} {score_text(comparison, best)} {_on(comparison)}."]
    if best.method != comparison.reference:
        return lines
    near = [r for r in others if r.difference_interval is not None and not r.clearly_other]
    far = [r for r in others if r.clearly_other]
    if near:
        lines.append(f"{_they(comparison)} {listed(near)} from it: the interval of the difference holds 0.")
        lines += _cheapest([best, *near])
    if far:
        lines.append(f"Clearly worse: {listed(far)}.")
    return lines


def _against_reference(comparison: Comparison) -> list[str]:
    """How the methods stand to a named reference that is not the best."""
    best = comparison.ranked[:1]
    if comparison.asked_reference and comparison.reference != comparison.asked_reference:
        return [f"{comparison.asked_reference} cannot be the reference: it has no score that is ranked."]
    if not best or best[0].method == comparison.reference:
        return []
    sign = 1 if comparison.higher_is_better else -1
    others = [r for r in comparison.ranked if r.method != comparison.reference and r.difference is not None]
    better = [r for r in others if r.clearly_other and sign * (r.difference or 0) > 0]
    worse = [r for r in others if r.clearly_other and sign * (r.difference or 0) < 0]
    near = [r for r in others if not r.clearly_other]
    parts = [
        f"clearly better: {listed(better)}" if better else "",
        f"clearly worse: {listed(worse)}" if worse else "",
        f"not told apart: {listed(near)}" if near else "",
    ]
    return [f"Compared with {comparison.reference}, {'; '.join(part for part in parts if part)}."]


def _untrained(comparison: Comparison) -> list[str]:
    base = comparison.base
    if base is None or base.difference_interval is None or comparison.reference is None:
        return []
    sign = 1 if comparison.higher_is_better else -1
    holds = base.clearly_other and sign * (base.difference or 0) < 0
    better = "is clearly better than" if holds else "is not clearly better than"
    return [f"{comparison.reference} {better} the untrained model."]


def _learned(comparison: Comparison, result: MethodResult) -> list[str]:
    """Whether a method gives one answer to every row, or does no better than such an answer."""
    same = [seed for seed in result.seeds if seed.one_answer is not None]
    if result.learned_nothing:
        answers = joined(sorted({f"'{seed.one_answer}'" for seed in same}))
        every = "" if len(result.seeds) == 1 else " with every seed"
        return [
            f"{result.method} learned nothing{every}: it gives every row the same answer ({answers}). It is "
            "not ranked."
        ]
    lines = []
    if same:
        lines.append(
            f"{result.method} gives one answer to every row with {len(same)} of {len(result.seeds)} seeds."
        )
    bounds = result.over_constant_interval
    if bounds is not None and comparison.constant_score is not None:
        better = bounds[0] > 0 if comparison.higher_is_better else bounds[1] < 0
        score = number_text(comparison, comparison.constant_score) + unit(comparison)
        if not better:
            lines.append(
                f"{result.method} is not clearly better than the answer '{comparison.constant_answer}' to "
                f"every row ({score})."
            )
    return lines


def _flattening(comparison: Comparison) -> list[str]:
    """Methods that the budget stopped while they were still learning."""
    unfinished = [r for r in comparison.scored if r.seeds and r.flattened < len(r.seeds)]
    if not unfinished:
        return []
    names = [
        r.method if not r.flattened else f"{r.method} ({len(r.seeds) - r.flattened} of {len(r.seeds)} seeds)"
        for r in unfinished
    ]
    return [
        f"Not flattened when the budget ended: {joined(names)}. With more training the order may change "
        "(--train.epochs, --budget)."
    ]


def _on(comparison: Comparison) -> str:
    rows = f"on {comparison.held_out_rows} held-out row{'s' if comparison.held_out_rows != 1 else ''}"
    return rows if len(comparison.seeds) == 1 else f"{rows}, mean of {len(comparison.seeds)} seeds"


def _they(comparison: Comparison) -> str:
    return "These rows do not tell" if len(comparison.seeds) == 1 else "These seeds and rows do not tell"


def _cheapest(equals: Sequence[MethodResult]) -> list[str]:
    """Of methods that are not told apart, which asks for least."""
    said: dict[str, list[str]] = {}
    small = min(equals, key=lambda r: r.trained_parameters or math.inf)
    if small.trained_parameters:
        said.setdefault(small.method, []).append(f"the fewest parameters ({small.trained_parameters:,})")
    lean = min(equals, key=lambda r: r.peak_bytes or math.inf)
    if lean.peak_bytes:
        said.setdefault(lean.method, []).append(f"the least memory ({size(lean.peak_bytes)})")
    quick = min(equals, key=lambda r: r.seconds or math.inf)
    if quick.seconds:
        said.setdefault(quick.method, []).append(f"the least time ({duration(quick.seconds)})")
    parts = [f"{method} takes {joined(what)}" for method, what in said.items()]
    return [f"Of these, {', '.join(parts)}."] if parts else []


def _edge(result: MethodResult) -> list[str]:
    """Whether a better learning rate may lie beyond those that were tried."""
    rates = sorted(rate for rate, _ in result.rates)
    if len(rates) < 2 or result.learning_rate not in (rates[0], rates[-1]):
        return []
    way = "lower" if result.learning_rate == rates[0] else "higher"
    return [
        f"{result.method}: its best learning rate, {result.learning_rate:g}, is the {way[:-2]}est tried; "
        f"a {way} one may do better (--rates)."
    ]


def comparison_markdown(comparison: Comparison, figure: str | None = None) -> str:
    """The table, what it says, and what was tried, as a page.

    Args:
        figure: the name of an image file beside the page.
    """
    seeds = f"{len(comparison.seeds)} seed{'s' if len(comparison.seeds) != 1 else ''}"
    trained = "" if comparison.training_rows is None else f"trained on {comparison.training_rows:,} rows, "
    lines = [
        "# Methods compared",
        "",
        f"Model `{comparison.model}`, task {comparison.task}: the same rows and seeds for each method; "
        f"{trained}{seeds}, scored on {comparison.held_out_rows:,} held-out rows that no choice was made by. "
        "Each training went on until its validation loss flattened or the budget ended.",
        "",
        f"| {' | '.join(titles(comparison))} |",
        "| --- |" + " ---: |" * (len(COLUMNS) - 1),
        *[f"| {' | '.join(cells(comparison, r))} |" for r in comparison.lines if r.error is None],
        "",
        *[f"- {line}" for line in findings(comparison)],
        *[f"- {line}" for line in failures(comparison)],
        "",
    ]
    if figure is not None:
        lines += [f"![score over trained parameters, and peak memory]({figure})", ""]
    return "\n".join([*lines, *_seed_table(comparison), *_rate_table(comparison)])


def _seed_table(comparison: Comparison) -> list[str]:
    """Each training on a line of its own, if there are several seeds."""
    if len(comparison.seeds) == 1 or not any(result.seeds for result in comparison.results):
        return []
    metric = comparison.metric.replace("_", " ")
    lines = [
        "## Seed by seed",
        "",
        f"| method | seed | {metric} | steps | best step | flattened | validation loss |",
        "| --- |" + " ---: |" * 6,
    ]
    for result in comparison.results:
        for seed in result.seeds:
            score = "" if seed.score is None else number_text(comparison, seed.score) + unit(comparison)
            flat = "yes" if seed.flattened else "no"
            lines.append(
                f"| {result.method} | {seed.seed} | {score} | {seed.steps:,} | {seed.best_step:,} | {flat} | "
                f"{seed.validation_loss:.4f} |"
            )
    return [*lines, ""]


def _rate_table(comparison: Comparison) -> list[str]:
    tried = [result for result in comparison.results if len(result.rates) > 1]
    if not tried:
        return []
    return [
        "## Learning rates tried",
        "",
        "| method | rate: validation loss |",
        "| --- | --- |",
        *[f"| {result.method} | {_rates(result)} |" for result in tried],
        "",
        "The loss is the lowest on rows taken out of the training rows, with the first seed and a share of "
        "the budget.",
        "",
    ]


def _rates(result: MethodResult) -> str:
    return ", ".join(
        f"{rate:g}: {'diverged' if loss is None else f'{loss:.4f}'}" for rate, loss in sorted(result.rates)
    )
