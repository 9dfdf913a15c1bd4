"""Methods side by side: what each trains, what it costs, how well it does: sentences, Markdown, JSON.

It knows numbers alone: not how they were made, and not how a terminal or a figure shows them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

Interval = tuple[float, float]
# Metrics between 0 and 1 that are read as a percentage.
SHARES = ("accuracy", "exact_match")
BASE = "untrained"


@dataclass(frozen=True)
class MethodResult:
    """One method's line; what is not known is None.

    Attributes:
        method: its name, or ``untrained`` for the base model.
        learning_rate: of the final run.
        rates: those that were tried, with their validation loss; None where training diverged.
        trained_parameters: M. total_parameters: N, of the base model with its head.
        adapter_bytes: of the files that hold what was trained.
        planned_bytes, peak_bytes: peak memory of the run, planned and measured.
        seconds: of the training loop, over ``steps`` optimizer steps.
        score, interval: the metric on the held-out rows, and its interval at 95 %.
        difference, difference_interval: score minus the best method's, over the same rows.
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
    error: str | None = None

    @property
    def clearly_other(self) -> bool:
        """Whether the interval of the difference to the best leaves zero out."""
        bounds = self.difference_interval
        return bounds is not None and (bounds[0] > 0 or bounds[1] < 0)


@dataclass(frozen=True)
class Comparison:
    """Several methods on the same rows.

    Attributes:
        folder: where it is written. model, task: as in the settings.
        metric: the name of the score. higher_is_better: which way it counts.
        held_out_rows: that the score is taken over.
        results: one line a method, the best first, those without a score last.
        base: the untrained model's line, where it has a score.
    """

    folder: str
    model: str
    task: str
    metric: str
    higher_is_better: bool
    held_out_rows: int
    results: tuple[MethodResult, ...]
    base: MethodResult | None = None

    @property
    def scored(self) -> list[MethodResult]:
        return [result for result in self.results if result.score is not None]

    @property
    def lines(self) -> list[MethodResult]:
        """All lines of the table."""
        return [*self.results, *([self.base] if self.base is not None else [])]

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        values = asdict(self)
        values["methods"] = values.pop("results")
        values["findings"] = findings(self)
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
    "score (95 % interval)",
    "to the best (95 % interval)",
)


def failures(comparison: Comparison) -> list[str]:
    """A line for each method without a result."""
    return [f"{result.method}: {result.error}" for result in comparison.results if result.error is not None]


def findings(comparison: Comparison) -> list[str]:
    """What the numbers say, in sentences."""
    scored = comparison.scored
    if not scored:
        return []
    best = scored[0]
    rows = f"{comparison.held_out_rows} held-out row{'s' if comparison.held_out_rows != 1 else ''}"
    equal = [r for r in scored if r.score == best.score]
    are = f"{best.method} is best" if len(equal) == 1 else f"{_listed(equal)} share the best score"
    lines = [f"{are}: {comparison.metric} {_score(comparison, best)} on {rows}."]
    near = [r for r in scored[1:] if r.difference_interval is not None and not r.clearly_other]
    far = [r for r in scored[1:] if r.clearly_other]
    if near:
        lines.append(
            f"These rows do not tell {_listed(near)} from it: the interval of the difference holds 0."
        )
        lines += _cheapest([best, *near])
    if far:
        lines.append(f"Clearly worse: {_listed(far)}.")
    base = comparison.base
    if base is not None and base.difference_interval is not None:
        better = "is clearly better than" if base.clearly_other else "is not clearly better than"
        lines.append(f"{best.method} {better} the untrained model.")
    return lines + [line for result in scored for line in _edge(result)]


def _cheapest(equals: Sequence[MethodResult]) -> list[str]:
    """Of methods that rows do not tell apart, which asks for least."""
    said: dict[str, list[str]] = {}
    small = min(equals, key=lambda r: r.trained_parameters or math.inf)
    if small.trained_parameters:
        said.setdefault(small.method, []).append(f"the fewest parameters ({small.trained_parameters:,})")
    fused = min(equals, key=lambda r: r.peak_bytes or math.inf)
    if fused.peak_bytes:
        said.setdefault(fused.method, []).append(f"the least memory ({size(fused.peak_bytes)})")
    quick = min(equals, key=lambda r: r.seconds or math.inf)
    if quick.seconds:
        said.setdefault(quick.method, []).append(f"the least time ({duration(quick.seconds)})")
    parts = [f"{method} takes {_joined(what)}" for method, what in said.items()]
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


def cells(comparison: Comparison, result: MethodResult) -> list[str]:
    """A line's texts, in the order of :data:`COLUMNS`; empty where nothing is known."""
    trained, total = result.trained_parameters, result.total_parameters
    best = comparison.scored[0] if comparison.scored else None
    difference = "best" if result is best else _difference(comparison, result)
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
        _score(comparison, result),
        difference,
    ]


def comparison_markdown(comparison: Comparison, figure: str | None = None) -> str:
    """The table, what it says, and what was tried, as a page.

    Args:
        figure: the name of an image file beside the page.
    """
    count = comparison.held_out_rows
    lines = [
        "# Methods compared",
        "",
        f"Model `{comparison.model}`, task {comparison.task}: the same rows, seed and steps for each method; "
        f"scored on {count} held-out rows that no choice was made by.",
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
    tried = [result for result in comparison.results if len(result.rates) > 1]
    if tried:
        lines += ["## Learning rates tried", "", "| method | rate: validation loss |", "| --- | --- |"]
        lines += [f"| {result.method} | {_rates(result)} |" for result in tried]
        lines += [
            "",
            "The loss is that of rows taken out of the training rows, after a part of the steps.",
            "",
        ]
    return "\n".join(lines)


def titles(comparison: Comparison) -> list[str]:
    """The heads of the columns, the score under its metric's name."""
    return [title.replace("score", comparison.metric.replace("_", " ") or "score") for title in COLUMNS]


def _rates(result: MethodResult) -> str:
    return ", ".join(
        f"{rate:g}: {'diverged' if loss is None else f'{loss:.4f}'}" for rate, loss in sorted(result.rates)
    )


def _score(comparison: Comparison, result: MethodResult) -> str:
    if result.score is None:
        return ""
    unit = " %" if comparison.metric in SHARES else ""
    text = _number(comparison, result.score) + unit
    if result.interval is not None:
        text += " ({}–{})".format(*(_number(comparison, bound) for bound in result.interval))
    return text


def _difference(comparison: Comparison, result: MethodResult) -> str:
    if result.difference is None:
        return ""
    text = _number(comparison, result.difference, "+")
    if result.difference_interval is not None:
        text += " ({} to {})".format(*(_number(comparison, b, "+") for b in result.difference_interval))
    return text


def _number(comparison: Comparison, value: float, sign: str = "") -> str:
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


def _listed(results: Sequence[MethodResult]) -> str:
    return _joined([result.method for result in results])


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _plain(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
