"""Results of a method comparison: statistics, table cells, findings and Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from deltaw.experiments.entry import ComparedMethod
from deltaw.runs.folder import mapping, or_empty
from deltaw.settings.config import RunConfig
from deltaw.training.evaluation.base import (
    CONFIDENCE,
    MAX_FREEDOM,
    SHARE_METRICS,
    Interval,
    mean_interval,
    t_quantile,
    wilson_interval,
)
from deltaw.training.monitoring.generation import WORSE

# Intervals of scores over seeds and rows.
#
# All methods are scored on the same rows with each seed, so seeds and rows are crossed random factors:
#
# score of seed s on row r = mean + a_s + b_r + e_sr
#
# The variance of the mean over S seeds and R rows is σ²_a/S + σ²_b/R + σ²_e/(S·R). Each component is estimated from the
# mean squares, with negative estimates set to zero. The interval is the mean ± t·(standard error) with Satterthwaite's
# degrees of freedom (Satterthwaite 1946, "An approximate distribution of estimates of variance components"), as in
# multi-reader studies (Hillis 2007, "A comparison of denominator degrees of freedom methods for multiple observer ROC
# analysis"). Three seeds that differ much result in about 2 degrees of freedom and t near 4.3. A bootstrap would
# underestimate this interval, because it uses two thirds of the variance of three seeds and no t.
#
# A share of rows has Wilson's interval for the number of independent rows with the same variance.
#
# Differences between two methods use the differences per row and seed. For shares, half a row is added to each of the
# four cells (Agresti and Min 2005, "Simple improved confidence intervals for comparing matched proportions"), so that
# agreement on a small number of rows does not imply equality.


def random_effects_interval(scores: np.ndarray, level: float = CONFIDENCE, *, share: bool = False) -> Interval | None:
    """Return the interval of the mean of ``scores`` (seeds, rows), or None for a single score.

    With one seed, it covers only the sampling of rows.

    Args:
        share: The mean is a share of rows.
    """
    seeds, rows = scores.shape
    if seeds == 1:
        return mean_interval(scores[0], share=share, level=level)
    mean = float(scores.mean())
    by_seed, by_row, residual = mean_squares(scores)
    if rows == 1:
        total, freedom = by_seed, seeds - 1.0
    else:
        total = max(by_seed, residual) + max(by_row - residual, 0.0)
        spread = by_seed**2 / (seeds - 1) + by_row**2 / (rows - 1) + residual**2 / ((seeds - 1) * (rows - 1))
        freedom = max(1.0, total**2 / spread) if spread else MAX_FREEDOM
    variance = total / (seeds * rows)
    if share:
        count = min(seeds * rows, mean * (1 - mean) / variance) if variance else rows
        return wilson_interval(mean, count, level=level, freedom=freedom)
    half_width = t_quantile(level, freedom) * math.sqrt(variance)
    return mean - half_width, mean + half_width


def difference_interval(differences: np.ndarray, *, share: bool) -> Interval | None:
    """Return the interval of the mean of ``differences`` (seeds, rows) between two methods on the same rows."""
    if not share:
        return random_effects_interval(differences)
    pseudo = np.tile(math.sqrt(0.5) * np.array([[1.0, -1.0]]), (len(differences), 1))
    bounds = random_effects_interval(np.hstack([differences, pseudo]))
    return bounds and (max(-1.0, bounds[0]), min(1.0, bounds[1]))


def mean_squares(scores: np.ndarray) -> tuple[float, float, float]:
    """Return the mean squares of seeds, rows and residuals of scores (seeds, rows). They are 0 for a single seed or
    row.
    """
    seeds, rows = scores.shape
    mean = scores.mean()
    by_seed = scores.mean(axis=1, keepdims=True) - mean
    by_row = scores.mean(axis=0, keepdims=True) - mean
    residuals = scores - mean - by_seed - by_row
    return (
        float(rows * (by_seed**2).sum() / max(1, seeds - 1)),
        float(seeds * (by_row**2).sum() / max(1, rows - 1)),
        float((residuals**2).sum() / max(1, (seeds - 1) * (rows - 1))),
    )


BASE = "untrained"


@dataclass(frozen=True)
class SeedResult:
    """Final training of a method with one seed.

    Attributes:
        seed: Seed of the initialization, the order of rows and dropout.
        score: Score on the held-out rows at ``best_step``.
        steps: Number of steps of the training.
        best_step: Step of the lowest validation loss.
        flattened: True if the validation loss flattened within the budget.
        seconds: Training time without evaluations.
        validation_loss: Lowest validation loss.
        validation: Step and loss of each evaluation.
        single_answer: The model's answer if it is the same for all rows, else None.
        worse: Reasons why text generation got worse, or None.
    """

    seed: int
    score: float | None
    steps: int
    best_step: int
    flattened: bool
    seconds: float
    validation_loss: float
    validation: tuple[tuple[int, float], ...] = ()
    single_answer: str | None = None
    worse: str | None = None


@dataclass(frozen=True)
class MethodResult:
    """Results of a method. Unknown values are None.

    Attributes:
        method: Name, or ``untrained`` for the base model.
        learning_rate: Learning rate of the final trainings.
        rates: Tried rates with their validation loss, None if training diverged.
        trained_parameters: Number of trained parameters M.
        total_parameters: Number of parameters N of the base model with its head.
        adapter_bytes: Size of the adapter files.
        planned_bytes: Planned peak memory of a training.
        peak_bytes: Measured peak memory, the maximum over seeds.
        seconds: Mean time of the training loop over seeds.
        steps: Mean number of steps over seeds.
        score: Mean score on the held-out rows over seeds.
        interval: 95 % interval of the score over seeds and rows.
        difference: Score minus that of the reference method, over the same seeds and rows.
        difference_interval: Interval of ``difference``.
        above_constant_answer: Score minus that of the best constant answer.
        over_constant_interval: Interval of ``above_constant_answer``.
        seeds: Results by seed.
        single_answer: Answer of the untrained model if it is the same for all rows.
        error: Reason for a missing result.
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
    above_constant_answer: float | None = None
    over_constant_interval: Interval | None = None
    seeds: tuple[SeedResult, ...] = ()
    single_answer: str | None = None
    error: str | None = None

    @property
    def differs_clearly(self) -> bool:
        """True if the interval of the difference to the reference excludes zero."""
        bounds = self.difference_interval
        return bounds is not None and (bounds[0] > 0 or bounds[1] < 0)

    @property
    def gives_constant_answer(self) -> bool:
        """True if the model's answer is the same for all rows with every seed."""
        return bool(self.seeds) and all(seed.single_answer is not None for seed in self.seeds)

    @property
    def ranked(self) -> bool:
        """True if the method takes part in the ranking."""
        return self.score is not None and not self.gives_constant_answer

    @property
    def flattened(self) -> int:
        """Number of seeds for which the validation loss flattened."""
        return sum(seed.flattened for seed in self.seeds)


