"""Evaluation results: metrics, confidence intervals, and rows for reports.

Metrics are computed from arrays. A metric that is undefined for its input, for example a correlation with a constant,
is nan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np

from deltaw.errors import UserError

Interval = tuple[float, float]
EvaluationT = TypeVar("EvaluationT", bound="Evaluation")
CONFIDENCE = 0.95
# With more degrees of freedom, the t distribution is treated as the normal distribution.
MAX_FREEDOM = 1000.0
# Metrics that are the share of rows with a property. Each row counts 1 or 0, a tie 0.5.
SHARE_METRICS = ("accuracy", "exact_match", "generated_exact_match", "passed", "truncated_share")


def is_share(metric: str) -> bool:
    """True if a metric is displayed in percent: a share of rows, or the probability that one of k answers passes."""
    return metric in SHARE_METRICS or metric.startswith("pass@")


def metric_format(metric: str) -> str:
    """Return the format specification of a metric: percent, a count, or four decimals."""
    return ".1%" if is_share(metric) else ",.0f" if metric.startswith("passages_") else ".4f"


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Return int64 (classes, classes): the number of rows of class i that were predicted as class j."""
    pairs = np.asarray(truth, np.int64) * classes + np.asarray(predicted, np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def f1(counts: np.ndarray, index: int) -> float:
    """Return F1 = 2·TP / (2·TP + FP + FN) of a class, or nan if it neither occurs nor is predicted."""
    return _ratio(2 * counts[index, index], counts[index].sum() + counts[:, index].sum())


def macro_f1(counts: np.ndarray) -> float:
    """Return the mean F1 over classes that occur or are predicted."""
    scores = np.array([f1(counts, index) for index in range(len(counts))])
    return float(np.nanmean(scores)) if not np.isnan(scores).all() else float("nan")


def matthews(counts: np.ndarray) -> float:
    """Return Matthews' correlation of true and predicted classes, or nan if either is constant.

    Generalized to K classes by Gorodkin (2004, "Comparing two K-category assignments by a K-category correlation
    coefficient", eq. 8): (c·s − Σ pₖ·tₖ) / √((s² − Σ pₖ²)·(s² − Σ tₖ²)) for s rows, of which c are correct, tₖ have
    class k and pₖ are predicted as k.
    """
    counts = counts.astype(np.float64)
    s = counts.sum()
    c = np.trace(counts)
    t = counts.sum(1)
    p = counts.sum(0)
    return _ratio(c * s - t @ p, np.sqrt((s * s - p @ p) * (s * s - t @ t)))


def classification_metrics(counts: np.ndarray) -> dict[str, float]:
    """Return ``accuracy``, ``macro_f1``, ``matthews``, and for two classes ``f1`` of the second one."""
    accuracy = _ratio(np.trace(counts), counts.sum())
    metrics = {"accuracy": accuracy, "macro_f1": macro_f1(counts), "matthews": matthews(counts)}
    return metrics if len(counts) != 2 else {**metrics, "f1": f1(counts, 1)}


def regression_metrics(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Return ``mse``, ``rmse`` and ``mae`` in the unit of the labels, ``pearson`` and ``spearman``."""
    errors = np.asarray(predicted, np.float64) - np.asarray(truth, np.float64)
    mse = float(np.mean(errors**2))
    mae = float(np.mean(np.abs(errors)))
    metrics = {"mse": mse, "rmse": float(np.sqrt(mse)), "mae": mae}
    return metrics | {"pearson": pearson(truth, predicted), "spearman": spearman(truth, predicted)}


def format_numbers(values: Any, digits: int = 6) -> str:
    """Return one number or several as text."""
    return ", ".join(f"{value:.{digits}g}" for value in np.atleast_1d(values))


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Return the linear correlation, or nan if a side is constant or has fewer than two rows."""
    x = np.asarray(x, np.float64)
    y = np.asarray(y, np.float64)
    if len(x) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return float("nan")  # rounding could make the variance slightly positive
    x = x - x.mean()
    y = y - y.mean()
    return float(np.clip(_ratio(x @ y, np.sqrt(x @ x) * np.sqrt(y @ y)), -1.0, 1.0))


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Return the rank correlation, or nan as for :func:`pearson`. Equal values get their mean rank."""
    return pearson(ranks(x), ranks(y))


def ranks(values: np.ndarray) -> np.ndarray:
    """Return fp64 (n,) ranks, starting at 1 for the smallest value. Equal values get the mean of their ranks."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2.0)[inverse.reshape(-1)]


def t_quantile(level: float, freedom: float) -> float:
    """Return t with P(|T| < t) = ``level`` for Student's T. Degrees of freedom may be fractional.

    With T = √ν·tan θ the density becomes cos^(ν−1) θ, which is summed over a grid of angles.
    """
    freedom = min(freedom, MAX_FREEDOM)
    angles = np.linspace(0.0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(level * below[-1], below, angles)))


def wilson_interval(share: float, count: float, *, level: float = CONFIDENCE, freedom: float = MAX_FREEDOM) -> Interval:
    """Return the confidence interval of a population share, given that ``share`` of ``count`` rows have the property.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference". Unlike a bootstrap interval, it
    has a positive width if all rows or no rows have the property.

    Args:
        count: Number of independent rows, may be fractional.
        freedom: Degrees of freedom of the estimate of ``count``.
    """
    squared = t_quantile(level, freedom) ** 2
    middle = (share + squared / (2 * count)) / (1 + squared / count)
    spread = share * (1 - share) / count + squared / (4 * count**2)
    half = math.sqrt(squared * max(0.0, spread)) / (1 + squared / count)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def mean_interval(rows: np.ndarray, *, share: bool = False, level: float = CONFIDENCE) -> Interval | None:
    """Return the confidence interval of a population mean, if the rows determine one.

    Args:
        rows: (n,) value of each row.
        share: True if the mean is a share of rows with a property, for Wilson's interval. Other means get Student's
            interval, which is wide for small n.
    """
    count = len(rows)
    mean = float(rows.mean())
    if share:
        return wilson_interval(mean, count, level=level)
    if count < 2:
        return None
    half = t_quantile(level, count - 1) * float(rows.std(ddof=1)) / math.sqrt(count)
    low = mean - half
    return max(0.0, low) if rows.min() >= 0 else low, mean + half


def bootstrap_interval(
    metric: Callable[..., float], *columns: np.ndarray, draws: int = 1000, seed: int = 0, level: float = CONFIDENCE
) -> Interval | None:
    """Return the bootstrap percentile interval of a metric that is not a mean over rows, such as :func:`spearman`.

    Efron and Tibshirani 1993, "An introduction to the bootstrap", section 13.3.

    Args:
        columns: Arrays (n,) that the metric receives. Row i consists of their i-th entries.

    Returns:
        The interval, or None if the metric is undefined for the rows or for at least half of the resamples.
    """
    if not math.isfinite(metric(*columns)):
        return None
    random = np.random.default_rng(seed)
    count = len(columns[0])
    resamples = (random.integers(count, size=count) for _ in range(draws))
    values = np.array([metric(*(column[rows] for column in columns)) for rows in resamples])
    values = values[np.isfinite(values)]
    if 2 * len(values) <= draws:
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(before: Evaluation, after: Evaluation) -> tuple[float, Interval] | None:
    """Return the mean change of the main metric over the same rows, with its 95% interval.

    None if the metric is not a mean over rows, or with fewer than two rows.
    """
    if before.per_row is None or after.per_row is None or before.main != after.main:
        return None
    change = after.per_row - before.per_row
    if (bounds := mean_interval(change)) is None:
        return None
    if after.main in SHARE_METRICS:  # Student's interval of a few rows may exceed the range of a difference of shares
        bounds = max(-1.0, bounds[0]), min(1.0, bounds[1])
    return float(change.mean()), bounds


def _ratio(part: float, total: float) -> float:
    return float(part) / float(total) if total else float("nan")


def check_finite(subject: str, values: np.ndarray | float) -> None:
    """Reject an evaluation with overflowing outputs.

    Args:
        subject: Subject and verb of the message.

    Raises:
        UserError: if a value is not finite.
    """
    if not np.isfinite(values).all():
        hint = "if the adapter was trained, train it again with a lower train.learning_rate"
        raise UserError(f"{subject} not finite", hint=hint)


# Rows that an evaluation stores for reports: rows with the largest errors, and evenly spread rows.
MAX_MISTAKES = 20
NUM_EXAMPLES = 8
# Up to this number of classes a report has the full confusion matrix, otherwise the top confusions.
MAX_MATRIX_CLASSES = 20
MAX_CONFUSIONS = 100
# Maximum number of characters of a class name in a report.
MAX_CLASS_NAME_LENGTH = 80


# An example, its expected and predicted class, number or text, and the score of the prediction.
RowOutcome: TypeAlias = "tuple[Any, Any, Any, float]"


@dataclass(frozen=True)
class Outcomes:
    """Evaluated rows for a report.

    Attributes:
        score_name: Meaning of the score of each row, such as ``confidence``.
        mistakes: Rows with the largest errors, largest first.
        examples: Evenly spread rows.
    """

    score_name: str
    mistakes: Sequence[RowOutcome]
    examples: Sequence[RowOutcome]

    @classmethod
    def of_errors(cls, score_name: str, errors: np.ndarray, outcome: Callable[[int], RowOutcome]) -> Outcomes:
        """Select rows by their errors (n,). Rows without an error are not mistakes."""
        order = [int(index) for index in np.argsort(-errors, kind="stable")[:MAX_MISTAKES] if errors[index] > 0]
        spread = sorted({round(index) for index in np.linspace(0, len(errors) - 1, NUM_EXAMPLES)})
        return cls(score_name, list(map(outcome, order)), list(map(outcome, spread)))


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        metrics: All metrics by name. Empty if no rows were evaluated.
        main: Name of the primary metric.
        higher_is_better: Direction of the primary metric.
        per_row: (rows,) primary metric of each row, if the metric is their mean. None for other metrics,
            rows, for example a correlation.
        interval: 95% interval of ``main`` over the choice of rows, or None for too small samples.
        intervals: Intervals of further metrics by name.
        classes: Class names, if any.
        confusion: Counts (true, predicted) in the order of ``classes``.
        predicted: For each row with an answer, in the order of ``per_row``, int64 (labels,) predicted tokens and
            labels. Empty if the model does not generate text.
        predictions: (rows, classes) logits or (rows,) numbers in the order of the examples, if rows have labels.
        outcomes: Rows for a report, if the task provides them.
        name: Name of the evaluation set, or an empty string.
        other_sets: Evaluations of further sets by name.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    main: str = ""
    higher_is_better: bool = True
    per_row: np.ndarray | None = None
    interval: Interval | None = None
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    classes: Sequence[str] = ()
    confusion: np.ndarray | None = None
    predicted: Sequence[tuple[np.ndarray, np.ndarray]] = field(default=(), repr=False)
    predictions: np.ndarray | None = field(default=None, repr=False)
    outcomes: Outcomes | None = field(default=None, repr=False)
    name: str = ""
    other_sets: Mapping[str, Evaluation] = field(default_factory=dict)

    @classmethod
    def of_rows(
        cls: type[EvaluationT], metrics: dict[str, float], main: str, per_row: np.ndarray, higher_is_better: bool = True
    ) -> EvaluationT:
        """Create an evaluation with the interval of the main metric, the mean of ``per_row``.

        For a loss per token, the mean over rows differs slightly from the metric.
        """
        return cls(metrics, main, higher_is_better, per_row, mean_interval(per_row, share=main in SHARE_METRICS))

    def as_dict(self) -> dict[str, object]:
        """Return the metrics for JSON, with nan as null. With several sets, metrics are grouped by set name."""
        metrics: dict[str, object] = {name: _finite(value) for name, value in self.metrics.items()}
        if not self.name:
            return metrics
        return {self.name: metrics, **{name: evaluation.as_dict() for name, evaluation in self.other_sets.items()}}

    def named_metrics(self) -> dict[str, float]:
        """Return the metrics of all sets in a flat dict, prefixed with the name of the set."""
        prefix = f"{self.name} " if self.name else ""
        named = {f"{prefix}{key}": value for key, value in self.metrics.items()}
        sets = self.other_sets.items()
        return named | {f"{name} {key}": value for name, other in sets for key, value in other.metrics.items()}

    def named_intervals(self) -> dict[str, Interval]:
        """Return the available intervals, with the keys of :meth:`named_metrics`."""
        intervals: dict[str, Interval] = {}
        for name, evaluation in {self.name: self, **self.other_sets}.items():
            main_interval = {evaluation.main: evaluation.interval} if evaluation.interval else {}
            set_intervals = {**evaluation.intervals, **main_interval}
            intervals |= {f"{name} {metric}".strip(): bounds for metric, bounds in set_intervals.items()}
        return intervals

    def outcomes_as_dict(self, text_of: Callable[[Any], str]) -> dict[str, object]:
        """Return rows and confusion matrix for a report, limited in size. Empty without outcomes."""
        if self.outcomes is None:
            return {}
        report: dict[str, object] = {"score_name": self.outcomes.score_name}
        for name in ("mistakes", "examples"):
            rows = [(o[0].row, *map(text_of, o[:3]), _finite(o[3])) for o in getattr(self.outcomes, name)]
            keys = ("row", "text", "expected", "predicted", "score")
            report[name] = [dict(zip(keys, row, strict=True)) for row in rows]
        if self.confusion is not None:
            names = [str(n)[:MAX_CLASS_NAME_LENGTH] for n in self.classes] or list(map(str, range(len(self.confusion))))
            counts = self.confusion
            is_full_matrix = len(names) <= MAX_MATRIX_CLASSES
            pairs = [(i, j) for i, j in np.argwhere(counts).tolist() if is_full_matrix or i != j]
            limit = MAX_MATRIX_CLASSES**2 if is_full_matrix else MAX_CONFUSIONS
            pairs = sorted(pairs, key=lambda pair: -counts[pair])[:limit]
            report["confusion"] = [[names[i], names[j], int(counts[i, j]), int(counts[i].sum())] for i, j in pairs]
            report["classes"] = names if is_full_matrix else []
        return report

    def score(self) -> dict[str, object] | None:
        """Return the primary metric with its interval for JSON, or None if no rows were evaluated."""
        if not self.metrics:
            return None
        interval = None if self.interval is None else [float(bound) for bound in self.interval]
        return {"metric": self.main, "value": _finite(self.metrics[self.main]), "interval": interval}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
