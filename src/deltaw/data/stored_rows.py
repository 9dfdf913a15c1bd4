"""The usable rows of all sources as stored examples: found in the cache, or read in chunks and kept there.

It knows sources, chunks and the cache; not duplicates, splits or weights.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaw.data.bad_rows import BadRowError, BadRows
from deltaw.data.chunk import Account, ChunkReader, LongRows
from deltaw.data.example import Example
from deltaw.data.formats import Form, choose_form, unused_columns
from deltaw.data.mixture import Source
from deltaw.data.progress import Progress, Say
from deltaw.data.report import Report
from deltaw.data.row_cache import RowCache, RowWriter, key_of
from deltaw.data.row_key import facts_of
from deltaw.data.row_store import RowStore
from deltaw.data.row_stream import RowStream
from deltaw.data.rows import Rows
from deltaw.data.settings import DataSettings
from deltaw.data.sources import open_source
from deltaw.data.split import check_group, choose, group_digest, groups_of
from deltaw.data.templates import Encoder
from deltaw.data.workers import in_order, processes
from deltaw.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# With ``data.cache: auto``, rows are kept where their files are larger, or where tokenizing took longer.
LARGE_BYTES, LONG_SECONDS = 8 * 2**20, 1.0
# Below this, looking for kept rows takes longer than making them.
TINY_BYTES = 2**18
# Files that are larger are read by several processes.
SEVERAL_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Read:
    """The usable rows of all sources.

    Attributes:
        rows: their examples. report: what became of the others.
        ends: by source, how many rows there are up to its last.
    """

    rows: RowStore
    report: Report
    ends: list[int]

    def source_of(self, places: np.ndarray) -> np.ndarray:
        """(n,) the number of the source that each example comes from."""
        if len(self.ends) == 1:
            return np.zeros(len(places), np.int64)
        return np.searchsorted(self.ends, self.rows.ordinals()[places], side="right")


def read_stored(
    sources: Sequence[Source],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    bad: BadRows,
    *,
    seed: int = 0,
    say: Say,
) -> Read:
    """The rows of all sources, tokenized once for all runs that read the same.

    Args:
        settings: the ``data:`` section; its ``train``, ``eval`` and ``duplicates`` do not matter here.
        bad: told of rows that cannot be used.
        seed: of the rows that are chosen, where ``rows`` asks for fewer.
        say: told how far a long reading is.

    Raises:
        UserError: the data cannot be used; the message names the file and the row.
    """
    reading = _Reading.of(sources, settings, tokenizer, seed, say)
    with contextlib.ExitStack() as opened:
        cache = _cache(reading, tokenizer, opened)
        read = None if cache is None else cache.find(reading.known)
        if read is None:
            read = reading.into(opened.enter_context(RowWriter(cache)))
    bad.extend(reading.bad)
    return read


def _cache(
    reading: _Reading, tokenizer: PreTrainedTokenizerBase, opened: contextlib.ExitStack
) -> RowCache | None:
    """Where these rows are kept; None where they are not to be, or where it cannot be told what they are."""
    settings = reading.settings
    if settings.cache is False or (settings.cache == "auto" and reading.bytes <= TINY_BYTES):
        return None
    contents = [stream.identity() for stream in reading.streams]
    if any(content is None for content in contents):
        return None
    encoder = reading.encoder.identity
    facts = facts_of(reading.sources, contents, settings, tokenizer, encoder, reading.seed)
    if facts is None:
        return None
    try:
        return opened.enter_context(RowCache(key_of(facts), reading.say))
    except UserError:
        if settings.cache is True:
            raise
        return None


@dataclass(frozen=True)
class _Reading:
    """Sources that are to be read."""

    sources: Sequence[Source]
    streams: Sequence[RowStream]
    settings: DataSettings
    encoder: Encoder
    bad: BadRows
    seed: int
    say: Say
    name: str

    @classmethod
    def of(
        cls,
        sources: Sequence[Source],
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        say: Say,
    ) -> _Reading:
        bad = BadRows(settings.bad_rows)
        encoder = Encoder(tokenizer, settings.template, settings.labels, settings.date)

        def on_bad(error: UserError, reason: str, row: object) -> None:
            bad.add(BadRowError(error.what, reason=reason, where=error.where, hint=error.hint), row)

        skip = on_bad if settings.bad_rows == "skip" else None
        streams = [
            open_source(source.reference, skip, max_bytes=settings.max_row_bytes) for source in sources
        ]
        name = " + ".join(source.reference for source in sources)
        return cls(sources, streams, settings, encoder, bad, seed, say, name)

    @property
    def bytes(self) -> int:
        return sum(stream.bytes for stream in self.streams)

    def known(self, rows: RowStore, facts: dict[str, Any], skipped: Path) -> Read:
        """Rows that were kept, with what was counted when they were made, and the list of skipped ones."""
        if facts["report"]["bad_rows"]:
            self.bad.extend(BadRows.read(skipped))
        told = dict(facts["report"])
        told["unused_columns"] = tuple(told["unused_columns"])
        return Read(rows, Report(source=self.name, **told), list(facts["ends"]))

    def into(self, writer: RowWriter) -> Read:
        """Read all usable rows and give them to ``writer``.

        Raises:
            UserError: a row cannot be used, or none is left.
        """
        forms = self._scan()
        counts = [stream.rows for stream in self.streams]
        chosen = choose(sum(counts), self.settings.rows, self.seed)
        progress = Progress(self.say, f"tokenizing {self.name}", self.bytes)
        account, long = Account(), LongRows()
        count = processes() if self.bytes > SEVERAL_BYTES else 1
        read = functools.partial(self._read_part, forms)
        for part in in_order(self._parts(chosen), read, count):
            writer.add(part.examples, part.ordinals, part.groups)
            account += part.account
            long.extend(part.long)
            self.bad.put(part.skipped)
            progress.at(part.end, sum(stream.position for stream in self.streams))
        if long.count:
            raise long.error(self.settings.max_length)
        report = self._report(forms, account, len(chosen), len(writer))
        facts = {
            "report": {k: v for k, v in report.as_dict().items() if k not in ("source", "evaluation")},
            "ends": np.cumsum(counts).tolist(),
        }
        keep = self.settings.cache is True or self.bytes > LARGE_BYTES or progress.seconds > LONG_SECONDS
        about = f"{self.name}: {len(writer):,} examples"
        rows = writer.finish(about, facts, keep=keep, write_skipped=self.bad.write if self.bad else None)
        return Read(rows, report, list(facts["ends"]))

    def _columns(self, source: Source) -> dict[str, str]:
        return self.settings.columns if source.columns is None else source.columns

    def _scan(self) -> list[Form]:
        """Find the format of each source, before anything slow begins."""
        forms = []
        for source, stream in zip(self.sources, self.streams, strict=True):
            progress = Progress(self.say, f"reading {source.reference}", stream.bytes)
            stream.scan(progress.at)
            check_group(stream.name, stream.columns, self.settings.group)
            forms.append(choose_form(stream, source.form or self.settings.form, self._columns(source)))
        return forms

    def _parts(self, chosen: Sequence[int]) -> Iterator[_Part]:
        """The chosen rows of all sources, in chunks."""
        begin = 0
        for source, stream in enumerate(self.streams):
            for chunk in stream.chunks():
                indices = _inside(chosen, begin, len(chunk))
                if len(indices):
                    yield _Part(source, chunk, indices, begin)
                begin += len(chunk)

    def _read_part(self, forms: Sequence[Form], part: _Part) -> _PartRead:
        """The examples of some rows, each with the number of its row over all sources, and with its group."""
        settings = replace(self.settings, columns=self._columns(self.sources[part.source]))
        bad = BadRows(settings.bad_rows)
        reader = ChunkReader(self.encoder, forms[part.source], settings, bad)
        lists = reader.read(part.chunk, part.indices)
        values = groups_of(part.chunk, part.indices, settings.group)
        examples: list[Example] = []
        ordinals: list[int] = []
        groups: list[bytes] = []
        for index, value, found in zip(part.indices, values, lists, strict=True):
            examples += found
            ordinals += [part.begin + index] * len(found)
            groups += [group_digest(value)] * len(found) if settings.group is not None else []
        end = part.begin + len(part.chunk)
        return _PartRead(examples, ordinals, groups, reader.account, reader.long, list(bad.lines()), end)

    def _report(self, forms: Sequence[Form], account: Account, chosen: int, kept: int) -> Report:
        """What became of the rows.

        Raises:
            UserError: none is left.
        """
        if not kept:
            raise _nothing_left(self.name, account.dropped_long, account.without_label, len(self.bad))
        names = dict.fromkeys(form.name for form in forms)
        templates = dict.fromkeys("plain" if form.name == "text" else self.encoder.template for form in forms)
        unused: dict[str, None] = {}
        for source, stream, form in zip(self.sources, self.streams, forms, strict=True):
            unused.update(dict.fromkeys(unused_columns(stream, form, self._columns(source))))
        unused.pop(str(self.settings.group), None)
        rows, unread = (sum(counts) for counts in zip(*((s.rows, s.bad) for s in self.streams), strict=True))
        return Report(
            source=self.name,
            form=" + ".join(names),
            template=" + ".join(templates),
            rows_read=rows + unread,
            rows_kept=kept,
            not_chosen=rows - chosen,
            unused_columns=tuple(unused),
            date=self.encoder.dated if "chat" in templates else None,
            bad_rows=dict(self.bad.counts),
            **account.as_dict(),
        )


@dataclass(frozen=True)
class _Part:
    """Rows to be read: those at ``indices`` of a chunk, whose first row is number ``begin`` of all."""

    source: int
    chunk: Rows
    indices: Sequence[int]
    begin: int


@dataclass(frozen=True)
class _PartRead:
    """What became of the rows of a part, the last of which is before number ``end``."""

    examples: list[Example]
    ordinals: list[int]
    groups: list[bytes]
    account: Account
    long: LongRows
    skipped: list[dict[str, object]]
    end: int


def _inside(chosen: Sequence[int], begin: int, count: int) -> Sequence[int]:
    """Which of ``count`` rows from ``begin`` on are chosen, counted from there."""
    if isinstance(chosen, range):
        return range(count)
    first, last = np.searchsorted(chosen, [begin, begin + count])
    return [index - begin for index in chosen[first:last]]


def _nothing_left(name: str, dropped: int, without_label: int, skipped: int) -> UserError:
    unusable = f", {skipped:,} cannot be used" if skipped else ""
    return UserError(
        f"no row is left to train on: {dropped:,} are too long, and {without_label:,} have no label"
        + unusable,
        where=name,
        hint="raise data.max_length, or check the answers: empty and truncated ones have no label",
    )
