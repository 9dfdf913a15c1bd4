"""Checks of a run's training and evaluation rows, with a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from deltaw.data.bad_rows import BadRows
from deltaw.data.data_findings import MAX_LOCATIONS, DataFinding, Level
from deltaw.data.data_statistics import DataStatistics, repeated_indices
from deltaw.data.report import LabelNumbers, count_of
from deltaw.data.row_images import COLUMNS
from deltaw.settings.data import DataSettings
from deltaw.settings.row_kinds import IMAGE_NAME

# Share of labels below which a note is emitted: the time is mostly spent on unlabeled tokens.
_LOW_LABEL_SHARE = 0.02
_SMALL_ROW_COUNT = 20
_NUM_BINS = 10  # of the histogram of lengths, approximately


@dataclass(frozen=True)
class Lengths:
    """Distribution of example lengths.

    Attributes:
        bins: Histogram with consecutive bins: first length, last length (inclusive) and number of examples.
    """

    shortest: int
    median: int
    mean: float
    p95: int
    longest: int
    bins: tuple[tuple[int, int, int], ...]

    def as_dict(self) -> dict[str, object]:
        """Return the distribution for JSON output."""
        bins = [{"from": low, "to": high, "examples": count} for low, high, count in self.bins]
        return {**vars(self), "bins": bins}


@dataclass(frozen=True)
class DataCheck:
    """Result of a data check.

    Attributes:
        source: Reference of the training rows.
        form: Row format.
        template: "chat" or "plain". Empty for rows that are not rendered.
        rows: Number of rows in the file, including unusable ones.
        examples: Number of examples.
        tokens: Number of tokens of all examples.
        label_tokens: Number of label tokens, or None if rows have one label each.
        lengths: Distribution of lengths, or None if examples have no length or no example exists.
        findings: Findings, errors first.
        class_counts: Number of examples of each class, for labeled rows.
        label_numbers: Distribution of each target, for rows of a regression.
        ends: For each trained end token, the number of examples that it ends. None if rows have one label each.
    """

    source: str
    form: str
    template: str
    rows: int
    examples: int
    tokens: int
    label_tokens: int | None
    lengths: Lengths | None
    findings: tuple[DataFinding, ...]
    class_counts: Mapping[str, int] = field(default_factory=dict)
    ends: Mapping[str, int] | None = None
    label_numbers: Sequence[LabelNumbers] = ()

    @property
    def verdict(self) -> str:
        """Return "unusable" if a finding is an error, "warnings" if one is a warning, else "fine"."""
        levels = {finding.level for finding in self.findings}
        return "unusable" if "error" in levels else "warnings" if "warning" in levels else "fine"

    @property
    def usable(self) -> bool:
        """Return True if no finding is an error."""
        return self.verdict != "unusable"

    def as_dict(self) -> dict[str, object]:
        """Return the check for JSON output."""
        return {
            **vars(self),
            "verdict": self.verdict,
            "lengths": None if self.lengths is None else self.lengths.as_dict(),
            "findings": [finding.as_dict() for finding in self.findings],
            "class_counts": dict(self.class_counts) or None,
            "label_numbers": [vars(target) for target in self.label_numbers] or None,
            "ends": None if self.ends is None else dict(self.ends),
        }


def summarize_lengths(lengths: np.ndarray) -> Lengths | None:
    """Return quantiles and a histogram, or None if no lengths are given."""
    if not len(lengths):
        return None
    shortest, median, p95, longest = (int(length) for length in np.quantile(lengths, [0, 0.5, 0.95, 1]))
    return Lengths(shortest, median, round(float(lengths.mean()), 1), p95, longest, _bins(lengths))


def _bins(lengths: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """Return bins with round limits: linear, or logarithmic if lengths differ by more than a factor of 16."""
    low = int(lengths.min())
    high = int(lengths.max())
    if high > 16 * max(1, low):
        ratio = (high / max(1, low)) ** (1 / _NUM_BINS)
        edges = [round(max(1, low) * ratio**k) for k in range(_NUM_BINS)] + [high + 1]
        edges[0] = low
    else:
        rough = max(1, -(-(high - low + 1) // _NUM_BINS))
        magnitude = 10 ** (len(str(rough)) - 1)
        width = next(step * magnitude for step in (1, 2, 5, 10) if step * magnitude >= rough)
        edges = list(range(low // width * width, high + width + 1, width))
    limits = sorted(set(edges))
    counts, _ = np.histogram(lengths, limits)
    return tuple((a, b - 1, int(n)) for a, b, n in zip(limits, limits[1:], counts, strict=False))


def sort_findings(findings: Sequence[DataFinding]) -> tuple[DataFinding, ...]:
    """Return the findings with a nonzero count, errors first."""
    return tuple(f for level in ("error", "warning", "note") for f in findings if f.count and f.level == level)


def bad_row_findings(bad: BadRows, settings: DataSettings, suffix: str) -> list[DataFinding]:
    """Return one finding per reason for which rows cannot be used.

    Args:
        suffix: Text that names the file, for example `` of eval.jsonl``, or an empty string.
    """
    rejected = settings.bad_rows == "error"
    rows: dict[str, list[str]] = {reason: [] for reason in bad.counts}
    for line in bad.lines():
        locations = rows[str(line["reason"])]
        if len(locations) < MAX_LOCATIONS:
            locations.append(f"{line['where']}: {line['error']}")
    level: Level = "error" if rejected else "warning"
    hint = "correct them, or set data.bad_rows: skip" if rejected else "they are skipped"
    findings = []
    for (reason, count), locations in zip(bad.counts.items(), rows.values(), strict=True):
        text = f"{count_of(count)}{suffix} that cannot be used: {reason}"
        findings.append(DataFinding("bad_rows", level, count, text, hint, tuple(locations)))
    return findings


def long_row_findings(
    statistics: DataStatistics,
    settings: DataSettings,
    text: str = "longer than",
    suffix: str = "",
    results: Mapping[str, str] | None = None,
    error_hint: str = "",
) -> list[DataFinding]:
    """Return a finding about rows longer than ``data.max_length``.

    Args:
        text: Text before the limit.
        suffix: Text that names the file, see :func:`bad_row_findings`.
        results: Consequence of each value of ``data.long_rows``.
        error_hint: Added to the hint if ``data.long_rows`` is "error".
    """
    lengths = statistics.examples["length"]
    indices = np.flatnonzero(lengths > settings.max_length)
    if not len(indices):
        return []
    policy = settings.long_rows
    levels: dict[str, Level] = {"error": "error", "split": "note"}
    result = ({"drop": ": dropped", "cut": ": truncated"} if results is None else results).get(policy, "")
    text = f"{count_of(len(indices))}{suffix} {text} data.max_length ({settings.max_length:,} tokens){result}"
    hint = f"data.max_length: {lengths.max()} fits all" + (error_hint if policy == "error" else "")
    level = levels.get(policy, "warning")
    return [DataFinding("long_rows", level, len(indices), text, hint, statistics.locations(indices))]


def overlap_findings(
    train: DataStatistics, evaluation: DataStatistics, name: str, unit: str, prompt_text: str
) -> list[DataFinding]:
    """Return findings about evaluation rows that are also training rows, or have the content of one.

    Args:
        name: Reference of the evaluation file.
        unit: Name of an item.
        prompt_text: Text of the finding about rows with the content of a training row.
    """
    examples = evaluation.examples
    is_exact = np.isin(examples["key"], train.examples["key"])
    has_train_prompt = np.isin(examples["prompt"], train.examples["prompt"]) & (examples["prompt"] != 0) & ~is_exact
    exact = np.flatnonzero(is_exact)
    same_prompt = np.flatnonzero(has_train_prompt)
    exact_text = f"{count_of(len(exact), unit)} of {name} that are also training rows, which inflates the scores"
    text = f"{count_of(len(same_prompt), unit)} of {name} {prompt_text}"
    hint = "remove them from one of the files"
    return [
        DataFinding("overlap", "warning", len(exact), exact_text, hint, evaluation.locations(exact)),
        DataFinding("prompt_overlap", "warning", len(same_prompt), text, None, evaluation.locations(same_prompt)),
    ]


def text_length_findings(
    statistics: DataStatistics, settings: DataSettings, end_names: Mapping[int, str]
) -> list[DataFinding]:
    """Return findings about the number of rows, their lengths and labels, and trained end tokens.

    Args:
        end_names: Names of the tokens that end a text.
    """
    labels = statistics.examples["labels"]
    return [
        *_row_count_findings(statistics),
        *long_text_findings(statistics, settings, ""),
        *_unlabeled_findings(statistics, labels),
        *_end_token_findings(statistics, labels, end_names),
    ]


def text_findings(statistics: DataStatistics) -> list[DataFinding]:
    """Return findings about similar texts, equal answers, and remarks."""
    findings = [*_near_duplicate_findings(statistics), *_single_answer_findings(statistics)]
    for name, (level, text, hint) in _TEXTS.items():
        count = statistics.counts[name]
        locations = tuple(statistics.remark_locations.get(name, ()))
        findings.append(DataFinding(name, level, count, f"{count_of(count)} {text}", hint, locations))
    return findings


def text_summary_findings(statistics: DataStatistics, settings: DataSettings) -> list[DataFinding]:
    """Return findings about the share of labels, rows that became several examples, and unused columns."""
    unused = sorted(statistics.unused_columns - {settings.group})
    text = f"columns that are not read: {', '.join(unused)}"
    images = next(filter(IMAGE_NAME.search, unused), None)
    hint = f"if it has images: data.columns: {{image: {images}}}" if images and images not in COLUMNS else None
    columns = DataFinding("unused_columns", "warning" if images else "note", len(unused), text, hint)
    return [*_proportion_findings(statistics), columns]


def _row_count_findings(statistics: DataStatistics) -> list[DataFinding]:
    if len(statistics.examples):
        text = f"the data has only {count_of(statistics.rows)}"
        return [DataFinding("few_rows", "note", int(statistics.rows < _SMALL_ROW_COUNT) and statistics.rows, text)]
    return [DataFinding("no_rows", "error", 1, "no usable rows")]


def long_text_findings(statistics: DataStatistics, settings: DataSettings, suffix: str) -> list[DataFinding]:
    """Return a finding about long rows and the labels that they lose. Arguments as for :func:`long_row_findings`."""
    examples = statistics.examples
    long = examples[examples["length"] > settings.max_length]
    results = {
        "drop": f": dropped, with {long['labels'].sum():,} labels",
        "cut": f": truncated, {long['lost'].sum():,} labels lost",
        "split": ": divided, no label lost",
    }
    hint = "; data.long_rows: cut, drop or split"
    return long_row_findings(statistics, settings, suffix=suffix, results=results, error_hint=hint)


def _unlabeled_findings(statistics: DataStatistics, labels: np.ndarray) -> list[DataFinding]:
    unlabeled = np.flatnonzero(labels == 0)
    if len(unlabeled) and len(unlabeled) == len(labels):
        return [DataFinding("no_labels", "error", len(unlabeled), "no row has a label, so training has no effect")]
    text = f"{count_of(len(unlabeled))} without a label, such as an empty answer (dropped)"
    return [DataFinding("without_label", "warning", len(unlabeled), text, None, statistics.locations(unlabeled))]


def _end_token_findings(stats: DataStatistics, labels: np.ndarray, end_names: Mapping[int, str]) -> list[DataFinding]:
    trained = int((labels > 0).sum())
    num_missing = trained - stats.num_terminated
    names = ", ".join(sorted(end_names.values()))
    if not trained or not num_missing:
        return []
    if not end_names:
        text = "the model and its tokenizer define no end token, so generation stops only at the token limit"
        return [DataFinding("no_end_token", "warning", trained, text)]
    if not stats.num_terminated:
        text = f"no end token ({names}) is ever trained, so the model will not learn to stop"
        hint = "let the chat template end each turn with one, or set data.template: plain"
        return [DataFinding("end_never_trained", "error", trained, text, hint)]
    text = f"{count_of(num_missing, 'example')} of {trained:,} without an end token ({names}) at the end"
    return [DataFinding("end_not_trained", "warning", num_missing, text)]


def _near_duplicate_findings(statistics: DataStatistics) -> list[DataFinding]:
    labeled = np.flatnonzero(statistics.examples["labels"])
    distinct = np.setdiff1d(np.intersect1d(statistics.first_examples(), labeled), statistics.duplicates())
    near = distinct[repeated_indices(statistics.examples["text"][distinct])]
    text = f"{count_of(len(near))} with the text of an earlier one except for case, spacing or punctuation"
    return [DataFinding("near_duplicates", "note", len(near), text, None, statistics.locations(near))]


def _single_answer_findings(statistics: DataStatistics) -> list[DataFinding]:
    examples = statistics.examples
    with_prompt = examples[(examples["prompt"] != 0) & (examples["labels"] > 0)]
    is_single = len(np.unique(with_prompt["answer"])) == 1 and len(np.unique(with_prompt["prompt"])) > 1
    text = "every prompt has the same answer, so the model will learn to give it to any prompt"
    return [DataFinding("single_answer", "warning", len(with_prompt) if is_single else 0, text)]


_SPECIAL_TOKENS = "with a special token in the text, which the tokenizer encodes as the special token"
_DIVIDED_IMAGE = "longer than data.max_length, which are dropped because their images would be divided"
_TEXTS: dict[str, tuple[Level, str, str | None]] = {
    "divided_image": ("warning", _DIVIDED_IMAGE, "raise data.max_length"),
    "no_image": ("note", "without an image", None),
    "blank": ("warning", "with only white space", "remove them"),
    "empty_answer": ("warning", "with an empty answer at the end", "write the answers, or remove the rows"),
    "answer_without_letters": ("warning", "with an answer that has no letter or digit", None),
    "lost_characters": ("warning", "with �, which replaces a lost character", "decode the original text again"),
    "special_tokens_in_text": ("warning", _SPECIAL_TOKENS, "remove it from the text unless it is intended"),
}


def _proportion_findings(statistics: DataStatistics) -> list[DataFinding]:
    labels = int(statistics.examples["labels"].sum())
    share = labels / max(1, statistics.lengths.sum())
    text = f"only {share:.1%} of the tokens are labels; the others are computed without being trained on"
    unrolled = "that became several examples because the template rewrites earlier turns"
    return [
        DataFinding("few_labels", "note", int(0 < share < _LOW_LABEL_SHARE) and labels, text),
        DataFinding("unrolled", "note", statistics.unrolled, f"{count_of(statistics.unrolled)} {unrolled}"),
    ]