@dataclass(frozen=True)
class Comparison:
    """Comparison of methods on the same rows.

    Attributes:
        folder: Folder of the comparison.
        model: Model in the settings.
        task: Task in the settings.
        metric: Name of the score.
        higher_is_better: True if a higher score is better.
        held_out_rows: Number of scored rows.
        results: Results by method: ranked methods from best to worst, methods with constant answers, methods without a
            score.
        base: Result of the untrained model, or None.
        training_rows: Number of training rows without validation rows.
        seeds: Seeds of the final trainings.
        reference: Reference method of the differences.
        requested_reference: Reference selected by the user, or None for the best method.
        constant_answer: Best constant answer.
        constant_score: Score of the best constant answer.
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
    requested_reference: str | None = None
    constant_answer: str | None = None
    constant_score: float | None = None

    @property
    def scored(self) -> list[MethodResult]:
        return [result for result in self.results if result.score is not None]

    @property
    def ranked(self) -> list[MethodResult]:
        """Ranked methods, best first."""
        return [result for result in self.results if result.ranked]

    @property
    def lines(self) -> list[MethodResult]:
        """All rows of the table."""
        return [*self.results, *([self.base] if self.base is not None else [])]

    def as_dict(self) -> dict[str, object]:
        """Return all values and findings for JSON."""
        values = asdict(self)
        values["methods"] = values.pop("results")
        for result, method in zip(self.results, values["methods"], strict=True):
            flat = result.flattened == len(result.seeds) if result.seeds else None
            method |= {"learned_nothing": result.gives_constant_answer, "flattened": flat}
        return {key: without_nan(value) for key, value in values.items()} | {"findings": findings(self)}


COLUMNS = (
    *("method", "learning rate", "trained", "of N", "on disk", "memory planned", "measured", "time", "steps"),
    *("flattened", "score (95 % interval)", "to the best (95 % interval)"),
)


def failures(comparison: Comparison) -> list[str]:
    """Return a line for each method without a result."""
    return [f"{result.method}: {result.error}" for result in comparison.results if result.error is not None]


def method_cells(comparison: Comparison, result: MethodResult) -> list[str]:
    """Return the cells of a method in the order of :data:`COLUMNS`. Unknown values are empty."""
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


def _relation(comparison: Comparison, result: MethodResult) -> str:
    """Return the difference from the reference, or the reason for a missing one."""
    if result.gives_constant_answer:
        return "constant answer"
    if result.method == comparison.reference:
        return "reference" if comparison.requested_reference else "best"
    if result.difference is None:
        return ""
    return _with_interval(comparison, result.difference, result.difference_interval, is_difference=True)


def column_titles(comparison: Comparison) -> list[str]:
    """Return the column titles with the names of the metric and the reference."""
    reference_name = comparison.reference if comparison.requested_reference and comparison.reference else "the best"
    metric = comparison.metric.replace("_", " ") or "score"
    return [title.replace("score", metric).replace("to the best", f"to {reference_name}") for title in COLUMNS]


def score_text(comparison: Comparison, result: MethodResult) -> str:
    """Return a score with its interval, or ''."""
    return "" if result.score is None else _with_interval(comparison, result.score, result.interval)


def _with_interval(comparison: Comparison, value: float, bounds: Interval | None, is_difference: bool = False) -> str:
    sign, between, after = ("+", " to ", "") if is_difference else ("", "–", unit(comparison))
    interval = "" if bounds is None else f" ({between.join(number_text(comparison, b, sign) for b in bounds)})"
    return f"{number_text(comparison, value, sign)}{after}{interval}"


def unit(comparison: Comparison) -> str:
    """Return the unit of a score."""
    return " %" if comparison.metric in SHARE_METRICS else ""


def number_text(comparison: Comparison, value: float, sign: str = "") -> str:
    """Format a score or a difference of scores. Shares are in percent, without the percent sign."""
    text = f"{100 * value:{sign}.1f}" if comparison.metric in SHARE_METRICS else f"{value:{sign}.4f}"
    return text.replace("-", "−")


def size(count: int) -> str:
    """Format a number of bytes."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    number, unit = (count / 1e6, "MB") if count >= 1e6 else (count / 1e3, "kB")
    return f"{number:.{int(number < 100)}f} {unit}"


