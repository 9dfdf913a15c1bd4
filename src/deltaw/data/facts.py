"""A few numbers for each example of a data set: what a check of the data needs of it, in bounded memory.

Texts are kept as hashes of eight bytes, so that millions of rows take some 50 bytes each. It knows rows and
their tokens; what the numbers mean is :mod:`deltaw.data.check`'s.
"""

from __future__ import annotations

import bisect
import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from deltaw.data.bad_rows import BadRowError, BadRows
from deltaw.data.chunk import example_of
from deltaw.data.example import Example
from deltaw.data.formats import Form, Pair, Record, Text, choose_form, read_records
from deltaw.data.mixture import Source, Train, sources_of
from deltaw.data.pieces import special_tokens
from deltaw.data.rows import Rows
from deltaw.data.settings import DataSettings
from deltaw.data.sources import open_source
from deltaw.data.templates import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
        stream = open_source(
            source.reference, self.facts.bad.add_unreadable, max_bytes=self._settings.max_row_bytes
        )
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
