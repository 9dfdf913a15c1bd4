"""Methods side by side: what each trains, what it costs, how well it does: a table, Markdown, JSON.

It knows numbers alone: not how they were made, and not how a terminal or a figure shows them.
:mod:`deltaw.experiments.findings` puts them into sentences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from deltaw.training.evaluation.metrics import Interval

# Metrics between 0 and 1 that are read as a percentage.
SHARES = ("accuracy", "exact_match")
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
            method |= {
                "learned_nothing": result.learned_nothing,
                "flattened": result.flattened == len(result.seeds) if result.seeds else None,
            }
        return {key: _plain(value) for key, value in values.items()}


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
    return [
        result.method,
        "" if result.learning_rate is None else f"{result.learning_rate:g}",
        "" if trained is None else f"{trained:,}",
        ""
        if trained is None or not total
        else f"{100 * trained / total:.2g} %"
        if trained < total
        else "100 %",
        "" if result.adapter_bytes is None else size(result.adapter_bytes),
        "" if result.planned_bytes is None else size(result.planned_bytes),
        "" if result.peak_bytes is None else size(result.peak_bytes),
        "" if result.seconds is None else duration(result.seconds),
        "" if result.steps is None else f"{result.steps:,}",
        _flattened(result),
        score_text(comparison, result),
        _relation(comparison, result),
    ]


def _flattened(result: MethodResult) -> str:
    if not result.seeds:
        return ""
    count = len(result.seeds)
    if result.flattened in (0, count):
        return "yes" if result.flattened else "no"
    return f"{result.flattened} of {count}"


def _relation(comparison: Comparison, result: MethodResult) -> str:
    """The difference from the reference, or why there is none."""
    if result.learned_nothing:
        return "one answer to all"
    if result.method == comparison.reference:
        return "reference" if comparison.asked_reference else "best"
    return _difference(comparison, result)


def titles(comparison: Comparison) -> list[str]:
    """The heads of the columns, the score under its metric's name, the difference under its reference's."""
    reference = comparison.asked_reference and comparison.reference
    return [
        title.replace("score", comparison.metric.replace("_", " ") or "score").replace(
            "to the best", f"to {reference}" if reference else "to the best"
        )
        for title in COLUMNS
    ]


def score_text(comparison: Comparison, result: MethodResult) -> str:
    """A score with its interval; empty where there is none."""
    if result.score is None:
        return ""
    text = number_text(comparison, result.score) + unit(comparison)
    if result.interval is not None:
        text += " ({}–{})".format(*(number_text(comparison, bound) for bound in result.interval))
    return text


def _difference(comparison: Comparison, result: MethodResult) -> str:
    if result.difference is None:
        return ""
    text = number_text(comparison, result.difference, "+")
    if result.difference_interval is not None:
        text += " ({} to {})".format(*(number_text(comparison, b, "+") for b in result.difference_interval))
    return text


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
    return f"{number:.1f} {unit}" if number < 100 else f"{number:.0f} {unit}"


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    for number, unit in ((seconds / 3600, "h"), (seconds / 60, "min")):
        if number >= 1:
            return f"{number:.1f} {unit}" if number < 10 else f"{number:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def listed(results: Sequence[MethodResult]) -> str:
    """Their names, with "and" before the last."""
    return joined([result.method for result in results])


def joined(parts: Sequence[str]) -> str:
    """The parts, with "and" before the last."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _plain(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