def duration(seconds: float) -> str:
    """Format seconds."""
    unit = "s"
    for longer in ("min", "h"):
        if seconds >= 60:
            seconds, unit = seconds / 60, longer
    return f"{seconds:.{int(seconds < 10)}f} {unit}"


def join_methods(results: Sequence[MethodResult]) -> str:
    """Join the names of methods with commas and "and"."""
    return join_words([result.method for result in results])


def join_words(parts: Sequence[str]) -> str:
    """Join parts with commas and "and"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def without_nan(value: object) -> object:
    """Convert a value to plain JSON values. Non-finite numbers become None."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)


# Comparisons are computed from the stored results only.


StoredRun = Mapping[str, Any]
Scores: TypeAlias = np.ndarray | None


def build_comparison(
    config: RunConfig,
    entries: Sequence[ComparedMethod],
    base: ComparedMethod | None,
    *,
    seeds: Sequence[int],
    reference: str | None,
    folder: str,
) -> Comparison:
    """Build the comparison from the results so far.

    Args:
        seeds: Requested seeds. A method counts when it has a result for each seed.
        reference: Method that the differences refer to, or None for the best one.
    """
    runs = {entry.method: entry.runs(seeds) for entry in entries}
    results = [_result(entry, runs[entry.method], seeds) for entry in entries]
    scored = next((runs[r.method][0] for r in results if r.score is not None), None)
    metric = "" if scored is None else str(scored["score"]["metric"])
    higher = scored is None or bool(scored["higher_is_better"])
    results.sort(key=lambda result: _sort_key(result, higher))
    ranked = [result.method for result in results if result.ranked]
    chosen = reference if reference in ranked else next(iter(ranked), None)
    target = score_matrix(runs[chosen]) if chosen is not None else None
    constant = {} if scored is None else scored.get("constant") or {}
    baseline = np.asarray(constant["per_row"])[None] if constant else None
    share = metric in SHARE_METRICS
    results = [_compare(r, score_matrix(runs[r.method]), target, baseline, chosen, share=share) for r in results]
    untrained = None
    if base is not None and "score" in base.piece:
        base_result = _result(base, [base.piece], [0])
        untrained = _compare(base_result, score_matrix([base.piece]), target, None, chosen, share=share)
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
        requested_reference=reference,
        constant_answer=constant.get("answer"),
        constant_score=None if baseline is None else float(baseline.mean()),
        results=tuple(results),
        base=untrained,
    )


