"""Methods side by side: what each trains, what it costs, how well it does: as numbers, a table, sentences and Markdown.

It starts no training, and does not know how a terminal or a figure shows its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from deltaw.experiments.entry import Entry
from deltaw.runs.folder import mapping
from deltaw.settings import RunConfig
from deltaw.training.evaluation.base import LEVEL, MANY, SHARES, Interval, mean_interval, t_quantile, wilson_interval
from deltaw.training.monitoring.generation import WORSE

# Intervals of scores over seeds and rows together.
#
# Every method is scored on the same rows with each of a few seeds, so seeds and rows are crossed, and both are
# samples: of other trainings, and of other rows. The model is the two-way random-effects one,
#
# score of seed s on row r = mean + a_s + b_r + e_sr,
#
# in which the variance of the mean over S seeds and R rows is σ²_a/S + σ²_b/R + σ²_e/(S·R). Each part is
# estimated from the mean squares; a negative estimate counts as zero. The interval is the mean ± t·(standard
# error), with Satterthwaite's degrees of freedom (Satterthwaite 1946, "An approximate distribution of estimates
# of variance components"). This is how studies in which several readers read the same cases are evaluated
# (Hillis 2007, "A comparison of denominator degrees of freedom methods for multiple observer ROC analysis").
# With three seeds that differ much, the degrees of freedom are near 2 and t is near 4.3: few seeds give a wide
# interval, which a bootstrap of three seeds would not (it takes two thirds of their variance, and no t).
#
# A share of rows gets Wilson's interval, for as many independent rows as have that variance.
#
# The interval of a difference between two methods is that of the row-by-row, seed-by-seed differences; of
# shares, with half a row more in each of the four cells (Agresti and Min 2005, "Simple improved confidence
# intervals for comparing matched proportions"), so that methods that agree on a few rows are not called equal.
#
# It knows numbers alone.


def interval_of(scores: np.ndarray, level: float = LEVEL, *, share: bool = False) -> Interval | None:
    """The interval of the mean of ``scores``, (seeds, rows); None where one row tells nothing of it.

    With one seed it covers the choice of rows alone.

    Args:
        share: whether the mean is a share of rows.
    """
    seeds, rows = scores.shape
    if seeds == 1:
        return mean_interval(scores[0], share=share, level=level)
    mean = float(scores.mean())
    of_seeds, of_rows, of_rest = mean_squares(scores)
    if rows == 1:
        total, freedom = of_seeds, seeds - 1.0
    else:
        total = max(of_seeds, of_rest) + max(of_rows - of_rest, 0.0)
        spread = of_seeds**2 / (seeds - 1) + of_rows**2 / (rows - 1) + of_rest**2 / ((seeds - 1) * (rows - 1))
        freedom = max(1.0, total**2 / spread) if spread else MANY
    variance = total / (seeds * rows)
    if share:
        count = min(seeds * rows, mean * (1 - mean) / variance) if variance else rows
        return wilson_interval(mean, count, level=level, freedom=freedom)
    half = t_quantile(level, freedom) * math.sqrt(variance)
    return mean - half, mean + half


def difference_interval(differences: np.ndarray, *, share: bool) -> Interval | None:
    """The interval of the mean difference of two methods on the same rows, (seeds, rows)."""
    if not share:
        return interval_of(differences)
    pseudo = np.tile(math.sqrt(0.5) * np.array([[1.0, -1.0]]), (len(differences), 1))
    found = interval_of(np.hstack([differences, pseudo]))
    return found and (max(-1.0, found[0]), min(1.0, found[1]))


def mean_squares(scores: np.ndarray) -> tuple[float, float, float]:
    """Mean squares of seeds, of rows, and of what is left, of (seeds, rows); 0 where there is only one."""
    seeds, rows = scores.shape
    mean = scores.mean()
    by_seed = scores.mean(axis=1, keepdims=True) - mean
    by_row = scores.mean(axis=0, keepdims=True) - mean
    rest = scores - mean - by_seed - by_row
    return (
        float(rows * (by_seed**2).sum() / max(1, seeds - 1)),
        float(seeds * (by_row**2).sum() / max(1, rows - 1)),
        float((rest**2).sum() / max(1, (seeds - 1) * (rows - 1))),
    )


BASE = "untrained"


@dataclass(frozen=True)
class SeedResult:
    """One final training of a method.

    Attributes:
        seed: of the initialization, the order of rows and dropout.
        score: on the held-out rows, at the step of the lowest validation loss, ``best_step``.
        steps, seconds: of the whole training, without evaluations.
        flattened: whether the validation loss flattened before the budget ended.
        validation_loss: the lowest. validation: step and loss of each evaluation.
        one_answer: what every row was answered; None where answers differ.
        worse: reasons why the model's text got worse; None if it did not, or was not compared.
    """

    seed: int
    score: float | None
    steps: int
    best_step: int
    flattened: bool
    seconds: float
    validation_loss: float
    validation: tuple[tuple[int, float], ...] = ()
    one_answer: str | None = None
    worse: str | None = None


@dataclass(frozen=True)
class MethodResult:
    """One method's line; what is not known is None.

    Attributes:
        method: its name, or ``untrained`` for the base model.
        learning_rate: of the final trainings.
        rates: those that were tried, with their validation loss; None where training diverged.
        trained_parameters: M. total_parameters: N, of the base model with its head.
        adapter_bytes: of the files that hold what was trained.
        planned_bytes, peak_bytes: peak memory of a training, planned and measured, the most of all seeds.
        seconds, steps: of the training loop, the mean over seeds.
        score, interval: the metric on the held-out rows, the mean over seeds, and its interval at 95 % over
            seeds and rows.
        difference, difference_interval: score minus that of the comparison's reference, over the same seeds
            and rows.
        over_constant, over_constant_interval: score minus that of the best answer to give to every row.
        seeds: one by one. one_answer: of the untrained model, what it answers to every row.
        error: why there is no result.
    """

    method: str
    learning_rate: float | None = None
    rates: tuple[tuple[float, float | None], ...] = ()
    trained_parameters: int | None = None
    total_parameters: int | None = None
    adapter_bytes: int | None = None
    planned_bytes: int | None = None
    peak_bytes: int | None = None
    seconds: float | None = None
    steps: int | None = None
    score: float | None = None
    interval: Interval | None = None
    difference: float | None = None
    difference_interval: Interval | None = None
    over_constant: float | None = None
    over_constant_interval: Interval | None = None
    seeds: tuple[SeedResult, ...] = ()
    one_answer: str | None = None
    error: str | None = None

    @property
    def clearly_other(self) -> bool:
        """Whether the interval of the difference to the reference leaves zero out."""
        bounds = self.difference_interval
        return bounds is not None and (bounds[0] > 0 or bounds[1] < 0)

    @property
    def learned_nothing(self) -> bool:
        """Whether it gives one answer to every row, with every seed."""
        return bool(self.seeds) and all(seed.one_answer is not None for seed in self.seeds)

    @property
    def ranked(self) -> bool:
        """Whether it takes part in the ranking."""
        return self.score is not None and not self.learned_nothing

    @property
    def flattened(self) -> int:
        """With how many seeds the validation loss flattened."""
        return sum(seed.flattened for seed in self.seeds)


@dataclass(frozen=True)
class Comparison:
    """Several methods on the same rows.

    Attributes:
        folder: where it is written. model, task: as in the settings.
        metric: the name of the score. higher_is_better: which way it counts.
        held_out_rows: that the score is taken over. training_rows: without validation rows.
        results: one line a method, the best first, then those that learned nothing, then those without a
            score.
        base: the untrained model's line, where it has a score.
        seeds: with which each method was trained.
        reference: the method that the others are compared with. asked_reference: the one that was named for
            it; None for the best.
        constant_answer, constant_score: the best answer to give to every row, and its score.
    """

    folder: str
    model: str
    task: str
    metric: str
    higher_is_better: bool
    held_out_rows: int
    results: tuple[MethodResult, ...]
    base: MethodResult | None = None
    training_rows: int | None = None
    seeds: tuple[int, ...] = (0,)
    reference: str | None = None
    asked_reference: str | None = None
    constant_answer: str | None = None
    constant_score: float | None = None

    @property
    def scored(self) -> list[MethodResult]:
        return [result for result in self.results if result.score is not None]

    @property
    def ranked(self) -> list[MethodResult]:
        """Those that have a score and learned something, the best first."""
        return [result for result in self.results if result.ranked]

    @property
    def lines(self) -> list[MethodResult]:
        """All lines of the table."""
        return [*self.results, *([self.base] if self.base is not None else [])]

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        values = asdict(self)
        values["methods"] = values.pop("results")
        for result, method in zip(self.results, values["methods"], strict=True):
            flat = result.flattened == len(result.seeds) if result.seeds else None
            method |= {"learned_nothing": result.learned_nothing, "flattened": flat}
        return {key: without_nan(value) for key, value in values.items()}


COLUMNS = (
    "method",
    "learning rate",
    "trained",
    "of N",
    "on disk",
    "memory planned",
    "measured",
    "time",
    "steps",
    "flattened",
    "score (95 % interval)",
    "to the best (95 % interval)",
)


def failures(comparison: Comparison) -> list[str]:
    """A line for each method without a result."""
    return [f"{result.method}: {result.error}" for result in comparison.results if result.error is not None]


def cells(comparison: Comparison, result: MethodResult) -> list[str]:
    """A line's texts, in the order of :data:`COLUMNS`; empty where nothing is known."""
    trained, total = result.trained_parameters, result.total_parameters
    share = 100 * trained / total if trained is not None and total else None
    flattened = f"{result.flattened} of {len(result.seeds)}"
    if result.flattened in (0, len(result.seeds)):
        flattened = "yes" if result.flattened else "no"
    return [
        f"{result.method} (generation got worse)" if any(seed.worse for seed in result.seeds) else result.method,
        or_empty(result.learning_rate, "{:g}".format),
        or_empty(trained, "{:,}".format),
        "100 %" if share is not None and share >= 100 else or_empty(share, "{:.2g} %".format),
        or_empty(result.adapter_bytes, size),
        or_empty(result.planned_bytes, size),
        or_empty(result.peak_bytes, size),
        or_empty(result.seconds, duration),
        or_empty(result.steps, "{:,}".format),
        flattened if result.seeds else "",
        score_text(comparison, result),
        _relation(comparison, result),
    ]


