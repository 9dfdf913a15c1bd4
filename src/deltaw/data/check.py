"""Checks of a run's training and evaluation rows, with a verdict."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from deltaw.data.chunk import divides_image, example_of
from deltaw.data.class_names import almost_equal_text, merge_setting, similar_text
from deltaw.data.example import Example, special_tokens
from deltaw.data.formats import Pair, Record, RowFormat, Text, choose_form, read_records, unused_columns, with_system
from deltaw.data.report import BadRowError, BadRows, LabelNumbers, count_of
from deltaw.data.row_images import COLUMNS, MARKER, ImagePlacer
from deltaw.data.rows import NumberedRows
from deltaw.data.sources import open_source
from deltaw.data.templates import Encoder
from deltaw.settings.data import DataSettings
from deltaw.settings.mixture import Train, sources_of
from deltaw.settings.row_kinds import IMAGE_NAME

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Statistics of examples. Texts are stored as 8-byte hashes, so that each example takes about 50 bytes.

# Unicode replacement character, written by a decoder in place of invalid bytes.
_REPLACEMENT = "\ufffd"
_NO_LETTERS = re.compile(r"[\W_]+")


# Per example: row number, token count, label count and number of labels beyond ``data.max_length`` (lost). Hashes of
# tokens and labels (key), of the prompt (0 if it is empty), of the answer, and of the text without case, spacing and
# punctuation (text).
_HASHES = [(name, "u8") for name in ("key", "prompt", "answer", "text")]
_NUMBERS = np.dtype([("row", "i8"), ("length", "i4"), ("labels", "i4"), ("lost", "i4"), *_HASHES])
# Maximum number of row locations in a finding.
_MAX_LOCATIONS = 5


@dataclass
class DataStatistics:
    """Statistics of the examples of one or several sources.

    Attributes:
        form: Row format, as in the preparation report.
        template: Template, as in the preparation report.
        rows: Number of usable rows.
        bad: Rows that cannot be used.
        unrolled: Number of rows that became several examples.
        unused_columns: Columns that are not read.
        end_tokens: For each end token, the number of examples with it as last label.
        num_terminated: Number of examples with an end token as last label.
        remark_locations: Locations of the first rows with each remark.
        counts: Number of rows with each remark.
    """

    form: str = ""
    template: str = ""
    rows: int = 0
    bad: BadRows = field(default_factory=lambda: BadRows("skip"))
    unrolled: int = 0
    unused_columns: set[str] = field(default_factory=set)
    end_tokens: Counter[int] = field(default_factory=Counter)
    num_terminated: int = 0
    remark_locations: dict[str, list[str]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    _numbers: bytearray = field(default_factory=bytearray)
    _starts: list[int] = field(default_factory=list)
    _files: list[str] = field(default_factory=list)

    @property
    def examples(self) -> np.ndarray:
        """Return (n,) records of the examples, see :data:`_NUMBERS`."""
        return np.frombuffer(bytes(self._numbers), _NUMBERS)

    def first_examples(self) -> np.ndarray:
        """Return the indices of the first example of each row."""
        return np.union1d(np.flatnonzero(np.diff(self.examples["row"])) + 1, self._starts).astype(np.int64)

    def locations(self, examples: np.ndarray) -> tuple[str, ...]:
        """Return the locations of the first of these examples."""
        examples = examples[:_MAX_LOCATIONS]
        files = [self._files[part - 1] for part in np.searchsorted(self._starts, examples, side="right")]
        rows = self.examples["row"][examples]
        return tuple(dict.fromkeys(f"{file}, row {row}" for file, row in zip(files, rows, strict=True)))

    def add_remark(self, remark: str, location: str) -> None:
        """Count a row with a remark."""
        self.counts[remark] += 1
        locations = self.remark_locations.setdefault(remark, [])
        if len(locations) < _MAX_LOCATIONS:
            locations.append(location)

    def add(self, example: Example, location: str, text: int, max_length: int, end_tokens: frozenset[int]) -> None:
        """Add one example.

        Args:
            text: Hash of the normalized text of the row.
            end_tokens: Tokens that end a text.
        """
        file = location.rpartition(", row ")[0]
        if not self._files or self._files[-1] != file:
            self._starts.append(len(self._numbers) // _NUMBERS.itemsize)
            self._files.append(file)
        tokens, labels = example.tokens, np.flatnonzero(example.is_label)
        prompt, answer = tokens[: example.prompt_length], tokens[example.prompt_length :]
        lengths = len(example), len(labels), int((labels >= max_length).sum())
        key = digest_of(tokens.tobytes(), np.packbits(example.is_label).tobytes())
        hashes = key, digest_of(prompt.tobytes()) if len(prompt) else 0, digest_of(answer.tobytes()), text
        self._numbers += np.array((example.row, *lengths, *hashes), _NUMBERS).tobytes()
        last = int(tokens[labels[-1]]) if len(labels) else -1
        if last in end_tokens:
            self.num_terminated += 1
            self.end_tokens[last] += 1


def collect_statistics(
    train: Train,
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    end_tokens: Sequence[int],
    images: ImagePlacer | None = None,
) -> DataStatistics:
    """Collect statistics of all rows of ``train`` (see ``data.train``), regardless of their length.

    Args:
        end_tokens: Tokens that end a text.
        images: See :class:`deltaw.data.templates.Encoder`.

    Raises:
        UserError: if a file does not exist or cannot be read, or if no format fits its columns.
    """
    statistics = DataStatistics()
    encoder = Encoder(tokenizer, settings.template, settings.labels, settings.date, images)
    names = sorted(set(special_tokens(tokenizer).values()) - {""}, key=len, reverse=True)
    names = [name for name in names if len(name) > 2]  # shorter ones occur in ordinary text
    special = re.compile("|".join(map(re.escape, names))) if names else None
    for source in sources_of(train):
        stream = open_source(source.reference, statistics.bad.add, max_bytes=settings.max_row_bytes)
        stream.scan()
        columns = settings.columns if source.columns is None else source.columns
        form: RowFormat | None = None
        for chunk in stream.chunks():
            form = form or choose_form(chunk, source.form or settings.form, columns)
            statistics.form = form.name
            statistics.unused_columns |= {*unused_columns(stream, form, columns, images=images is not None)}
            statistics.template = "plain" if form.name == "text" else encoder.template
            encoded = _encode_chunk(chunk, form, columns, settings.system, encoder, statistics.bad)
            for location, record, examples in encoded:
                statistics.rows += 1
                statistics.unrolled += len(examples) > 1
                divided = any(divides_image(example.tokens, settings, images) for example in examples)
                remarks = ["no_image"] * (images is not None and not getattr(record, "images", ()))
                for remark in (*_remarks(record, special), *remarks, *(["divided_image"] if divided else [])):
                    statistics.add_remark(remark, location)
                text = "\0".join(text for text, _ in _texts_of(record))
                normalized = _NO_LETTERS.sub(" ", text.casefold()).strip().encode("utf-8", "replace")
                text_hash = digest_of(normalized, *(b"" if images is None else _image_ids(e, images) for e in examples))
                for example in examples:
                    statistics.add(example, location, text_hash, settings.max_length, frozenset(end_tokens))
    return statistics


def _image_ids(example: Example, images: ImagePlacer) -> bytes:
    return example.tokens[example.tokens >= images.first_id].tobytes()


def _encode_chunk(
    rows: NumberedRows, form: RowFormat, columns: Mapping[str, str], system: str | None, encoder: Encoder, bad: BadRows
) -> Iterator[tuple[str, Record, list[Example]]]:
    """Yield the location, the record and the examples of each usable row."""
    locations = [rows.row_location(index) for index in range(len(rows))]
    rejected: set[int] = set()

    def on_bad(index: int, error: BadRowError) -> None:
        rejected.add(index)
        bad.add(error, rows[index][1])

    with_images = encoder.images is not None
    read = read_records(rows, range(len(rows)), form, columns, on_bad, images=with_images)
    records = [with_system(record, system) for record in read]
    for index, (record, parts) in enumerate(zip(records, encoder.encode(records, locations, on_bad), strict=True)):
        if record is not None and index not in rejected:
            yield locations[index], record, [example_of(rows.number(index), part) for part in parts]


def _texts_of(record: Record) -> list[tuple[str, bool]]:
    """Return the texts of a record, each with True if it is an answer."""
    if isinstance(record, Text):
        return [(record.text, False)]
    if isinstance(record, Pair):
        return [(record.system or "", False), (record.prompt, False), (record.completion, True)]
    return [(str(m["content"]), m["role"] == "assistant") for m in record.messages]


def _remarks(record: Record, special: re.Pattern[str] | None) -> list[str]:
    """Return the names of the findings that apply to a record.

    Args:
        special: Matches special tokens in text.
    """
    texts, remarks = _texts_of(record), []
    if getattr(record, "images", ()):
        texts = [(text.replace(MARKER, ""), is_answer) for text, is_answer in texts]
    if not any(text.strip() for text, _ in texts):
        remarks.append("blank")
    answers = [text for text, is_answer in texts if is_answer]
    calls = any(m.get("tool_calls") for m in getattr(record, "messages", ()))
    if answers and not calls and not any(c.isalnum() for c in answers[-1]):
        remarks.append("empty_answer" if not answers[-1].strip() else "answer_without_letters")
    if any(_REPLACEMENT in text for text, _ in texts):
        remarks.append("lost_characters")
    if special and any(special.search(text) for text, _ in texts):
        remarks.append("special_tokens_in_text")
    return remarks


def class_findings(counts: Mapping[str, int]) -> list[DataFinding]:
    """Return the findings about classes that are almost equal or may be misspelled.

    Args:
        counts: Number of rows of each class.
    """
    described = {"almost_equal_classes": almost_equal_text(counts), "similar_classes": similar_text(counts)}
    return [
        DataFinding(name, "warning", len(merged) if text else 0, text, f"merge them: {merge_setting(merged)}")
        for name, (text, merged) in described.items()
    ]


def digest_of(*parts: bytes) -> int:
    """Return a 64-bit hash that is never 0."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little") or 1


