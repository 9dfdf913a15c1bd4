"""What is wrong, or may be, with the rows of a run: findings from the facts of its examples, and a verdict.

It knows numbers; not files, tokenizers, or how findings are shown.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from deltaw.data.chunk import example_of
from deltaw.data.example import Example
from deltaw.data.formats import Form, Pair, Record, Text, choose_form, read_records, with_system
from deltaw.data.mixture import Train, sources_of
from deltaw.data.pieces import special_tokens
from deltaw.data.report import BadRowError, BadRows, count_of
from deltaw.data.rows import Rows
from deltaw.data.settings import DataSettings
from deltaw.data.sources import open_source
from deltaw.data.templates import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# A few numbers for each example of a data set: what a check of the data needs of it, in bounded memory.
#
# Texts are kept as hashes of eight bytes, so that millions of rows take some 50 bytes each. It knows rows and
# their tokens; what the numbers mean is :mod:`deltaw.data.check`'s.


# A character that stands where text was decoded wrongly.
_LOST = "\ufffd"
_NO_LETTERS = re.compile(r"[\W_]+")


# Of each example: the number of its row; its tokens, how many of them are labels, and how many of these lie beyond
# ``data.max_length``. Hashes: equal for the same tokens and labels (key), for the same prompts (0 without one), for
# the same answers, and for rows that differ only in case, spacing and punctuation (text).
_NUMBERS = np.dtype(
    [("row", "i8"), *((name, "i4") for name in ("length", "labels", "lost"))]
    + [(name, "u8") for name in ("key", "prompt", "answer", "text")]
)
# Places that a finding names.
_SHOWN = 5


@dataclass
class Facts:
    """The numbers of the examples of one source or several.

    Attributes:
        form, template: as in the report.
        rows: rows read, without those that cannot be used, which are in ``bad``.
        unrolled: rows of which several examples came.
        ends: tokens that end a text, by how many examples' last label they are.
        ended: examples whose last label ends a text.
        notable: places of rows by what is notable about them, the first few, and how many there are.
    """

    form: str = ""
    template: str = ""
    rows: int = 0
    bad: BadRows = field(default_factory=lambda: BadRows("skip"))
    unrolled: int = 0
    ends: Counter[int] = field(default_factory=Counter)
    ended: int = 0
    notable: dict[str, list[str]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    _numbers: bytearray = field(default_factory=bytearray)
    _starts: list[int] = field(default_factory=list)
    _files: list[str] = field(default_factory=list)

    @property
    def examples(self) -> np.ndarray:
        """(n,) the numbers of each example, see :data:`_NUMBERS`."""
        return np.frombuffer(bytes(self._numbers), _NUMBERS)

    def first_of_rows(self) -> np.ndarray:
        """The places of the first example of each row."""
        return np.union1d(np.flatnonzero(np.diff(self.examples["row"])) + 1, self._starts).astype(np.int64)

    def places(self, examples: np.ndarray) -> tuple[str, ...]:
        """Where the rows of the first few of these examples are."""
        examples = examples[:_SHOWN]
        files = [self._files[part - 1] for part in np.searchsorted(self._starts, examples, side="right")]
        rows = self.examples["row"][examples]
        return tuple(dict.fromkeys(f"{file}, row {row}" for file, row in zip(files, rows, strict=True)))

    def note(self, what: str, where: str) -> None:
        """Count a row with something notable about it."""
        self.counts[what] += 1
        places = self.notable.setdefault(what, [])
        if len(places) < _SHOWN:
            places.append(where)

    def add(self, example: Example, where: str, text: int, max_length: int, ends: frozenset[int]) -> None:
        """Note one example."""
        file = where.rpartition(", row ")[0]
        if not self._files or self._files[-1] != file:
            self._starts.append(len(self._numbers) // _NUMBERS.itemsize)
            self._files.append(file)
        tokens, labels = example.tokens, np.flatnonzero(example.is_label)
        prompt, answer = tokens[: example.prompt_length], tokens[example.prompt_length :]
        numbers = (
            example.row,
            len(example),
            len(labels),
            int((labels >= max_length).sum()),
            digest_of(tokens.tobytes(), np.packbits(example.is_label).tobytes()),
            digest_of(prompt.tobytes()) if len(prompt) else 0,
            digest_of(answer.tobytes()),
            text,
        )
        self._numbers += np.array(numbers, _NUMBERS).tobytes()
        last = int(tokens[labels[-1]]) if len(labels) else -1
        if last in ends:
            self.ended += 1
            self.ends[last] += 1


def collect(train: Train, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> Facts:
    """The facts of all rows of ``train`` (as ``data.train``), whatever their length.

    Args:
        ends: the tokens that end a text.

    Raises:
        UserError: there is no such file, it cannot be read, or no format fits its columns.
    """
    facts, encoder = Facts(), Encoder(tokenizer, settings.template, settings.labels, settings.date)
    names = sorted(set(special_tokens(tokenizer).values()) - {""}, key=len, reverse=True)
    names = [name for name in names if len(name) > 2]  # shorter ones occur in ordinary text
    special = re.compile("|".join(map(re.escape, names))) if names else None
    for source in sources_of(train):
        stream = open_source(source.reference, facts.bad.add, max_bytes=settings.max_row_bytes)
        stream.scan()
        columns = settings.columns if source.columns is None else source.columns
        form: Form | None = None
        for chunk in stream.chunks():
            form = form or choose_form(chunk, source.form or settings.form, columns)
            facts.form = form.name
            facts.template = "plain" if form.name == "text" else encoder.template
            for where, record, examples in _of_chunk(chunk, form, columns, settings.system, encoder, facts.bad):
                facts.rows += 1
                facts.unrolled += len(examples) > 1
                for what in _notable(record, special):
                    facts.note(what, where)
                text = "\0".join(text for text, _ in _texts_of(record))
                plain = digest_of(_NO_LETTERS.sub(" ", text.casefold()).strip().encode("utf-8", "replace"))
                for example in examples:
                    facts.add(example, where, plain, settings.max_length, frozenset(ends))
    return facts


def _of_chunk(
    rows: Rows, form: Form, columns: Mapping[str, str], system: str | None, encoder: Encoder, bad: BadRows
) -> Iterator[tuple[str, Record, list[Example]]]:
    """The place, the record and the examples of each usable row."""
    places = [rows.place(index) for index in range(len(rows))]
    refused: set[int] = set()

    def on_bad(place: int, error: BadRowError) -> None:
        refused.add(place)
        bad.add(error, rows[place][1])

    records = [with_system(record, system) for record in read_records(rows, range(len(rows)), form, columns, on_bad)]
    for index, (record, parts) in enumerate(zip(records, encoder.encode(records, places, on_bad), strict=True)):
        if record is not None and index not in refused:
            yield places[index], record, [example_of(rows.number(index), part) for part in parts]


def _texts_of(record: Record) -> list[tuple[str, bool]]:
    """The texts of a record, and whether each is an answer."""
    if isinstance(record, Text):
        return [(record.text, False)]
    if isinstance(record, Pair):
        return [(record.system or "", False), (record.prompt, False), (record.completion, True)]
    return [(str(m["content"]), m["role"] == "assistant") for m in record.messages]


def _notable(record: Record, special: re.Pattern[str] | None) -> list[str]:
    """What is notable about a record, by the names of findings; ``special`` finds written special tokens."""
    texts, found = _texts_of(record), []
    if not any(text.strip() for text, _ in texts):
        found.append("blank")
    answers = [text for text, is_answer in texts if is_answer]
    calls = any(m.get("tool_calls") for m in getattr(record, "messages", ()))
    if answers and not calls and not any(c.isalnum() for c in answers[-1]):
        found.append("empty_answer" if not answers[-1].strip() else "answer_without_letters")
    if any(_LOST in text for text, _ in texts):
        found.append("lost_characters")
    if special and any(special.search(text) for text, _ in texts):
        found.append("special_tokens_in_text")
    return found


def digest_of(*parts: bytes) -> int:
    """Eight bytes as a number, not 0."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little") or 1