def or_empty(value: Any, text: Callable[[Any], str]) -> str:
    """``text(value)``; empty for None."""
    return "" if value is None else text(value)


def _relation(comparison: Comparison, result: MethodResult) -> str:
    """The difference from the reference, or why there is none."""
    if result.learned_nothing:
        return "one answer to all"
    if result.method == comparison.reference:
        return "reference" if comparison.asked_reference else "best"
    return _with_interval(comparison, result.difference, result.difference_interval, "+", " to ")


def titles(comparison: Comparison) -> list[str]:
    """The heads of the columns, the score under its metric's name, the difference under its reference's."""
    other = comparison.reference if comparison.asked_reference and comparison.reference else "the best"
    metric = comparison.metric.replace("_", " ") or "score"
    return [title.replace("score", metric).replace("to the best", f"to {other}") for title in COLUMNS]


def score_text(comparison: Comparison, result: MethodResult) -> str:
    """A score with its interval; empty if there is none."""
    return _with_interval(comparison, result.score, result.interval, "", "–", unit(comparison))


def _with_interval(
    comparison: Comparison, value: float | None, bounds: Interval | None, sign: str, between: str, unit: str = ""
) -> str:
    if value is None:
        return ""
    shown = "" if bounds is None else between.join(number_text(comparison, bound, sign) for bound in bounds)
    return number_text(comparison, value, sign) + unit + (f" ({shown})" if shown else "")


