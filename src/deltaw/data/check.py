"""What is wrong, or may be, with the rows of a run: findings from the facts of its examples, and a verdict.

It knows numbers; not files, tokenizers, or how findings are shown.
"""

from __future__ import annotations

import bisect
import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from deltaw.data.chunk import example_of
from deltaw.data.example import Example
from deltaw.data.formats import Form, Pair, Record, Text, choose_form, read_records
from deltaw.data.mixture import Source, Train, sources_of
from deltaw.data.pieces import special_tokens
from deltaw.data.report import BadRowError, BadRows
from deltaw.data.rows import Rows
from deltaw.data.settings import DataSettings
from deltaw.data.sources import open_source
from deltaw.data.templates import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# ---- A few numbers for each example of a data set: what a check of the data needs of it, in bounded memory.
#
# Texts are kept as hashes of eight bytes, so that millions of rows take some 50 bytes each. It knows rows and
# their tokens; what the numbers mean is :mod:`deltaw.data.check`'s.


# A character that stands where text was decoded wrongly.
_LOST = "\ufffd"
_NO_LETTERS = re.compile(r"[\W_]+")


@dataclass
class Facts:
    """The numbers of the examples of one source or several.

    Attributes:
        form, template: as in the report.
        rows: rows read, without those that cannot be used, which are in ``bad``.
        unrolled: rows of which several examples came.
        row, length, labels: of each example, the number of its row, its tokens, and how many are labels.
        lost_labels: of each example, labels beyond ``data.max_length``.
        key: equal for examples with the same tokens and labels.
        prompt, answer: equal for the same prompts and for the same answers; ``prompt`` is 0 without one.
        text: equal for rows that differ only in case, spacing and punctuation.
        ends: tokens that end a text, by how many examples' last label they are.
        ended: examples whose last label ends a text.
        notable: places of rows by what is notable about them, the first few, and how many there are.
    """

    form: str = ""
    template: str = ""
    rows: int = 0
    bad: BadRows = field(default_factory=lambda: BadRows("skip"))
    unrolled: int = 0
    row: array[int] = field(default_factory=lambda: array("q"))
    length: array[int] = field(default_factory=lambda: array("i"))
    labels: array[int] = field(default_factory=lambda: array("i"))
    lost_labels: array[int] = field(default_factory=lambda: array("i"))
    key: array[int] = field(default_factory=lambda: array("Q"))
    prompt: array[int] = field(default_factory=lambda: array("Q"))
    answer: array[int] = field(default_factory=lambda: array("Q"))
    text: array[int] = field(default_factory=lambda: array("Q"))
    ends: Counter[int] = field(default_factory=Counter)
    ended: int = 0
    notable: dict[str, list[str]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    _starts: list[int] = field(default_factory=list)
    _files: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.row)

    def first_of_rows(self) -> np.ndarray:
        """The places of the first example of each row."""
        rows = np.array(self.row)
        starts = np.ones(len(rows), bool)
        starts[1:] = rows[1:] != rows[:-1]
        starts[self._starts] = True
        return np.flatnonzero(starts)

    def place(self, example: int) -> str:
        """Where the row of an example is."""
        part = bisect.bisect_right(self._starts, example) - 1
        return f"{self._files[part]}, row {self.row[example]}"

    def note(self, what: str, where: str, shown: int = 5) -> None:
        """Count a row with something notable about it."""
        self.counts[what] += 1
        places = self.notable.setdefault(what, [])
        if len(places) < shown:
            places.append(where)

    def add(self, example: Example, where: str, text: int, max_length: int, ends: frozenset[int]) -> None:
        """Note one example."""
        file = where.rpartition(", row ")[0]
        if not self._files or self._files[-1] != file:
            self._starts.append(len(self))
            self._files.append(file)
        labels = np.flatnonzero(example.is_label)
        self.row.append(example.row)
        self.length.append(len(example))
        self.labels.append(len(labels))
        self.lost_labels.append(int((labels >= max_length).sum()))
        self.key.append(digest_of(example.tokens.tobytes(), np.packbits(example.is_label).tobytes()))
        prompt = example.tokens[: example.prompt_length]
        self.prompt.append(digest_of(prompt.tobytes()) if example.prompt_length else 0)
        self.answer.append(digest_of(example.tokens[example.prompt_length :].tobytes()))
        self.text.append(text)
        last = int(example.tokens[labels[-1]]) if len(labels) else -1
        if last in ends:
            self.ended += 1
            self.ends[last] += 1