def score_matrix(runs: Sequence[StoredRun]) -> Scores:
    """Return the scores (seeds, rows) of the held-out rows, or None if the metric has no score per row."""
    rows = [run.get("per_row") for run in runs]
    lengths = {len(row) if isinstance(row, list) else None for row in rows}
    return None if len(lengths) != 1 or None in lengths else np.asarray(rows, dtype=np.float64)


def _sort_key(result: MethodResult, higher: bool) -> tuple[int, float]:
    if result.score is None:
        return 2, 0.0
    return 0 if result.ranked else 1, -result.score if higher else result.score


def _result(entry: ComparedMethod, runs: Sequence[StoredRun], seeds: Sequence[int]) -> MethodResult:
    """Summarize the results of a method over its seeds."""
    tried_losses = entry.comparable_losses() if not entry.fixed else {}
    rates = tuple((rate, loss if math.isfinite(loss) else None) for rate, loss in sorted(tried_losses.items()))
    error = entry.error
    if error is not None or len(runs) < len(seeds):
        reason = f"{len(runs)} of {len(seeds)} seeds trained" if runs else "not yet trained"
        if error is not None:
            reason = f"{error.message} ({error.location})" if error.location else error.message
        return MethodResult(entry.method, error=reason, rates=rates)
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
        single_answer=None if is_run else first.get("single_answer"),
    )


def _seed(seed: int, run: StoredRun) -> SeedResult:
    rest = {name: run[name] for name in ("steps", "best_step", "flattened", "seconds", "validation_loss")}
    score = run["score"]["value"] if run["score"] is not None else None
    losses = tuple((int(step), float(loss)) for step, loss in run["validation"])
    generation = mapping(run.get("generation"))
    worse = str(generation["line"]) if generation.get("verdict") == WORSE else None
    return SeedResult(seed, score=score, validation=losses, single_answer=run.get("single_answer"), worse=worse, **rest)


def _interval(runs: Sequence[StoredRun], score: float, metric: str) -> Interval | None:
    """Return the interval of the score over seeds and rows, shifted to the score, which may differ from the mean over
    rows.
    """
    scores = score_matrix(runs)
    bounds = None if scores is None else random_effects_interval(scores, share=metric in SHARE_METRICS)
    if scores is None or bounds is None:
        return None
    shift = score - float(scores.mean())
    return bounds[0] + shift, bounds[1] + shift


def _compare(
    result: MethodResult, scores: Scores, target: Scores, baseline: Scores, reference: str | None, *, share: bool
) -> MethodResult:
    """Add the differences per seed and row from the reference and from the best constant answer."""
    if result.score is None or scores is None:
        return result
    if baseline is not None and baseline.shape[1] == scores.shape[1]:
        differences = scores - baseline
        bounds = difference_interval(differences, share=share)
        result = replace(result, above_constant_answer=float(differences.mean()), over_constant_interval=bounds)
    if target is None or target.shape[1] != scores.shape[1]:
        return result
    if result.method == reference:
        return replace(result, difference=0.0, difference_interval=(0.0, 0.0))
    if len(scores) not in (1, len(target)):
        return result
    differences = scores - target
    bounds = difference_interval(differences, share=share)
    return replace(result, difference=float(differences.mean()), difference_interval=bounds)