def unit(comparison: Comparison) -> str:
    """What stands behind a score."""
    return " %" if comparison.metric in SHARES else ""


def number_text(comparison: Comparison, value: float, sign: str = "") -> str:
    """A score, or a difference of scores, of shares in percent without their mark."""
    text = f"{100 * value:{sign}.1f}" if comparison.metric in SHARES else f"{value:{sign}.4f}"
    return text.replace("-", "−")


def size(count: int) -> str:
    """Bytes as a person reads them."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    number, unit = (count / 1e6, "MB") if count >= 1e6 else (count / 1e3, "kB")
    return f"{number:.{int(number < 100)}f} {unit}"


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    unit = "s"
    for longer in ("min", "h"):
        if seconds >= 60:
            seconds, unit = seconds / 60, longer
    return f"{seconds:.{int(seconds < 10)}f} {unit}"


def listed(results: Sequence[MethodResult]) -> str:
    """Their names, with "and" before the last."""
    return joined([result.method for result in results])


def joined(parts: Sequence[str]) -> str:
    """The parts, with "and" before the last."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def without_nan(value: object) -> object:
    """``value`` with every number in it that is not finite as None, for JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return value


# From what is stored of each method to the comparison: scores over seeds, differences, intervals, ranks.
#
# Only what is stored counts.


Found = Mapping[str, Any]
Scores: TypeAlias = np.ndarray | None


def gathered(
    config: RunConfig,
    entries: Sequence[Entry],
    base: Entry | None,
    *,
    seeds: Sequence[int],
    reference: str | None,
    folder: str,
) -> Comparison:
    """Everything known so far. The best comes first; methods that learned nothing come after all others, and
    those without a result last.

    Args:
        seeds: that are asked for; a method counts once it has a result for each.
        reference: the method that the others are compared with; None for the best.
    """
    runs = {entry.method: entry.runs(seeds) for entry in entries}
    results = [_result(entry, runs[entry.method], seeds) for entry in entries]
    scored = next((runs[r.method][0] for r in results if r.score is not None), None)
    metric = "" if scored is None else str(scored["score"]["metric"])
    higher = scored is None or bool(scored["higher_is_better"])
    results.sort(key=lambda result: _order(result, higher))
    ranked = [result.method for result in results if result.ranked]
    chosen = reference if reference in ranked else next(iter(ranked), None)
    against = matrix(runs[chosen]) if chosen is not None else None
    constant = {} if scored is None else scored.get("constant") or {}
    baseline = np.asarray(constant["per_row"])[None] if constant else None
    share = metric in SHARES
    results = [_compared(r, matrix(runs[r.method]), against, baseline, chosen, share=share) for r in results]
    untrained = None
    if base is not None and "score" in base.piece:
        alone = _result(base, [base.piece], [0])
        untrained = _compared(alone, matrix([base.piece]), against, None, chosen, share=share)
    return Comparison(
        folder=folder,
        model=config.model,
        task=config.task,
        metric=metric,
        higher_is_better=higher,
        held_out_rows=0 if scored is None or scored["per_row"] is None else len(scored["per_row"]),
        training_rows=None if scored is None else scored.get("training_rows"),
        seeds=tuple(seeds),
        reference=chosen,
        asked_reference=reference,
        constant_answer=constant.get("answer"),
        constant_score=None if baseline is None else float(baseline.mean()),
        results=tuple(results),
        base=untrained,
    )


def matrix(runs: Sequence[Found]) -> Scores:
    """(seeds, rows): what each held-out row scores; None where the metric has no such form."""
    rows = [run.get("per_row") for run in runs]
    lengths = {len(row) if isinstance(row, list) else None for row in rows}
    return None if len(lengths) != 1 or None in lengths else np.asarray(rows, dtype=np.float64)


def _order(result: MethodResult, higher: bool) -> tuple[int, float]:
    if result.score is None:
        return 2, 0.0
    return 0 if result.ranked else 1, -result.score if higher else result.score


def _result(entry: Entry, runs: Sequence[Found], seeds: Sequence[int]) -> MethodResult:
    """A method's numbers over its seeds."""
    tried = entry.counted() if not entry.fixed else {}
    rates = tuple((rate, loss if math.isfinite(loss) else None) for rate, loss in sorted(tried.items()))
    error = entry.error
    if error is not None or len(runs) < len(seeds):
        why = f"{len(runs)} of {len(seeds)} seeds trained" if runs else "not yet trained"
        if error is not None:
            why = f"{error.what} ({error.where})" if error.where else error.what
        return MethodResult(entry.method, error=why, rates=rates)
    first, is_run = runs[0], entry.method != BASE
    values = [run["score"]["value"] for run in runs if run["score"] is not None]
    score = float(np.mean(values)) if len(values) == len(runs) and None not in values else None
    return MethodResult(
        entry.method,
        learning_rate=entry.chosen() if is_run else None,
        rates=rates,
        trained_parameters=first.get("trained_parameters") if is_run else 0,
        total_parameters=first.get("total_parameters"),
        adapter_bytes=first.get("adapter_bytes"),
        planned_bytes=next((n for run in runs if (n := run.get("planned_memory_bytes"))), None),
        peak_bytes=max(run.get("peak_memory_bytes") or 0 for run in runs) or None,
        seconds=float(np.mean([run["seconds"] for run in runs])) if is_run else None,
        steps=round(float(np.mean([run["steps"] for run in runs]))) if is_run else None,
        score=score,
        interval=_interval(runs, score, str(first["score"]["metric"])) if score is not None else None,
        seeds=tuple(_seed(seed, run) for seed, run in zip(seeds, runs, strict=True)) if is_run else (),
        one_answer=None if is_run else first.get("one_answer"),
    )


