"""Results of a method comparison: statistics, table cells, findings and Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deltaw.runs.folder import or_empty
from deltaw.training.evaluation.base import SHARE_METRICS, Interval

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
        interval: 95% interval of the score over seeds and rows.
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
    trained = result.trained_parameters
    total = result.total_parameters
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
    return with_interval(comparison, result.difference, result.difference_interval, is_difference=True)


def column_titles(comparison: Comparison) -> list[str]:
    """Return the column titles with the names of the metric and the reference."""
    reference_name = comparison.reference if comparison.requested_reference and comparison.reference else "the best"
    metric = comparison.metric.replace("_", " ") or "score"
    return [title.replace("score", metric).replace("to the best", f"to {reference_name}") for title in COLUMNS]


def score_text(comparison: Comparison, result: MethodResult) -> str:
    """Return a score with its interval, or ''."""
    return "" if result.score is None else with_interval(comparison, result.score, result.interval)


def with_interval(comparison: Comparison, value: float, bounds: Interval | None, is_difference: bool = False) -> str:
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
            seconds = seconds / 60
            unit = longer
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
    rows = comparison.held_out_rows
    seeds = len(comparison.seeds)
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
    """Report methods that were limited by the budget."""
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
