"""What happened to each row of a data set: how many were kept, skipped, truncated or dropped, and why.

Counts only; it knows neither files nor tokenizers.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from deltaw.durable import replacing
from deltaw.errors import UserError
from deltaw.working import Detail

# Lines on how far a long reading is: rows, megabytes a second, time left.
#
# It knows counts and the clock; not what is read or who is told.


# The first line comes after so many seconds, further ones so many seconds apart: more in a long reading.
FIRST, APART, MOST_APART = 3.0, 5.0, 30.0

Say = Callable[[str], None]


def silent(line: str) -> None:
    """Tell nobody."""


class Progress:
    """Tells how far a reading is, now and then.

    Args:
        say: told the lines. what: what is done, as in ``"tokenizing data.jsonl"``.
        total: bytes that there are; 0 where they are not known.
        rows: Number of rows, if it is known. done: Rows that an earlier process finished.
    """

    def __init__(self, say: Say, what: str, total: int, *, rows: int = 0, done: int = 0) -> None:
        self._rows, self._done = rows, done
        self._say = say
        self._what = what
        self._total = total
        self._begun = time.monotonic()
        self._next = self._begun + FIRST

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._begun

    def at(self, rows: int, position: int) -> None:
        """``rows`` and ``position`` bytes are done."""
        now = time.monotonic()
        if now < self._next:
            return
        seconds = now - self._begun
        self._next = now + min(MOST_APART, max(APART, seconds / 10))
        line = f"{self._what}: {rows:,} rows"
        if position and self._total:
            rate = position / seconds
            left = max(0, self._total - position) / rate
            line += f", {size(position)} of {size(self._total)}, {rate / 1e6:.1f} MB/s, {span(left)} left"
        else:
            rate = (rows - self._done) / seconds
            line += f" of {self._rows:,}" if self._rows else ""
            line += f", {rate:,.0f} rows/s" if rate >= 10 else f", {rate:.2g} rows/s"
            line += f", {span((self._rows - rows) / rate)} left" if self._rows and rate else ""
        self._say(line)


def size(count: int) -> str:
    """Bytes for a person."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def span(seconds: float) -> str:
    """A time for a person."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# Rows that cannot be used: an error at the first of them, or skipped, counted by reason and listed.
#
# The list is a temporary file, since a large file may have many such rows. It knows no format and no tokenizer.


SKIPPED_ROWS = "skipped_rows.jsonl"
# The most bytes that a row may have in its file, unless ``data.max_row_bytes`` says otherwise. Tokenizing
# takes up to 160 times a row's bytes in memory.
MAX_ROW_BYTES = 16 * 2**20
TOO_LONG = "longer than data.max_row_bytes"
SKIPPING = "or leave such rows out with data.bad_rows: skip"
# Characters of a skipped row that are listed, and of what is said of it: it may quote the row.
_SHOWN, _SAID = 2000, 500


class BadRowError(UserError):
    """One row cannot be used; others may be.

    Args:
        what, where, hint: as for every error of the user's.
        reason: the kind of fault in a few words, the same for all rows that have it.
    """

    def __init__(self, what: str, *, reason: str, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what if len(what) <= _SAID else what[:_SAID] + "…", where=where, hint=hint)
        self.reason = reason

    def of_file(self) -> UserError:
        """The same where no row of the file can be skipped: what follows it cannot be told."""
        return UserError(self.what, where=self.where, hint=self.hint)


def too_long(what: str, max_bytes: int, *, where: str, size: int | None = None, hint: str = "") -> BadRowError:
    """The error for a row that is not read because of its length.

    Args:
        what: what is too long, as in ``"line 7"``. where: its place.
        size: its bytes, where they are known without reading it. hint: what else may be wrong.
    """
    has = "has more" if size is None else f"has {size:,} bytes, more"
    what = f"{what} {has} than the {max_bytes:,} bytes that a row may have"
    hint = (hint and f"{hint}; ") + "if it is meant to be that long, raise data.max_row_bytes"
    return BadRowError(what, reason=TOO_LONG, where=where, hint=hint)


# Told the place of a row in a chunk and why it cannot be used; returns if the row is to be skipped.
Refuse = Callable[[int, BadRowError], None]


def refuse(place: int, error: BadRowError) -> None:
    """The :data:`Refuse` that skips nothing."""
    raise error


class BadRows:
    """Rows that were skipped.

    Args:
        mode: as ``data.bad_rows``: "error" raises for the first such row, "skip" lists it.

    Attributes:
        counts: rows by reason.
    """

    def __init__(self, mode: Literal["error", "skip"] = "error") -> None:
        self.mode = mode
        self.counts: Counter[str] = Counter()
        self._file: IO[bytes] | None = None

    @classmethod
    def read(cls, path: Path) -> BadRows:
        """The rows that :meth:`write` wrote."""
        found = cls("skip")
        with path.open("rb") as lines:
            found.extend(map(json.loads, lines))
        return found

    def __len__(self) -> int:
        return self.counts.total()

    def add(self, error: BadRowError, row: object) -> None:
        """Skip one row, or raise ``error``."""
        if self.mode == "error":
            raise error
        self._put({"where": error.where, "reason": error.reason, "error": error.what, "row": _shown(row)})

    def extend(self, lines: Iterable[dict[str, object]]) -> None:
        """Add rows that were skipped elsewhere, as :meth:`lines` tells them."""
        for line in lines:
            self._put(line)

    def lines(self) -> Iterator[dict[str, object]]:
        """Each skipped row: ``where``, ``reason``, ``error``, and the ``row``; of a long one, its first
        characters as a string."""
        if self._file is None:
            return
        self._file.seek(0)
        for line in self._file:
            yield json.loads(line)
        self._file.seek(0, 2)

    def write(self, path: Path) -> None:
        """Write the list as JSON Lines."""
        with replacing(path) as temporary, temporary.open("wb") as to:
            if self._file is not None:
                self._file.seek(0)
                shutil.copyfileobj(self._file, to)
                self._file.seek(0, 2)

    def _put(self, line: dict[str, object]) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        self.counts[str(line["reason"])] += 1
        # Half of a surrogate pair has no UTF-8; its escape is JSON.
        self._file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")


def _shown(row: object) -> object:
    """A row for the list; a long one, and one with numbers that JSON does not have, as a string."""
    if isinstance(row, bytes):
        row = row.decode("utf-8", "replace")
    text = json.dumps(row, ensure_ascii=False, default=lambda value: f"<{type(value).__name__}>")
    if len(text) > _SHOWN:
        return (row if isinstance(row, str) else text)[:_SHOWN] + "…"
    try:
        return json.loads(json.dumps(json.loads(text), allow_nan=False))
    except ValueError:
        return text


def class_counts_line(counts: Mapping[str, int]) -> str:
    """Return a line with the number of rows of the first classes."""
    shown = ", ".join(f"{name} {count:,}" for name, count in list(counts.items())[:12])
    more = f", and {len(counts) - 12:,} more" if len(counts) > 12 else ""
    return f"{len(counts)} classes, rows of each: {shown}{more}"


@dataclass(frozen=True)
class Report:
    """The row counts of one preparation.

    ``rows_read + added = not_chosen + not_drawn + skipped + dropped_long + without_label + other_classes +
    rows_kept``, plus ``duplicates`` if they were dropped (not ``duplicates_kept``), plus ``held_out`` if
    those rows come from the same file (``held_out_source`` is None). A row that becomes several examples is
    counted once in ``rows_read``; the others are in ``added``, and each example is counted like a row from
    then on.

    Attributes:
        source: the reference that the rows came from.
        form: what the rows were read as, such as "messages".
        template: "chat" or "plain"; empty for labeled rows, which have no template.
        date: what the template writes into rows as the current date; None if it writes none.
        rows_read: rows in the file.
        not_chosen: rows skipped because ``data.rows`` asked for fewer.
        rows_kept: rows to train on (of an evaluation file, rows to evaluate on).
        bad_rows: rows skipped because they cannot be used, by reason.
        unrolled: rows whose turns became ``unrolled_examples`` examples, since the template renders earlier
            turns differently once more turns follow.
        split: rows longer than ``max_length`` that were divided into ``split_examples`` examples.
        cut: kept rows that were truncated to ``max_length``; ``tokens_cut`` is the tokens they lost.
        labels_cut: label tokens lost by truncation, those of rows without any label left included.
        dropped_long: rows dropped because they are longer than ``max_length``; they had ``labels_dropped``
            label tokens.
        without_label: rows dropped because they have no label.
        duplicates: rows with the same tokens and labels as an earlier one.
        duplicates_kept: whether duplicates are kept, as in an evaluation file.
        trailing_turns: rows that end with turns after the assistant's last one; those turns are dropped.
        held_out: rows held out for evaluation.
        held_out_source: the file that they came from; None if that is the training file.
        overlap: held-out rows that are also training rows; only a separate file can have any.
        tokens: tokens of the kept rows; ``label_tokens`` of them are labels.
        longest: tokens of the longest row, kept or held out.
        group: the column whose value keeps rows together when some are held out.
        groups: groups in the training rows; ``held_out_groups`` others are held out.
        class_counts: kept rows of each class, in the order of the classes; empty without classes.
        other_classes: rows dropped because their class is not in ``data.classes``.
        image_sizes: smallest and largest height and width of the images, if they differ.
        other_files: files in an image folder that are not images.
        unused_columns: columns of the file that were not read.
        repeated: rows that come in an epoch again because their source has a weight above 1.
        not_drawn: rows that are left out because their source has a weight with a fraction, and not drawn.
        sources: by reference, where there are several, the source's ``weight`` and its ``rows`` in an epoch.
        system: the system message that at least nine of ten rows begin with; None if there is none.
        system_rows: rows with a system message.
        evaluation: the report of the separate evaluation file, if there is one.
    """

    source: str
    form: str
    template: str
    rows_read: int
    rows_kept: int
    not_chosen: int = 0
    bad_rows: dict[str, int] = field(default_factory=dict)
    unrolled: int = 0
    unrolled_examples: int = 0
    split: int = 0
    split_examples: int = 0
    cut: int = 0
    tokens_cut: int = 0
    labels_cut: int = 0
    dropped_long: int = 0
    labels_dropped: int = 0
    without_label: int = 0
    duplicates: int = 0
    duplicates_kept: bool = False
    trailing_turns: int = 0
    held_out: int = 0
    held_out_source: str | None = None
    overlap: int = 0
    tokens: int = 0
    label_tokens: int = 0
    longest: int = 0
    group: str | None = None
    groups: int = 0
    held_out_groups: int = 0
    class_counts: dict[str, int] = field(default_factory=dict)
    other_classes: int = 0
    image_sizes: tuple[int, int, int, int] | None = None
    other_files: int = 0
    unused_columns: tuple[str, ...] = ()
    date: str | None = None
    repeated: int = 0
    not_drawn: int = 0
    sources: dict[str, dict[str, float]] = field(default_factory=dict)
    system: str | None = None
    system_rows: int = 0
    evaluation: Report | None = None

    @property
    def skipped(self) -> int:
        """Rows that cannot be used."""
        return sum(self.bad_rows.values())

    @property
    def added(self) -> int:
        """Examples beyond one a row."""
        return self.unrolled_examples - self.unrolled + self.split_examples - self.split

    def lines(self) -> list[str]:
        """The report for a person: totals always, other counts only above zero."""
        template = f" ({self.template} template)" if self.template else ""
        sizes = f": {self.tokens:,} tokens"
        sizes += f", {self.label_tokens:,} of them labels" if self.template else ""
        sizes += f"; the longest row has {self.longest:,} tokens"
        origin = f" from {self.held_out_source}" if self.held_out_source else ""
        held_out = f", {self.held_out:,} held out{origin}" if self.held_out else ""
        lines: list[str] = [
            f"rows: {self.rows_read:,} read from {self.source}, {self.rows_kept:,} kept{held_out}",
            Detail(f"read as {self.form}{template}" + ("" if self.form == "labeled images" else sizes)),
            *self._lines_of_labels(),
        ]
        if self.system and not self.duplicates_kept:
            lines.append(f"system prompt, kept with the run: {quoted(self.system, 36)}")
        unrolled = f"became {self.unrolled_examples:,} examples, since the template rewrites earlier turns"
        kept = "kept" if self.duplicates_kept else "dropped"
        lost = f"{self.tokens_cut:,} tokens lost, {self.labels_cut:,} of them labels"
        split = f"{self.split_examples:,} examples; no label is lost"
        losses = [
            (self.unrolled, f"{unrolled}: each turn is trained as it is written"),
            (self.split, f"longer than data.max_length became {split}"),
            (self.skipped, f"skipped: {', '.join(self.bad_rows)}"),
            (self.not_chosen, "skipped: data.rows asks for fewer"),
            (self.duplicates, f"{kept}: the same as an earlier row"),
            (self.dropped_long, f"dropped: longer than data.max_length ({self.labels_dropped:,} labels lost)"),
            (self.other_classes, "dropped: their class is not in data.classes"),
            (self.without_label, "dropped: no label (an empty answer, or all of it truncated)"),
            (self.cut, f"truncated to data.max_length: {lost}"),
            (self.trailing_turns, "truncated after the assistant's last turn: nothing answers what follows"),
            (self.repeated, "more in an epoch: their source has a weight above 1"),
            (self.not_drawn, "left out: their source has a weight with a fraction"),
            (self.overlap, "of the evaluation file are also training rows, which inflates its scores"),
        ]
        lines += [f"{count_of(count)} {what}" for count, what in losses if count]
        for reference, told in self.sources.items():
            weight = f"weight {told['weight']:g}, {count_of(int(told['rows']))} in an epoch"
            lines.append(Detail(f"{reference}: {weight}"))
        if self.date:
            lines.append(Detail(f"the template writes the date into each row: {self.date} (data.date sets it)"))
        if self.unused_columns:
            lines.append(Detail("unused columns: " + ", ".join(self.unused_columns)))
        if self.evaluation:
            lines += self.evaluation.lines()[1:]
        return lines

    def _lines_of_labels(self) -> list[str]:
        """The lines on groups, classes and images."""
        lines: list[str] = []
        if self.group:
            sides = f"{self.groups:,} groups to train on, {self.held_out_groups:,} held out"
            lines.append(Detail(f"rows with the same '{self.group}' stay together: {sides}"))
        if self.class_counts:
            lines.append(Detail(class_counts_line(self.class_counts)))
            few = [name for name, count in self.class_counts.items() if count < 2]
            if few and not self.duplicates_kept:
                lines.append(f"classes with fewer than 2 training rows: {', '.join(few[:12])}")
            if not self.duplicates_kept:
                lines += [f"possible typing error: class {text}" for text in similar_classes(self.class_counts)[:5]]
        if self.image_sizes:
            low_height, low_width, height, width = self.image_sizes
            sizes = f"{low_height}×{low_width} to {height}×{width} pixels"
            lines.append(Detail(f"images of {sizes}, resized by the model's preprocessor"))
        if self.other_files:
            what = "file that is not an image" if self.other_files == 1 else "files that are not images"
            lines.append(f"{self.other_files:,} {what} skipped")
        return lines

    def as_dict(self) -> dict[str, object]:
        """Every count by name, ready for JSON."""
        return dataclasses.asdict(self)


def similar_classes(counts: Mapping[str, int]) -> list[str]:
    """Describe classes that are probably misspelled.

    These are names that differ from another one in case or white space only, and names of very few rows that are one
    edit away from a frequent one.
    """
    found, names = [], sorted(counts, key=lambda name: (counts[name], name))
    for place, rare in enumerate(names[: 10**6 // max(1, len(names))]):
        for other in reversed(names[place + 1 :]):
            left, right = (" ".join(name.casefold().split()) for name in (rare, other))
            few = counts[rare] <= max(2, counts[other] // 50) and counts[rare] < counts[other]
            if left == right or (few and min(len(left), len(right)) > 3 and _is_one_edit(left, right)):
                found.append(f"{rare!r} ({count_of(counts[rare])}) is almost {other!r} ({count_of(counts[other])})")
                break
    return found


def _is_one_edit(left: str, right: str) -> bool:
    """Return True if one inserted, removed, replaced or swapped character, which is no digit, makes the texts equal."""
    start = _shared_prefix(left, right)
    end = _shared_prefix(left[start:][::-1], right[start:][::-1])
    one, other = left[start : len(left) - end], right[start : len(right) - end]
    swapped = len(one) == 2 and one == other[::-1]
    return (swapped or max(len(one), len(other)) <= 1) and not any(map(str.isdigit, one + other))


def _shared_prefix(left: str, right: str) -> int:
    return next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def quoted(text: str, most: int) -> str:
    """A text in quotes on one line, of a long one its beginning: nothing in it moves a terminal's cursor."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * most]).split())
    return f'"{line}"' if len(line) <= most else f'"{line[: most - 1].rstrip()}…"'


def count_of(count: int, noun: str = "row") -> str:
    """``1 row`` or ``2 rows``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