def _seed(seed: int, run: Found) -> SeedResult:
    same = {name: run[name] for name in ("steps", "best_step", "flattened", "seconds", "validation_loss")}
    score = run["score"]["value"] if run["score"] is not None else None
    validation = tuple((int(step), float(loss)) for step, loss in run["validation"])
    generation = mapping(run.get("generation"))
    worse = str(generation["line"]) if generation.get("verdict") == WORSE else None
    return SeedResult(seed, score=score, validation=validation, one_answer=run.get("one_answer"), worse=worse, **same)


def _interval(runs: Sequence[Found], score: float, metric: str) -> Interval | None:
    """Of the score over seeds and rows; around the score, which of a loss is not the mean over rows."""
    scores = matrix(runs)
    found = None if scores is None else interval_of(scores, share=metric in SHARES)
    if scores is None or found is None:
        return None
    apart = score - float(scores.mean())
    return found[0] + apart, found[1] + apart


def _compared(
    result: MethodResult, ours: Scores, theirs: Scores, baseline: Scores, reference: str | None, *, share: bool
) -> MethodResult:
    """Add the difference from the reference, seed by seed and row by row, and that from the best constant
    answer. ``share``: whether scores are shares of rows."""
    if result.score is None or ours is None:
        return result
    if baseline is not None and baseline.shape[1] == ours.shape[1]:
        over = ours - baseline
        bounds = difference_interval(over, share=share)
        result = replace(result, over_constant=float(over.mean()), over_constant_interval=bounds)
    if theirs is None or theirs.shape[1] != ours.shape[1]:
        return result
    if result.method == reference:
        return replace(result, difference=0.0, difference_interval=(0.0, 0.0))
    if len(ours) not in (1, len(theirs)):
        return result
    over = ours - theirs
    bounds = difference_interval(over, share=share)
    return replace(result, difference=float(over.mean()), difference_interval=bounds)