# Findings and the Markdown page. Statements are limited to differences that are supported by the intervals.


def findings(comparison: Comparison) -> list[str]:
    """Return the conclusions of a comparison as sentences."""
    if not comparison.scored:
        return []
    lines = [f"{r.method}, seed {seed.seed}: {seed.worse}" for r in comparison.scored for seed in r.seeds if seed.worse]
    lines += [*_ranking(comparison), *_against_reference(comparison), *_untrained(comparison)]
    lines += [line for result in comparison.scored for line in _learned(comparison, result)]
    lines += [*_flattening(comparison), *(line for result in comparison.scored for line in _edge(result))]
    if len(comparison.seeds) == 1:
        lines.append("One seed is weak evidence: other initializations and orders of rows differ (--seeds 3).")
    return lines


def _ranking(comparison: Comparison) -> list[str]:
    """Return the best method and, without a selected reference, the methods that cannot be distinguished from it."""
    if not comparison.ranked:
        return []
    best, *other_methods = comparison.ranked
    equal = [r for r in comparison.ranked if r.score == best.score]
    verdict = f"{best.method} is best" if len(equal) == 1 else f"{join_methods(equal)} share the best score"
    rows, seeds = comparison.held_out_rows, len(comparison.seeds)
    basis = f"on {rows} held-out row{'s' if rows != 1 else ''}{'' if seeds == 1 else f', mean of {seeds} seeds'}"
    lines = [f"{verdict}: {comparison.metric} {score_text(comparison, best)} {basis}."]
    if best.method != comparison.reference:
        return lines
    similar = [r for r in other_methods if r.difference_interval is not None and not r.differs_clearly]
    different = [r for r in other_methods if r.differs_clearly]
    if similar:
        sample = "these rows" if seeds == 1 else "these seeds and rows"
        lines.append(f"No clear difference to {join_methods(similar)} on {sample}: its interval includes 0.")
        lines += _cheapest([best, *similar])
    if different:
        lines.append(f"Clearly worse: {join_methods(different)}.")
    return lines


def _against_reference(comparison: Comparison) -> list[str]:
    """Compare the methods with a selected reference that is not the best one."""
    best = comparison.ranked[:1]
    if comparison.requested_reference and comparison.reference != comparison.requested_reference:
        return [f"{comparison.requested_reference} cannot be the reference because it is not ranked."]
    if not best or best[0].method == comparison.reference:
        return []
    sign = 1 if comparison.higher_is_better else -1
    other_methods = [r for r in comparison.ranked if r.method != comparison.reference and r.difference is not None]
    groups = {
        "clearly better": [r for r in other_methods if r.differs_clearly and sign * (r.difference or 0) > 0],
        "clearly worse": [r for r in other_methods if r.differs_clearly and sign * (r.difference or 0) < 0],
        "no clear difference": [r for r in other_methods if not r.differs_clearly],
    }
    parts = [f"{name}: {join_methods(group)}" for name, group in groups.items() if group]
    return [f"Compared with {comparison.reference}, {'; '.join(parts)}."]


def _untrained(comparison: Comparison) -> list[str]:
    base = comparison.base
    if base is None or base.difference_interval is None or comparison.reference is None:
        return []
    sign = 1 if comparison.higher_is_better else -1
    is_better = base.differs_clearly and sign * (base.difference or 0) < 0
    relation = "is clearly better than" if is_better else "is not clearly better than"
    return [f"{comparison.reference} {relation} the untrained model."]


def _learned(comparison: Comparison, result: MethodResult) -> list[str]:
    """Report constant answers, and scores that are not better than the best constant answer."""
    single = [seed for seed in result.seeds if seed.single_answer is not None]
    if result.gives_constant_answer:
        answers = join_words(sorted({f"'{seed.single_answer}'" for seed in single}))
        subject = f"{result.method} learned nothing{'' if len(result.seeds) == 1 else ' with any seed'}"
        return [f"{subject}: it gives every row the same answer ({answers}). It is not ranked."]
    lines = []
    if single:
        lines.append(f"{result.method} gives one answer to every row with {len(single)} of {len(result.seeds)} seeds.")
    bounds = result.over_constant_interval
    if bounds is not None and comparison.constant_score is not None:
        is_better = bounds[0] > 0 if comparison.higher_is_better else bounds[1] < 0
        score = number_text(comparison, comparison.constant_score) + unit(comparison)
        if not is_better:
            constant = f"the answer '{comparison.constant_answer}' to every row ({score})"
            lines.append(f"{result.method} is not clearly better than {constant}.")
    return lines