Level = Literal["error", "warning", "note"]
# Share of labels below which a note is emitted: the time is mostly spent on unlabeled tokens.
_LOW_LABEL_SHARE = 0.02
_SMALL_ROW_COUNT = 20


@dataclass(frozen=True)
class DataFinding:
    """One finding of a data check.

    Attributes:
        name: Stable identifier.
        level: "error" if training would fail or be useless, "warning" if results may be worse, "note" otherwise.
        count: Number of affected rows, examples or prompts.
        text: Description.
        hint: Suggested action.
        rows: Locations of the first affected rows.
    """

    name: str
    level: Level
    count: int
    text: str
    hint: str | None = None
    rows: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """Return the finding for JSON output."""
        return {**vars(self), "rows": list(self.rows)}


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


def build_check(
    statistics: DataStatistics,
    settings: DataSettings,
    source: str,
    *,
    end_names: Mapping[int, str],
    eval_sets: Sequence[tuple[str, DataStatistics]] = (),
) -> DataCheck:
    """Build the check of a causal language model's rows from statistics.

    Args:
        statistics: Statistics of the training rows.
        source: Name of the training rows.
        settings: The ``data:`` section of the run.
        end_names: Names of the tokens that end a text.
        eval_sets: Name and statistics of each separate evaluation file.
    """
    examples = statistics.examples
    lengths, labels = examples["length"], examples["labels"]
    findings = [*bad_row_findings(statistics.bad, settings, ""), *_row_count_findings(statistics)]
    findings += _long_row_findings(statistics, settings, "")
    findings += _unlabeled_findings(statistics, labels)
    findings += _end_token_findings(statistics, labels, end_names)
    findings += _duplicate_findings(statistics, settings)
    findings += _contradiction_findings(statistics)
    for name, (level, text, hint) in _TEXTS.items():
        count, locations = statistics.counts[name], tuple(statistics.remark_locations.get(name, ()))
        findings.append(DataFinding(name, level, count, f"{count_of(count)} {text}", hint, locations))
    for name, eval_statistics in eval_sets:
        findings += bad_row_findings(eval_statistics.bad, settings, f" of {name}")
        findings += _long_row_findings(eval_statistics, settings, f" of {name}")
        findings += _overlap_findings(statistics, eval_statistics, name)
    findings += _proportion_findings(statistics, lengths, labels)
    unused = sorted(statistics.unused_columns - {settings.group})
    text = f"columns that are not read: {', '.join(unused)}"
    images = next(filter(IMAGE_NAME.search, unused), None)
    hint = f"if it has images: data.columns: {{image: {images}}}" if images and images not in COLUMNS else None
    findings.append(DataFinding("unused_columns", "warning" if images else "note", len(unused), text, hint))
    counts = statistics.rows + len(statistics.bad), len(examples), int(lengths.sum()), int(labels.sum())
    results = summarize_lengths(lengths), sort_findings(findings)
    ends = {end_names[token]: count for token, count in statistics.end_tokens.most_common()}
    return DataCheck(source, statistics.form, statistics.template, *counts, *results, ends=ends)