# What a comparison's numbers say, in sentences, and its page.
#
# It knows numbers alone. It says no more than the intervals allow: which differences hold, what had not
# flattened, and what learned nothing.


def as_json(comparison: Comparison) -> dict[str, object]:
    """All numbers and what they say, as plain values."""
    return {**comparison.as_dict(), "findings": findings(comparison)}


def findings(comparison: Comparison) -> list[str]:
    """What the numbers say."""
    if not comparison.scored:
        return []
    lines = [
        *[f"{r.method}, seed {seed.seed}: {seed.worse}" for r in comparison.scored for seed in r.seeds if seed.worse],
        *_ranking(comparison),
        *_against_reference(comparison),
        *_untrained(comparison),
        *[line for result in comparison.scored for line in _learned(comparison, result)],
        *_flattening(comparison),
        *[line for result in comparison.scored for line in _edge(result)],
    ]
    if len(comparison.seeds) == 1:
        lines.append("One seed is weak evidence: other initializations and orders of rows differ (--seeds 3).")
    return lines


def _ranking(comparison: Comparison) -> list[str]:
    """Which method is best, and where no reference was named, which ones cannot be told from it."""
    if not comparison.ranked:
        return []
    best, *others = comparison.ranked
    equal = [r for r in comparison.ranked if r.score == best.score]
    are = f"{best.method} is best" if len(equal) == 1 else f"{listed(equal)} share the best score"
    rows, seeds = comparison.held_out_rows, len(comparison.seeds)
    on = f"on {rows} held-out row{'s' if rows != 1 else ''}{'' if seeds == 1 else f', mean of {seeds} seeds'}"
    lines = [f"{are}: {comparison.metric} {score_text(comparison, best)} {on}."]
    if best.method != comparison.reference:
        return lines
    near = [r for r in others if r.difference_interval is not None and not r.clearly_other]
    far = [r for r in others if r.clearly_other]
    if near:
        these = "These rows" if seeds == 1 else "These seeds and rows"
        lines.append(f"{these} do not tell {listed(near)} from it: the interval of the difference holds 0.")
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
    groups = {
        "clearly better": [r for r in others if r.clearly_other and sign * (r.difference or 0) > 0],
        "clearly worse": [r for r in others if r.clearly_other and sign * (r.difference or 0) < 0],
        "not told apart": [r for r in others if not r.clearly_other],
    }
    parts = [f"{name}: {listed(group)}" for name, group in groups.items() if group]
    return [f"Compared with {comparison.reference}, {'; '.join(parts)}."]


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
        what = f"{result.method} learned nothing{'' if len(result.seeds) == 1 else ' with every seed'}"
        return [f"{what}: it gives every row the same answer ({answers}). It is not ranked."]
    lines = []
    if same:
        lines.append(f"{result.method} gives one answer to every row with {len(same)} of {len(result.seeds)} seeds.")
    bounds = result.over_constant_interval
    if bounds is not None and comparison.constant_score is not None:
        better = bounds[0] > 0 if comparison.higher_is_better else bounds[1] < 0
        score = number_text(comparison, comparison.constant_score) + unit(comparison)
        if not better:
            constant = f"the answer '{comparison.constant_answer}' to every row ({score})"
            lines.append(f"{result.method} is not clearly better than {constant}.")
    return lines