def _flattening(comparison: Comparison) -> list[str]:
    """Report methods whose training was limited by the budget."""
    names = []
    for result in comparison.scored:
        count = len(result.seeds)
        if result.flattened < count:
            seed_text = f" ({count - result.flattened} of {count} seeds)" if result.flattened else ""
            names.append(f"{result.method}{seed_text}")
    hint = "With more training the order may change (--train.epochs, --max-time)."
    return [f"Not flattened when the budget ended: {join_words(names)}. {hint}"] if names else []


def _cheapest(equals: Sequence[MethodResult]) -> list[str]:
    """Report the cheapest of several equivalent methods."""
    costs = {"trained_parameters": "fewest parameters", "peak_bytes": "least memory", "seconds": "least time"}
    formats: tuple[Callable[[Any], str], ...] = ("{:,}".format, size, duration)
    claims: dict[str, list[str]] = {}
    for (name, label), text in zip(costs.items(), formats, strict=True):
        cheapest = min(equals, key=lambda r: getattr(r, name) or math.inf)
        if cost := getattr(cheapest, name):
            claims.setdefault(cheapest.method, []).append(f"the {label} ({text(cost)})")
    parts = [f"{method} needs {join_words(label)}" for method, label in claims.items()]
    return [f"Of these, {', '.join(parts)}."] if parts else []


def _edge(result: MethodResult) -> list[str]:
    """Report a best learning rate at the edge of the tried rates."""
    rates = sorted(rate for rate, _ in result.rates)
    if len(rates) < 2 or result.learning_rate not in (rates[0], rates[-1]):
        return []
    direction = "low" if result.learning_rate == rates[0] else "high"
    best = f"its best learning rate, {result.learning_rate:g}, is the {direction}est tried"
    return [f"{result.method}: {best}; a {direction}er one may do better (--rates)."]


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, num_left: int = 1) -> list[str]:
    """Return a table as lines of Markdown, including an empty last line.

    Args:
        num_left: Number of left-aligned columns at the start.
    """
    rule = ["---"] * num_left + ["---:"] * (len(headers) - num_left)
    return [*(f"| {' | '.join(texts)} |" for texts in (headers, rule, *rows)), ""]


def comparison_markdown(comparison: Comparison, figure: str | None = None) -> str:
    """Return the comparison as a Markdown page.

    Args:
        figure: File name of the figure.
    """
    seeds = f"{len(comparison.seeds)} seed{'s' if len(comparison.seeds) != 1 else ''}"
    trained = or_empty(comparison.training_rows, "trained on {:,} rows, ".format)
    scored = f"{trained}{seeds}, scored on {comparison.held_out_rows:,} held-out rows that were not used for any choice"
    cells = [method_cells(comparison, r) for r in comparison.lines if r.error is None]
    setup = f"Model `{comparison.model}`, task {comparison.task}: the same rows and seeds for each method; {scored}."
    length = "Each training continued until its validation loss flattened or the budget ended."
    table = markdown_table(column_titles(comparison), cells)
    points = [f"- {line}" for line in [*findings(comparison), *failures(comparison)]]
    lines = ["# Methods compared", "", f"{setup} {length}", "", *table, *points, ""]
    if figure is not None:
        lines += [f"![score and peak memory by method]({figure})", ""]
    return "\n".join([*lines, *_seed_table(comparison), *_rate_table(comparison)])


def _seed_table(comparison: Comparison) -> list[str]:
    """Return a table with a row per training of a comparison with several seeds."""
    rows = []
    for result in comparison.results if len(comparison.seeds) > 1 else ():
        for seed in result.seeds:
            score = "" if seed.score is None else _with_interval(comparison, seed.score, None)
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
    explanation = "The loss is the lowest on the validation rows, with the first seed and a share of the budget."
    table = markdown_table(("method", "rate: validation loss"), rows, num_left=2)
    return ["## Learning rates tried", "", *table, explanation, ""] if rows else []
