"""What an evaluation of held-out rows comes to: metrics, and the one that methods are compared by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np

from deltaw.errors import UserError

# How good predictions are: accuracy, F1, errors, correlations, and confidence intervals of them.
#
# Arrays in, numbers out. A metric that is not defined for what it is given, such as a correlation with a
# constant, is nan. It knows no models.

Interval = tuple[float, float]
Found = TypeVar("Found", bound="Evaluation")
LEVEL = 0.95
# Beyond so many degrees of freedom, t is the normal distribution for every purpose here.
MANY = 1000.0
# Metrics that are the share of rows with a property: a row has 1 or 0, a tie 0.5.
SHARES = ("accuracy", "exact_match", "written_exact_match", "passed", "cut_share")


def is_share(metric: str) -> bool:
    """Whether a metric is shown in percent: a share of rows, or the chance that one of several answers passes."""
    return metric in SHARES or metric.startswith("pass@")


def metric_format(metric: str) -> str:
    """Return the format specification of a metric: percent, a count, or four decimals."""
    return ".1%" if is_share(metric) else ",.0f" if metric.startswith("passages_") else ".4f"


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """int64 (classes, classes): how many rows of class i were taken for class j."""
    pairs = np.asarray(truth, np.int64) * classes + np.asarray(predicted, np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def f1_of(counts: np.ndarray, index: int) -> float:
    """F1 = 2·TP / (2·TP + FP + FN) of one class; nan where it neither occurs nor is predicted."""
    return _ratio(2 * counts[index, index], counts[index].sum() + counts[:, index].sum())


def macro_f1(counts: np.ndarray) -> float:
    """The mean of all classes' F1; without classes that neither occur nor are predicted."""
    scores = np.array([f1_of(counts, index) for index in range(len(counts))])
    return float(np.nanmean(scores)) if not np.isnan(scores).all() else float("nan")


def matthews(counts: np.ndarray) -> float:
    """Matthews' correlation of true and predicted classes; nan where either is always the same.

    For K classes by Gorodkin (2004, "Comparing two K-category assignments by a K-category correlation
    coefficient", eq. 8): (c·s − Σ pₖ·tₖ) / √((s² − Σ pₖ²)·(s² − Σ tₖ²)) with s rows, c of them right, tₖ of
    class k and pₖ taken for it.
    """
    counts = counts.astype(np.float64)
    s, c, t, p = counts.sum(), np.trace(counts), counts.sum(1), counts.sum(0)
    return _ratio(c * s - t @ p, np.sqrt((s * s - p @ p) * (s * s - t @ t)))


def classification_metrics(counts: np.ndarray) -> dict[str, float]:
    """``accuracy``, ``macro_f1``, ``matthews`` and, of two classes, ``f1`` of the second."""
    accuracy = _ratio(np.trace(counts), counts.sum())
    metrics = {"accuracy": accuracy, "macro_f1": macro_f1(counts), "matthews": matthews(counts)}
    return metrics if len(counts) != 2 else {**metrics, "f1": f1_of(counts, 1)}