def collect(
    train: Train,
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Facts:
    """The facts of all rows of ``train`` (as ``data.train``), whatever their length.

    Args:
        ends: the tokens that end a text.
        on_rows: told now and then how many rows were read.

    Raises:
        UserError: there is no such file, it cannot be read, or no format fits its columns.
    """
    collector = _Collector(settings, tokenizer, ends, on_rows)
    for source in sources_of(train):
        collector.add_source(source)
    return collector.facts


class _Collector:
    """Goes through sources, one after another."""

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase,
        ends: Sequence[int],
        on_rows: Callable[[int], None],
    ) -> None:
        self.facts = Facts()
        self._settings = settings
        self._encoder = Encoder(tokenizer, settings.template, settings.labels, settings.date)
        self._written = _Written(tokenizer)
        self._ends = frozenset(ends)
        self._on_rows = on_rows

    def add_source(self, source: Source) -> None:
        """Read all of its rows."""
        stream = open_source(source.reference, self.facts.bad.add, max_bytes=self._settings.max_row_bytes)
        stream.scan()
        columns = self._settings.columns if source.columns is None else source.columns
        form: Form | None = None
        for chunk in stream.chunks():
            form = form or choose_form(chunk, source.form or self._settings.form, columns)
            self.facts.form = form.name
            self.facts.template = "plain" if form.name == "text" else self._encoder.template
            self._add_chunk(chunk, form, columns)
            self._on_rows(self.facts.rows)

    def _add_chunk(self, rows: Rows, form: Form, columns: Mapping[str, str]) -> None:
        facts = self.facts
        places = [rows.place(index) for index in range(len(rows))]
        bad: set[int] = set()

        def on_bad(place: int, error: BadRowError) -> None:
            bad.add(place)
            facts.bad.add(error, rows[place][1])

        records = read_records(rows, range(len(rows)), form, columns, on_bad)
        encoded = self._encoder.encode(records, places, on_bad)
        for index, (record, parts, where) in enumerate(zip(records, encoded, places, strict=True)):
            if record is None or index in bad:
                continue
            facts.rows += 1
            facts.unrolled += len(parts) > 1
            for what in self._written.notable(record):
                facts.note(what, where)
            plain = _NO_LETTERS.sub(" ", self._written.text(record).casefold()).strip()
            text = digest_of(plain.encode("utf-8", "replace"))
            for part in parts:
                example = example_of(rows.number(index), part)
                facts.add(example, where, text, self._settings.max_length, self._ends)


class _Written:
    """What stands in records as text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        names = sorted(set(special_tokens(tokenizer).values()) - {""}, key=len, reverse=True)
        # Names of one or two characters occur in ordinary text.
        names = [name for name in names if len(name) > 2]
        self._special = re.compile("|".join(map(re.escape, names))) if names else None

    def texts(self, record: Record) -> list[tuple[str, bool]]:
        """The texts of a record, and whether each is an answer."""
        if isinstance(record, Text):
            return [(record.text, False)]
        if isinstance(record, Pair):
            return [(record.system or "", False), (record.prompt, False), (record.completion, True)]
        return [(str(m["content"]), m["role"] == "assistant") for m in record.messages]

    def text(self, record: Record) -> str:
        """All of it."""
        return "\0".join(text for text, _ in self.texts(record))

    def notable(self, record: Record) -> list[str]:
        """What is notable about it, by the names of findings."""
        texts = self.texts(record)
        found = []
        if not any(text.strip() for text, _ in texts):
            found.append("blank")
        answers = [text for text, is_answer in texts if is_answer]
        calls = any(m.get("tool_calls") for m in getattr(record, "messages", ()))
        if answers and not calls and not any(c.isalnum() for c in answers[-1]):
            found.append("empty_answer" if not answers[-1].strip() else "answer_without_letters")
        if any(_LOST in text for text, _ in texts):
            found.append("lost_characters")
        if self._special and any(self._special.search(text) for text, _ in texts):
            found.append("special_tokens_in_text")
        return found


def digest_of(*parts: bytes) -> int:
    """Eight bytes as a number, not 0."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little") or 1


# ---- check