def summarize_lengths(lengths: np.ndarray) -> Lengths | None:
    """Return quantiles and a histogram, or None if no lengths are given."""
    if not len(lengths):
        return None
    shortest, median, p95, longest = (int(length) for length in np.quantile(lengths, [0, 0.5, 0.95, 1]))
    return Lengths(shortest, median, round(float(lengths.mean()), 1), p95, longest, _bins(lengths))


def _bins(lengths: np.ndarray, count: int = 10) -> tuple[tuple[int, int, int], ...]:
    """Return about ``count`` bins with round limits: linear, or logarithmic if lengths differ by more than a factor of
    16.
    """
    low, high = int(lengths.min()), int(lengths.max())
    if high > 16 * max(1, low):
        ratio = (high / max(1, low)) ** (1 / count)
        edges = [round(max(1, low) * ratio**k) for k in range(count)] + [high + 1]
        edges[0] = low
    else:
        rough = max(1, -(-(high - low + 1) // count))
        magnitude = 10 ** (len(str(rough)) - 1)
        width = next(step * magnitude for step in (1, 2, 5, 10) if step * magnitude >= rough)
        edges = list(range(low // width * width, high + width + 1, width))
    limits = sorted(set(edges))
    counts, _ = np.histogram(lengths, limits)
    return tuple((a, b - 1, int(n)) for a, b, n in zip(limits, limits[1:], counts, strict=False))


def sort_findings(findings: Sequence[DataFinding]) -> tuple[DataFinding, ...]:
    """Return the findings with a nonzero count, errors first."""
    return tuple(f for level in ("error", "warning", "note") for f in findings if f.count and f.level == level)


def bad_row_findings(bad: BadRows, settings: DataSettings, location: str) -> list[DataFinding]:
    """Return one finding per reason for which rows cannot be used.

    Args:
        location: Suffix that names the file, for example `` of eval.jsonl``, or an empty string.
    """
    rejected = settings.bad_rows == "error"
    rows: dict[str, list[str]] = {reason: [] for reason in bad.counts}
    for line in bad.lines():
        locations = rows[str(line["reason"])]
        if len(locations) < _MAX_LOCATIONS:
            locations.append(f"{line['where']}: {line['error']}")
    level: Level = "error" if rejected else "warning"
    hint = "correct them, or set data.bad_rows: skip" if rejected else "they are skipped"
    findings = []
    for (reason, count), locations in zip(bad.counts.items(), rows.values(), strict=True):
        text = f"{count_of(count)}{location} that cannot be used: {reason}"
        findings.append(DataFinding("bad_rows", level, count, text, hint, tuple(locations)))
    return findings


def _row_count_findings(statistics: DataStatistics) -> list[DataFinding]:
    if len(statistics.examples):
        text = f"the data has only {count_of(statistics.rows)}"
        return [DataFinding("few_rows", "note", int(statistics.rows < _SMALL_ROW_COUNT) and statistics.rows, text)]
    return [DataFinding("no_rows", "error", 1, "no usable rows")]


def _long_row_findings(statistics: DataStatistics, settings: DataSettings, location: str) -> list[DataFinding]:
    examples = statistics.examples
    indices = np.flatnonzero(examples["length"] > settings.max_length)
    if not len(indices):
        return []
    text = f"{count_of(len(indices))}{location} longer than data.max_length ({settings.max_length:,} tokens)"
    hint = f"data.max_length: {examples['length'].max()} fits all"
    hint += "; data.long_rows: cut, drop or split" if settings.long_rows == "error" else ""
    results: dict[str, tuple[Level, str]] = {
        "error": ("error", ""),
        "drop": ("warning", f": dropped, with {examples['labels'][indices].sum():,} labels"),
        "cut": ("warning", f": truncated, {examples['lost'][indices].sum():,} labels lost"),
        "split": ("note", ": divided, no label lost"),
    }
    level, result = results[settings.long_rows]
    return [DataFinding("long_rows", level, len(indices), text + result, hint, statistics.locations(indices))]


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


def _duplicate_findings(statistics: DataStatistics, settings: DataSettings) -> list[DataFinding]:
    kept = np.flatnonzero(statistics.examples["labels"])
    repeated = kept[_repeated_indices(statistics.examples["key"][kept])]
    action = "dropped" if settings.duplicates == "drop" else "kept because data.duplicates is keep"
    exact = f"{count_of(len(repeated), 'example')} with the same tokens and labels as an earlier one ({action})"
    distinct = np.setdiff1d(np.intersect1d(statistics.first_examples(), kept), repeated)
    near = distinct[_repeated_indices(statistics.examples["text"][distinct])]
    similar = f"{count_of(len(near))} with the text of an earlier one except for case, spacing or punctuation"
    return [
        DataFinding("duplicates", "warning", len(repeated), exact, None, statistics.locations(repeated)),
        DataFinding("near_duplicates", "note", len(near), similar, None, statistics.locations(near)),
    ]


def _contradiction_findings(statistics: DataStatistics) -> list[DataFinding]:
    with_prompt = np.flatnonzero((statistics.examples["prompt"] != 0) & (statistics.examples["labels"] > 0))
    if not len(with_prompt):
        return []
    prompts, answers = statistics.examples["prompt"][with_prompt], statistics.examples["answer"][with_prompt]
    order = np.lexsort((answers, prompts))
    same_prompt = prompts[order][1:] == prompts[order][:-1]
    different_answer = answers[order][1:] != answers[order][:-1]
    contradicted = np.unique(prompts[order][1:][same_prompt & different_answer])
    rows = with_prompt[np.isin(prompts, contradicted)]
    num_examples = f"({count_of(len(rows), 'example')})"
    text = f"{count_of(len(contradicted), 'prompt')} with different answers in different rows {num_examples}"
    hint = "if one answer is right, correct the others; with data.group they stay on one side of the split"
    findings = [DataFinding("contradictions", "warning", len(contradicted), text, hint, statistics.locations(rows))]
    if len(np.unique(answers)) == 1 and len(np.unique(prompts)) > 1:
        text = "every prompt has the same answer, so the model will learn to give it to any prompt"
        findings.append(DataFinding("single_answer", "warning", len(with_prompt), text))
    return findings


def _overlap_findings(statistics: DataStatistics, eval_statistics: DataStatistics, name: str) -> list[DataFinding]:
    train, evaluation = statistics.examples, eval_statistics.examples
    is_exact = np.isin(evaluation["key"], train["key"])
    has_train_prompt = np.isin(evaluation["prompt"], train["prompt"]) & (evaluation["prompt"] != 0) & ~is_exact
    exact, same_prompt = np.flatnonzero(is_exact), np.flatnonzero(has_train_prompt)
    exact_text = f"{count_of(len(exact), 'example')} of {name} that are also training rows, which inflates the scores"
    prompt_text = f"{count_of(len(same_prompt), 'example')} of {name} with the prompt of a training row"
    hint, prompt_locations = "remove them from one of the files", eval_statistics.locations(same_prompt)
    return [
        DataFinding("overlap", "warning", len(exact), exact_text, hint, eval_statistics.locations(exact)),
        DataFinding("prompt_overlap", "warning", len(same_prompt), prompt_text, None, prompt_locations),
    ]


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


def _proportion_findings(statistics: DataStatistics, lengths: np.ndarray, labels: np.ndarray) -> list[DataFinding]:
    share = labels.sum() / max(1, lengths.sum())
    text = f"only {share:.1%} of the tokens are labels; the others are computed without being trained on"
    unrolled = "that became several examples because the template rewrites earlier turns"
    return [
        DataFinding("few_labels", "note", int(0 < share < _LOW_LABEL_SHARE) and int(labels.sum()), text),
        DataFinding("unrolled", "note", statistics.unrolled, f"{count_of(statistics.unrolled)} {unrolled}"),
    ]


def _repeated_indices(keys: np.ndarray) -> np.ndarray:
    """Return the indices of keys that occurred before, in ascending order."""
    return np.setdiff1d(np.arange(len(keys)), np.unique(keys, return_index=True)[1])