def regression_metrics(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """``mse``; ``rmse`` and ``mae`` in the labels' unit, ``pearson`` and ``spearman``."""
    errors = np.asarray(predicted, np.float64) - np.asarray(truth, np.float64)
    return {
        "mse": float(np.mean(errors**2)),
        "rmse": float(np.sqrt(np.mean(errors**2))),
        "mae": float(np.mean(np.abs(errors))),
        "pearson": pearson(truth, predicted),
        "spearman": spearman(truth, predicted),
    }


def pearson(left: np.ndarray, right: np.ndarray) -> float:
    """The linear correlation; nan where one side is constant or there are fewer than two rows."""
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    if len(left) < 2 or (left == left[0]).all() or (right == right[0]).all():
        return float("nan")  # their rounded variance may be a little above zero
    left, right = left - left.mean(), right - right.mean()
    value = _ratio(left @ right, np.sqrt(left @ left) * np.sqrt(right @ right))
    return float(np.clip(value, -1.0, 1.0))


def spearman(left: np.ndarray, right: np.ndarray) -> float:
    """The correlation of ranks, equal values sharing the mean of theirs; nan as for :func:`pearson`."""
    return pearson(ranks(left), ranks(right))


def ranks(values: np.ndarray) -> np.ndarray:
    """fp64 (n,): 1 for the smallest; equal values share the mean of the ranks that they take up."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2.0)[inverse.reshape(-1)]


def t_quantile(level: float, freedom: float) -> float:
    """The bound t with P(|T| < t) = ``level`` for Student's T; the degrees of freedom may be a fraction.

    With T = √ν·tan θ the density becomes cos^(ν−1) θ, which is summed over a grid of angles.
    """
    freedom = min(freedom, MANY)
    angles = np.linspace(0.0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(level * below[-1], below, angles)))


def wilson_interval(share: float, count: float, *, level: float = LEVEL, freedom: float = MANY) -> Interval:
    """Where the share of all rows of the kind lies that have a property, if ``share`` of ``count`` rows have it.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference". Unlike a bootstrap, it
    leaves room for doubt where all rows have the property, or no row has it.

    Args:
        count: of independent rows; may be a fraction. freedom: of the estimate of ``count``.
    """
    squared = t_quantile(level, freedom) ** 2
    middle = (share + squared / (2 * count)) / (1 + squared / count)
    spread = share * (1 - share) / count + squared / (4 * count**2)
    half = math.sqrt(squared * max(0.0, spread)) / (1 + squared / count)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def mean_interval(rows: np.ndarray, *, share: bool = False, level: float = LEVEL) -> Interval | None:
    """Where the mean lies if other rows of the kind had been drawn; None where one row tells nothing of it.

    Args:
        rows: (n,) a row's part. share: whether the mean is the share of rows with a property, which get
            Wilson's interval; others get Student's, which is wide for few rows.
    """
    count, mean = len(rows), float(rows.mean())
    if share:
        return wilson_interval(mean, count, level=level)
    if count < 2:
        return None
    half = t_quantile(level, count - 1) * float(rows.std(ddof=1)) / math.sqrt(count)
    low = mean - half
    return max(0.0, low) if rows.min() >= 0 else low, mean + half


def bootstrap_interval(
    metric: Callable[..., float], *columns: np.ndarray, draws: int = 1000, seed: int = 0, level: float = LEVEL
) -> Interval | None:
    """Where a metric lies that is no mean over rows, such as :func:`spearman`, if other rows had been drawn.

    Rows are drawn with replacement, and the interval is that between two percentiles of the metric (Efron and
    Tibshirani 1993, "An introduction to the bootstrap", section 13.3).

    Args:
        columns: (n,) each, as the metric takes them; a row is an entry of each.

    Returns:
        None if the metric is not defined for the rows, or for most of the draws.
    """
    if not math.isfinite(metric(*columns)):
        return None
    random, count = np.random.default_rng(seed), len(columns[0])
    chosen = (random.integers(count, size=count) for _ in range(draws))
    found = np.array([metric(*(column[rows] for column in columns)) for rows in chosen])
    found = found[np.isfinite(found)]
    if 2 * len(found) <= draws:
        return None
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(before: Evaluation, after: Evaluation) -> tuple[float, Interval] | None:
    """Return the mean change of the main metric over the same rows, with its 95 % interval.

    None if the metric is not a mean over rows, or if there are fewer than two rows.
    """
    if before.per_row is None or after.per_row is None or before.main != after.main:
        return None
    change = after.per_row - before.per_row
    bounds = mean_interval(change)
    return None if bounds is None else (float(change.mean()), bounds)


def _ratio(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else float("nan")


def check_finite(what: str, values: np.ndarray | float) -> None:
    """Refuse an evaluation of a model whose outputs overflow.

    Raises:
        UserError: a value is not finite.
    """
    if not np.isfinite(values).all():
        hint = "if the adapter was trained, train it again with a lower train.learning_rate"
        raise UserError(f"{what} not finite", hint=hint)


# Rows that an evaluation keeps for reports: those with the largest errors, and some evenly spread.
MISTAKES, EXAMPLES = 20, 8
# Classes up to which a report has the whole confusion matrix; of more, the most frequent confusions.
MATRIX_CLASSES, CONFUSIONS = 20, 100
# Characters of a text and of a class name in a report.
TEXT, CLASS_NAME = 1000, 80


# An example, its expected and its predicted class, number or text, and the score of the prediction.
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
    def of_errors(cls, score_name: str, errors: np.ndarray, of_row: Callable[[int], RowOutcome]) -> Outcomes:
        """Select rows by their errors (n,). Rows without an error are no mistakes."""
        order = [int(place) for place in np.argsort(-errors, kind="stable")[:MISTAKES] if errors[place] > 0]
        spread = sorted({round(place) for place in np.linspace(0, len(errors) - 1, EXAMPLES)})
        return cls(score_name, list(map(of_row, order)), list(map(of_row, spread)))


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation.

    Attributes:
        metrics: every metric by name; empty where there was nothing to evaluate.
        main: the name of the one that counts; ``higher_is_better`` says which way.
        per_row: (rows,) that metric row by row, so that its mean is the metric; None where it has no such
            form (a correlation).
        interval: of ``main`` at 95 %, over the choice of rows; None where too few rows tell it.
        intervals: those of further metrics, by name.
        classes: their names, where there are any; ``confusion`` counts (true, predicted) in their order.
        predicted: for each row with an answer, as ``per_row`` has them, int64 (labels,) the likeliest token
            at each of its labels, and the labels themselves; empty where the model writes no text.
        outcomes: Rows for a report; None if the task has none.
        name: of the set of rows, where it has one. others: the evaluations of further sets, by name.
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
    outcomes: Outcomes | None = field(default=None, repr=False)
    name: str = ""
    others: Mapping[str, Evaluation] = field(default_factory=dict)

    @classmethod
    def of_rows(cls: type[Found], metrics: dict[str, float], main: str, per_row: np.ndarray, **more: Any) -> Found:
        """With the interval of the main metric, the mean of ``per_row`` (of a loss over tokens, about that)."""
        interval = mean_interval(per_row, share=main in SHARES)
        return cls(metrics, main, per_row=per_row, interval=interval, **more)

    def as_dict(self) -> dict[str, object]:
        """The metrics, ready for JSON, which has no nan: null. Of several sets, those of each by its name."""
        own: dict[str, object] = {name: _finite(value) for name, value in self.metrics.items()}
        if not self.name:
            return own
        return {self.name: own, **{name: other.as_dict() for name, other in self.others.items()}}

    def named_metrics(self) -> dict[str, float]:
        """The metrics of all sets in one, for a person: those of a set with a name begin with it."""
        prefix = f"{self.name} " if self.name else ""
        named = {f"{prefix}{key}": value for key, value in self.metrics.items()}
        others = self.others.items()
        return named | {f"{name} {key}": value for name, other in others for key, value in other.metrics.items()}

    def named_intervals(self) -> dict[str, Interval]:
        """The intervals of those metrics that have one, by their names in :meth:`named_metrics`."""
        found: dict[str, Interval] = {}
        for name, one in {self.name: self, **self.others}.items():
            own = {**one.intervals, **({one.main: one.interval} if one.interval else {})}
            found |= {f"{name} {metric}".strip(): bounds for metric, bounds in own.items()}
        return found

    def outcomes_as_dict(self, text_of: Callable[[Any], str]) -> dict[str, object]:
        """Return the rows and the confusion of classes for a report, of bounded size; empty without outcomes."""
        if self.outcomes is None:
            return {}
        kept: dict[str, object] = {"score_name": self.outcomes.score_name}
        for name in ("mistakes", "examples"):
            rows = [(one[0].row, *map(text_of, one[:3]), _finite(one[3])) for one in getattr(self.outcomes, name)]
            kept[name] = [
                dict(zip(("row", "text", "expected", "predicted", "score"), row, strict=True)) for row in rows
            ]
        if self.confusion is not None:
            names = [str(name)[:CLASS_NAME] for name in self.classes] or list(map(str, range(len(self.confusion))))
            counts, all_of_them = self.confusion, len(names) <= MATRIX_CLASSES
            pairs = [(i, j) for i, j in np.argwhere(counts).tolist() if all_of_them or i != j]
            pairs = sorted(pairs, key=lambda pair: -counts[pair])[: MATRIX_CLASSES**2 if all_of_them else CONFUSIONS]
            kept["confusion"] = [[names[i], names[j], int(counts[i, j]), int(counts[i].sum())] for i, j in pairs]
            kept["classes"] = names if all_of_them else []
        return kept

    def score(self) -> dict[str, object] | None:
        """The main metric with its interval, ready for JSON; None where nothing was evaluated."""
        if not self.metrics:
            return None
        interval = None if self.interval is None else [float(bound) for bound in self.interval]
        return {"metric": self.main, "value": _finite(self.metrics[self.main]), "interval": interval}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