def _flattening(comparison: Comparison) -> list[str]:
    """Methods that the budget stopped while they were still learning."""
    names = []
    for result in comparison.scored:
        count = len(result.seeds)
        if result.flattened < count:
            some = f" ({count - result.flattened} of {count} seeds)" if result.flattened else ""
            names.append(f"{result.method}{some}")
    hint = "With more training the order may change (--train.epochs, --budget)."
    return [f"Not flattened when the budget ended: {joined(names)}. {hint}"] if names else []


def _cheapest(equals: Sequence[MethodResult]) -> list[str]:
    """Of methods that are not told apart, which asks for least."""
    costs: dict[str, tuple[str, Callable[[Any], str]]] = {
        "trained_parameters": ("the fewest parameters", "{:,}".format),
        "peak_bytes": ("the least memory", size),
        "seconds": ("the least time", duration),
    }
    said: dict[str, list[str]] = {}
    for name, (what, text) in costs.items():
        least = min(equals, key=lambda r: getattr(r, name) or math.inf)
        if cost := getattr(least, name):
            said.setdefault(least.method, []).append(f"{what} ({text(cost)})")
    parts = [f"{method} takes {joined(what)}" for method, what in said.items()]
    return [f"Of these, {', '.join(parts)}."] if parts else []


def _edge(result: MethodResult) -> list[str]:
    """Whether a better learning rate may lie beyond those that were tried."""
    rates = sorted(rate for rate, _ in result.rates)
    if len(rates) < 2 or result.learning_rate not in (rates[0], rates[-1]):
        return []
    way = "low" if result.learning_rate == rates[0] else "high"
    best = f"its best learning rate, {result.learning_rate:g}, is the {way}est tried"
    return [f"{result.method}: {best}; a {way}er one may do better (--rates)."]


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """A table as lines of Markdown, with an empty line behind it; the first ``left`` columns stand at the left."""
    rule = ["---"] * left + ["---:"] * (len(heads) - left)
    return [*(f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows)), ""]