Level = Literal["error", "warning", "note"]
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
    examples = facts.examples
    lengths, labels = examples["length"], examples["labels"]
    found = [*bad_rows_found(facts.bad, settings, ""), *_nothing(facts), *_long_rows(facts, settings, "")]
    found += _without_labels(facts, labels)
    found += _ends(facts, labels, end_names)
    found += _duplicates(facts, settings)
    found += _contradictions(facts)
    for name, (level, text, hint) in _TEXTS.items():
        count, places = facts.counts[name], tuple(facts.notable.get(name, ()))
        found.append(Finding(name, level, count, f"{count_of(count)} {text}", hint, places))
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
        len(examples),
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
    shortest, median, p95, longest = (int(length) for length in np.quantile(lengths, [0, 0.5, 0.95, 1]))
    return Lengths(shortest, median, round(float(lengths.mean()), 1), p95, longest, _bins(lengths))


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
    return tuple(f for level in ("error", "warning", "note") for f in found if f.count and f.level == level)


def bad_rows_found(bad: BadRows, settings: DataSettings, where: str) -> list[Finding]:
    """Rows that cannot be used, by reason; ``where`` says of which file."""
    refused = settings.bad_rows == "error"
    rows: dict[str, list[str]] = {reason: [] for reason in bad.counts}
    for line in bad.lines():
        places = rows[str(line["reason"])]
        if len(places) < _SHOWN:
            places.append(f"{line['where']}: {line['error']}")
    level: Level = "error" if refused else "warning"
    hint = "correct them, or set data.bad_rows: skip" if refused else "they are skipped"
    return [
        Finding(
            "bad_rows", level, count, f"{count_of(count)}{where} that cannot be used: {reason}", hint, tuple(places)
        )
        for (reason, count), places in zip(bad.counts.items(), rows.values(), strict=True)
    ]


def _nothing(facts: Facts) -> list[Finding]:
    if len(facts.examples):
        few = f"there are only {count_of(facts.rows)}"
        return [Finding("few_rows", "note", int(facts.rows < _FEW_ROWS) and facts.rows, few)]
    return [Finding("no_rows", "error", 1, "no row can be used")]