Level = Literal["error", "warning", "note"]
# Places that a finding names.
_SHOWN = 5
# Below this share of labels most of the time goes into tokens that nothing is learned from.
_FEW_LABELS = 0.02
_FEW_ROWS = 20


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        name: the same in every version.
        level: "error" where training would fail or be pointless, "warning" where it may do worse, "note".
        count: how many rows, examples or prompts.
        text: what it is. hint: what can be done.
        rows: the places of some of the rows.
    """

    name: str
    level: Level
    count: int
    text: str
    hint: str | None = None
    rows: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**vars(self), "rows": list(self.rows)}


@dataclass(frozen=True)
class Lengths:
    """The lengths of examples.

    Attributes:
        unit: "tokens".
        bins: from, to (included) and how many examples, of consecutive ranges.
    """

    shortest: int
    median: int
    mean: float
    p95: int
    longest: int
    bins: tuple[tuple[int, int, int], ...]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        bins = [{"from": low, "to": high, "examples": count} for low, high, count in self.bins]
        return {**vars(self), "bins": bins}


@dataclass(frozen=True)
class Check:
    """The outcome of a check.

    Attributes:
        source, form, template: what was checked, and as what.
        rows: rows in the file, those that cannot be used included. examples: what they became.
        tokens: of all examples. label_tokens: how many are labels; None for labeled rows.
        lengths: None where examples have none, or there are none.
        class_counts: examples of each class, of labeled rows.
        ends: the tokens that are trained to end a text, by how many examples they end; None for labeled rows.
        findings: the gravest first.
    """

    source: str
    form: str
    template: str
    rows: int
    examples: int
    tokens: int
    label_tokens: int | None
    lengths: Lengths | None
    findings: tuple[Finding, ...]
    class_counts: Mapping[str, int] = field(default_factory=dict)
    ends: Mapping[str, int] | None = None

    @property
    def verdict(self) -> str:
        """ "unusable" if training would fail or be pointless, "warnings" if something was found, "fine"."""
        levels = {finding.level for finding in self.findings}
        return "unusable" if "error" in levels else "warnings" if "warning" in levels else "fine"

    @property
    def usable(self) -> bool:
        """Whether training would work and be of use."""
        return self.verdict != "unusable"

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            **vars(self),
            "verdict": self.verdict,
            "lengths": None if self.lengths is None else self.lengths.as_dict(),
            "findings": [finding.as_dict() for finding in self.findings],
            "class_counts": dict(self.class_counts) or None,
            "ends": None if self.ends is None else dict(self.ends),
        }


def check_facts(
    facts: Facts,
    settings: DataSettings,
    source: str,
    *,
    end_names: Mapping[int, str],
    held_out: Sequence[tuple[str, Facts]] = (),
) -> Check:
    """What the facts of rows for a causal model say.

    Args:
        facts: of the training rows. source: their name.
        settings: the ``data:`` section of the run.
        end_names: the tokens that end a text, with their names.
        held_out: name and facts of each separate evaluation file.
    """
    lengths, labels = np.array(facts.length), np.array(facts.labels)
    found = [*bad_rows_found(facts.bad, settings, ""), *_nothing(facts), *_long_rows(facts, settings, "")]
    found += _without_labels(facts, labels)
    found += _ends(facts, labels, end_names)
    keys, prompts = np.array(facts.key), np.array(facts.prompt)
    found += _duplicates(facts, keys, settings)
    found += _contradictions(facts, keys, prompts)
    found += _texts(facts)
    for name, others in held_out:
        found += bad_rows_found(others.bad, settings, f" of {name}")
        found += _long_rows(others, settings, f" of {name}")
        found += _overlap(facts, others, name)
    found += _proportions(facts, lengths, labels)
    return Check(
        source,
        facts.form,
        facts.template,
        facts.rows + len(facts.bad),
        len(facts),
        int(lengths.sum()),
        int(labels.sum()),
        lengths_of(lengths),
        ordered(found),
        ends={end_names[token]: count for token, count in facts.ends.most_common()},
    )


def lengths_of(lengths: np.ndarray) -> Lengths | None:
    """Quantiles and a histogram; None for no lengths."""
    if not len(lengths):
        return None
    return Lengths(
        int(lengths.min()),
        int(np.median(lengths)),
        round(float(lengths.mean()), 1),
        int(np.quantile(lengths, 0.95)),
        int(lengths.max()),
        _bins(lengths),
    )


def _bins(lengths: np.ndarray, count: int = 10) -> tuple[tuple[int, int, int], ...]:
    """About ``count`` ranges with round limits: of equal width, or of equal ratio if lengths differ much."""
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


def ordered(found: Sequence[Finding]) -> tuple[Finding, ...]:
    """Those that count something, the gravest first."""
    grave = ("error", "warning", "note")
    return tuple(sorted((f for f in found if f.count), key=lambda f: grave.index(f.level)))


def _places(facts: Facts, examples: np.ndarray) -> tuple[str, ...]:
    return tuple(dict.fromkeys(facts.place(int(example)) for example in examples[:_SHOWN]))


def bad_rows_found(bad: BadRows, settings: DataSettings, where: str) -> list[Finding]:
    """Rows that cannot be used, by reason; ``where`` says of which file."""
    refused = settings.bad_rows == "error"
    rows: dict[str, list[str]] = {}
    for line in bad.lines():
        places = rows.setdefault(str(line["reason"]), [])
        if len(places) < _SHOWN:
            places.append(f"{line['where']}: {line['error']}")
    return [
        Finding(
            "bad_rows",
            "error" if refused else "warning",
            count,
            f"{count_rows(count)}{where} that cannot be used: {reason}",
            "correct them, or set data.bad_rows: skip" if refused else "they are skipped",
            tuple(rows.get(reason, ())),
        )
        for reason, count in bad.counts.items()
    ]


def _nothing(facts: Facts) -> list[Finding]:
    if len(facts):
        few = f"there are only {count_rows(facts.rows)}"
        return [Finding("few_rows", "note", int(facts.rows < _FEW_ROWS) and facts.rows, few)]
    return [Finding("no_rows", "error", 1, "no row can be used")]


def _long_rows(facts: Facts, settings: DataSettings, where: str) -> list[Finding]:
    lengths, lost = np.array(facts.length), np.array(facts.lost_labels)
    long = np.flatnonzero(lengths > settings.max_length)
    if not len(long):
        return []
    counted = f"{count_rows(len(long))}{where} longer than data.max_length ({settings.max_length:,} tokens)"
    longest = int(lengths.max())
    hint = f"data.max_length: {longest} fits all"
    if settings.long_rows == "drop":
        labels = int(np.array(facts.labels)[long].sum())
        counted += f": dropped, with {labels:,} labels"
    elif settings.long_rows == "cut":
        counted += f": truncated, {int(lost[long].sum()):,} labels lost"
    elif settings.long_rows == "split":
        counted += ": divided, no label lost"
    else:
        hint += "; data.long_rows: cut, drop or split"
    levels: dict[str, Level] = {"error": "error", "split": "note"}
    level = levels.get(settings.long_rows, "warning")
    return [Finding("long_rows", level, len(long), counted, hint, _places(facts, long))]


def _without_labels(facts: Facts, labels: np.ndarray) -> list[Finding]:
    without = np.flatnonzero(labels == 0)
    if not len(without):
        return []
    if len(without) == len(facts):
        return [Finding("no_labels", "error", len(without), "no row has a label: there is nothing to train on")]
    text = f"{count_rows(len(without))} without a label, such as an empty answer (dropped)"
    return [Finding("without_label", "warning", len(without), text, None, _places(facts, without))]


def _ends(facts: Facts, labels: np.ndarray, end_names: Mapping[int, str]) -> list[Finding]:
    trained = int((labels > 0).sum())
    lacking = trained - facts.ended
    known = ", ".join(sorted(end_names.values()))
    if not trained or not lacking:
        return []
    if not end_names:
        text = "the model and its tokenizer name no token that ends a text: it will not stop by itself"
        return [Finding("no_end_token", "warning", trained, text)]
    if not facts.ended:
        text = f"no token that ends a text ({known}) is ever trained: the model will not learn to stop"
        hint = "let the chat template end each turn with one, or set data.template: plain"
        return [Finding("end_never_trained", "error", trained, text, hint)]
    text = f"{_examples(lacking)} of {trained:,} without a token at the end that ends a text ({known})"
    return [Finding("end_not_trained", "warning", lacking, text)]


def _duplicates(facts: Facts, keys: np.ndarray, settings: DataSettings) -> list[Finding]:
    again = _again(keys)
    done = "dropped" if settings.duplicates == "drop" else "kept, since data.duplicates is keep"
    exact = f"{_examples(len(again))} with the same tokens and labels as an earlier one ({done})"
    distinct = np.setdiff1d(facts.first_of_rows(), again)
    near = distinct[_again(np.array(facts.text)[distinct])]
    alike = f"{count_rows(len(near))} like an earlier one but for case, spacing or punctuation"
    return [
        Finding("duplicates", "warning", len(again), exact, None, _places(facts, again)),
        Finding("near_duplicates", "note", len(near), alike, None, _places(facts, near)),
    ]


def _contradictions(facts: Facts, keys: np.ndarray, prompts: np.ndarray) -> list[Finding]:
    asked = np.flatnonzero(prompts)
    if not len(asked):
        return []
    answers = np.array(facts.answer)[asked]
    order = np.lexsort((answers, prompts[asked]))
    ordered_prompts, ordered_answers = prompts[asked][order], answers[order]
    same_prompt = ordered_prompts[1:] == ordered_prompts[:-1]
    other_answer = same_prompt & (ordered_answers[1:] != ordered_answers[:-1])
    contradicted = np.unique(ordered_prompts[1:][other_answer])
    rows = np.sort(asked[np.isin(prompts[asked], contradicted)])
    prompts_found = "1 prompt" if len(contradicted) == 1 else f"{len(contradicted):,} prompts"
    text = f"{prompts_found} with different answers in different rows ({_examples(len(rows))})"
    hint = "if one answer is right, correct the others; with data.group they stay on one side of the split"
    found = [Finding("contradictions", "warning", len(contradicted), text, hint, _places(facts, rows))]
    if len(np.unique(answers)) == 1 and len(np.unique(prompts[asked])) > 1:
        text = "every prompt has the same answer: the model will learn to say it whatever it is asked"
        found.append(Finding("one_answer", "warning", len(asked), text))
    return found


def _overlap(facts: Facts, others: Facts, name: str) -> list[Finding]:
    exact = np.flatnonzero(np.isin(np.array(others.key), np.array(facts.key)))
    prompts = np.array(others.prompt)
    asked = np.isin(prompts, np.array(facts.prompt)) & (prompts != 0)
    asked[exact] = False
    only_prompt = np.flatnonzero(asked)
    return [
        Finding(
            "overlap",
            "warning",
            len(exact),
            f"{_examples(len(exact))} of {name} that are also training rows, which inflates the scores",
            "remove them from one of the files",
            _places(others, exact),
        ),
        Finding(
            "prompt_overlap",
            "warning",
            len(only_prompt),
            f"{_examples(len(only_prompt))} of {name} with the prompt of a training row",
            None,
            _places(others, only_prompt),
        ),
    ]


_TEXTS: dict[str, tuple[Level, str, str | None]] = {
    "blank": ("warning", "with only white space", "remove them"),
    "empty_answer": ("warning", "with an empty answer at the end", "write the answers, or remove the rows"),
    "answer_without_letters": ("warning", "with an answer that has no letter or digit", None),
    "lost_characters": ("warning", "with �, which stands for a character that was lost", "decode them anew"),
    "special_tokens_in_text": (
        "warning",
        "with a special token written in the text, which the model reads as the token itself",
        "remove it from the text, unless it is meant",
    ),
}


def _texts(facts: Facts) -> list[Finding]:
    return [
        Finding(
            name,
            level,
            facts.counts[name],
            f"{count_rows(facts.counts[name])} {text}",
            hint,
            tuple(facts.notable.get(name, ())),
        )
        for name, (level, text, hint) in _TEXTS.items()
    ]


def _proportions(facts: Facts, lengths: np.ndarray, labels: np.ndarray) -> list[Finding]:
    share = labels.sum() / max(1, lengths.sum())
    few = f"only {share:.1%} of the tokens are labels; the rest is computed and not learned from"
    unrolled = "of which several examples come, since the template rewrites earlier turns"
    return [
        Finding("few_labels", "note", int(0 < share < _FEW_LABELS) and int(labels.sum()), few),
        Finding("unrolled", "note", facts.unrolled, f"{count_rows(facts.unrolled)} {unrolled}"),
    ]


def _again(keys: np.ndarray) -> np.ndarray:
    """Places of the keys that occurred before, ascending."""
    first = np.unique(keys, return_index=True)[1]
    again = np.ones(len(keys), bool)
    again[first] = False
    return np.flatnonzero(again)


def count_rows(count: int) -> str:
    """``1 row`` or ``2 rows``."""
    return "1 row" if count == 1 else f"{count:,} rows"


def _examples(count: int) -> str:
    return "1 example" if count == 1 else f"{count:,} examples"