def comparison_markdown(comparison: Comparison, figure: str | None = None) -> str:
    """The table, what it says, and what was tried, as a page.

    Args:
        figure: the name of an image file beside the page.
    """
    seeds = f"{len(comparison.seeds)} seed{'s' if len(comparison.seeds) != 1 else ''}"
    trained = or_empty(comparison.training_rows, "trained on {:,} rows, ".format)
    scored = f"{trained}{seeds}, scored on {comparison.held_out_rows:,} held-out rows that no choice was made by"
    lines = [
        "# Methods compared",
        "",
        f"Model `{comparison.model}`, task {comparison.task}: the same rows and seeds for each method; {scored}. "
        "Each training went on until its validation loss flattened or the budget ended.",
        "",
        *markdown_table(titles(comparison), [cells(comparison, r) for r in comparison.lines if r.error is None]),
        *[f"- {line}" for line in findings(comparison)],
        *[f"- {line}" for line in failures(comparison)],
        "",
    ]
    if figure is not None:
        lines += [f"![score over trained parameters, and peak memory]({figure})", ""]
    return "\n".join([*lines, *_seed_table(comparison), *_rate_table(comparison)])


def _seed_table(comparison: Comparison) -> list[str]:
    """Each training on a line of its own, if there are several seeds."""
    rows = []
    for result in comparison.results if len(comparison.seeds) > 1 else ():
        for seed in result.seeds:
            score = _with_interval(comparison, seed.score, None, "", "", unit(comparison))
            steps, flat = [f"{seed.steps:,}", f"{seed.best_step:,}"], "yes" if seed.flattened else "no"
            rows.append([result.method, str(seed.seed), score, *steps, flat, f"{seed.validation_loss:.4f}"])
    metric = comparison.metric.replace("_", " ")
    heads = ("method", "seed", metric, "steps", "best step", "flattened", "validation loss")
    return ["## Seed by seed", "", *markdown_table(heads, rows)] if rows else []


def _rate_table(comparison: Comparison) -> list[str]:
    rows = []
    for result in comparison.results:
        losses = {rate: "diverged" if loss is None else f"{loss:.4f}" for rate, loss in sorted(result.rates)}
        if len(losses) > 1:
            rows.append((result.method, ", ".join(f"{rate:g}: {loss}" for rate, loss in losses.items())))
    said = (
        "The loss is the lowest on rows taken out of the training rows, with the first seed and a share of the budget."
    )
    table = markdown_table(("method", "rate: validation loss"), rows, left=2)
    return ["## Learning rates tried", "", *table, said, ""] if rows else []