def _long_rows(facts: Facts, settings: DataSettings, where: str) -> list[Finding]:
    examples = facts.examples
    long = np.flatnonzero(examples["length"] > settings.max_length)
    if not len(long):
        return []
    counted = f"{count_of(len(long))}{where} longer than data.max_length ({settings.max_length:,} tokens)"
    hint = f"data.max_length: {examples['length'].max()} fits all"
    levels: dict[str, Level] = {"error": "error", "split": "note"}
    counted += {
        "error": "",
        "drop": f": dropped, with {examples['labels'][long].sum():,} labels",
        "cut": f": truncated, {examples['lost'][long].sum():,} labels lost",
        "split": ": divided, no label lost",
    }[settings.long_rows]
    hint += "; data.long_rows: cut, drop or split" if settings.long_rows == "error" else ""
    level = levels.get(settings.long_rows, "warning")
    return [Finding("long_rows", level, len(long), counted, hint, facts.places(long))]


def _without_labels(facts: Facts, labels: np.ndarray) -> list[Finding]:
    without = np.flatnonzero(labels == 0)
    if len(without) and len(without) == len(labels):
        return [Finding("no_labels", "error", len(without), "no row has a label: there is nothing to train on")]
    text = f"{count_of(len(without))} without a label, such as an empty answer (dropped)"
    return [Finding("without_label", "warning", len(without), text, None, facts.places(without))]


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
    text = f"{count_of(lacking, 'example')} of {trained:,} without a token at the end that ends a text ({known})"
    return [Finding("end_not_trained", "warning", lacking, text)]


def _duplicates(facts: Facts, settings: DataSettings) -> list[Finding]:
    again = _again(facts.examples["key"])
    done = "dropped" if settings.duplicates == "drop" else "kept, since data.duplicates is keep"
    exact = f"{count_of(len(again), 'example')} with the same tokens and labels as an earlier one ({done})"
    distinct = np.setdiff1d(facts.first_of_rows(), again)
    near = distinct[_again(facts.examples["text"][distinct])]
    alike = f"{count_of(len(near))} like an earlier one but for case, spacing or punctuation"
    return [
        Finding("duplicates", "warning", len(again), exact, None, facts.places(again)),
        Finding("near_duplicates", "note", len(near), alike, None, facts.places(near)),
    ]


def _contradictions(facts: Facts) -> list[Finding]:
    asked = np.flatnonzero(facts.examples["prompt"])
    if not len(asked):
        return []
    prompts, answers = facts.examples["prompt"][asked], facts.examples["answer"][asked]
    order = np.lexsort((answers, prompts))
    same_prompt = prompts[order][1:] == prompts[order][:-1]
    other_answer = answers[order][1:] != answers[order][:-1]
    contradicted = np.unique(prompts[order][1:][same_prompt & other_answer])
    rows = asked[np.isin(prompts, contradicted)]
    counted = f"({count_of(len(rows), 'example')})"
    text = f"{count_of(len(contradicted), 'prompt')} with different answers in different rows {counted}"
    hint = "if one answer is right, correct the others; with data.group they stay on one side of the split"
    found = [Finding("contradictions", "warning", len(contradicted), text, hint, facts.places(rows))]
    if len(np.unique(answers)) == 1 and len(np.unique(prompts)) > 1:
        text = "every prompt has the same answer: the model will learn to say it whatever it is asked"
        found.append(Finding("one_answer", "warning", len(asked), text))
    return found


def _overlap(facts: Facts, others: Facts, name: str) -> list[Finding]:
    known, theirs = facts.examples, others.examples
    is_exact = np.isin(theirs["key"], known["key"])
    is_asked = np.isin(theirs["prompt"], known["prompt"]) & (theirs["prompt"] != 0) & ~is_exact
    exact, asked = np.flatnonzero(is_exact), np.flatnonzero(is_asked)
    same = f"{count_of(len(exact), 'example')} of {name} that are also training rows, which inflates the scores"
    alike = f"{count_of(len(asked), 'example')} of {name} with the prompt of a training row"
    hint = "remove them from one of the files"
    return [
        Finding("overlap", "warning", len(exact), same, hint, others.places(exact)),
        Finding("prompt_overlap", "warning", len(asked), alike, None, others.places(asked)),
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


def _proportions(facts: Facts, lengths: np.ndarray, labels: np.ndarray) -> list[Finding]:
    share = labels.sum() / max(1, lengths.sum())
    few = f"only {share:.1%} of the tokens are labels; the rest is computed and not learned from"
    unrolled = "of which several examples come, since the template rewrites earlier turns"
    return [
        Finding("few_labels", "note", int(0 < share < _FEW_LABELS) and int(labels.sum()), few),
        Finding("unrolled", "note", facts.unrolled, f"{count_of(facts.unrolled)} {unrolled}"),
    ]


def _again(keys: np.ndarray) -> np.ndarray:
    """Places of the keys that occurred before, ascending."""
    return np.setdiff1d(np.arange(len(keys)), np.unique(keys, return_index=True)[1])
