"""The usable rows of all sources as stored examples: found in the cache, or read in chunks and kept there.

It knows sources, chunks and the cache; not duplicates, splits or weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaw.data.bad_rows import BadRows
from deltaw.data.chunk import Account, ChunkReader
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
from deltaw.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# With ``data.cache: auto``, rows are kept where their files are larger, or where tokenizing took longer.
LARGE_BYTES, LONG_SECONDS = 8 * 2**20, 1.0
# Below this, looking for kept rows takes longer than making them.
TINY_BYTES = 2**18


@dataclass(frozen=True)
class Read:
    """The usable rows of all sources.

    Attributes:
        rows: their examples. report: what became of the others.
        ends: by source, how many rows there are up to its last.
        skipped: rows that cannot be used.
    """

    rows: RowStore
    report: Report
    ends: list[int]
    skipped: BadRows

    def source_of(self, places: np.ndarray) -> np.ndarray:
        """(n,) the number of the source that each example comes from."""
        if len(self.ends) == 1:
            return np.zeros(len(places), np.int64)
        return np.searchsorted(self.ends, self.rows.ordinals()[places], side="right")


def read_stored(
    sources: Sequence[Source],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    say: Say,
) -> Read:
    """The rows of all sources, tokenized once for all runs that read the same.

    Args:
        settings: the ``data:`` section; its ``train``, ``eval`` and ``duplicates`` do not matter here.
        seed: of the rows that are chosen, where ``rows`` asks for fewer.
        say: told how far a long reading is.

    Raises:
        UserError: the data cannot be used; the message names the file and the row.
    """
    reading = _Reading.of(sources, settings, tokenizer, seed, say)
    with contextlib.ExitStack() as opened:
        cache = _cache(reading, tokenizer, opened)
        found = (
            None
            if cache is None
            else cache.find(lambda rows, facts: reading.known(rows, facts, cache.skipped))
        )
        if found is not None:
            return found
        return reading.into(opened.enter_context(RowWriter(cache)))


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
    template = reading.encoder.template
    facts = facts_of(reading.sources, contents, settings, tokenizer, template, reading.seed)
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
    seed: int
    say: Say
    name: str
    bad: BadRows

    @classmethod
    def of(
        cls,
        sources: Sequence[Source],
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        say: Say,
    ) -> _Reading:
        encoder = Encoder(tokenizer, settings.template, settings.labels, settings.date)
        bad = BadRows(settings.bad_rows)
        on_bad = bad.add_unreadable if settings.bad_rows == "skip" else None
        streams = [open_source(source.reference, on_bad) for source in sources]
        name = " + ".join(source.reference for source in sources)
        return cls(sources, streams, settings, encoder, seed, say, name, bad)

    @property
    def bytes(self) -> int:
        return sum(stream.bytes for stream in self.streams)

    def known(self, rows: RowStore, facts: dict[str, Any], skipped: Path) -> Read:
        """Rows that were kept, with what was counted and skipped when they were made."""
        told = dict(facts["report"])
        told["unused_columns"] = tuple(told["unused_columns"])
        bad = BadRows.read(skipped) if told["bad_rows"] else self.bad
        return Read(rows, Report(source=self.name, **told), list(facts["ends"]), bad)

    def into(self, writer: RowWriter) -> Read:
        """Read all usable rows and give them to ``writer``.

        Raises:
            UserError: a row cannot be used, or none is left.
        """
        forms = self._scan()
        counts = [stream.rows for stream in self.streams]
        chosen = choose(sum(counts), self.settings.rows, self.seed)
        progress = Progress(self.say, f"tokenizing {self.name}", self.bytes)
        readers = []
        begin = 0
        for source, stream, form in zip(self.sources, self.streams, forms, strict=True):
            settings = replace(self.settings, columns=self._columns(source))
            readers.append(reader := ChunkReader(self.encoder, form, settings, self.bad))
            for chunk in stream.chunks():
                self._add(chunk, begin, chosen, reader, writer)
                begin += len(chunk)
                progress.at(begin, sum(s.position for s in self.streams))
            reader.check()
        report = self._report(forms, readers, len(chosen), len(writer))
        facts = {
            "report": {k: v for k, v in report.as_dict().items() if k not in ("source", "evaluation")},
            "ends": np.cumsum(counts).tolist(),
        }
        keep = self.settings.cache is True or self.bytes > LARGE_BYTES or progress.seconds > LONG_SECONDS
        about = f"{self.name}: {len(writer):,} examples"
        rows = writer.finish(about, facts, keep=keep, skipped=self.bad)
        return Read(rows, report, list(facts["ends"]), self.bad)

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

    def _add(
        self, chunk: Rows, begin: int, chosen: Sequence[int], reader: ChunkReader, writer: RowWriter
    ) -> None:
        """Give the examples of the chosen rows of a chunk, whose first row is number ``begin``, to the
        writer."""
        indices = _inside(chosen, begin, len(chunk))
        if not len(indices):
            return
        lists = reader.read(chunk, indices)
        examples, ordinals, groups = [], [], []
        of_rows = [b""] * len(lists)
        if self.settings.group is not None:
            of_rows = [group_digest(value) for value in groups_of(chunk, indices, self.settings.group)]
        for index, group, found in zip(indices, of_rows, lists, strict=True):
            examples += found
            ordinals += [begin + index] * len(found)
            groups += [group] * len(found)
        writer.add(examples, ordinals, groups if self.settings.group is not None else ())

    def _report(
        self, forms: Sequence[Form], readers: Sequence[ChunkReader], chosen: int, kept: int
    ) -> Report:
        """What became of the rows.

        Raises:
            UserError: none is left.
        """
        account = sum((reader.account for reader in readers), Account())
        if not kept:
            raise _nothing_left(self.name, account, len(self.bad))
        names = dict.fromkeys(form.name for form in forms)
        templates = dict.fromkeys("plain" if form.name == "text" else self.encoder.template for form in forms)
        unused: dict[str, None] = {}
        for source, stream, form in zip(self.sources, self.streams, forms, strict=True):
            unused.update(dict.fromkeys(unused_columns(stream, form, self._columns(source))))
        unused.pop(str(self.settings.group), None)
        rows = sum(stream.rows for stream in self.streams)
        unreadable = sum(stream.bad for stream in self.streams)
        return Report(
            source=self.name,
            form=" + ".join(names),
            template=" + ".join(templates),
            rows_read=rows + unreadable,
            rows_kept=kept,
            not_chosen=rows - chosen,
            unused_columns=tuple(unused),
            bad_rows=dict(self.bad.counts),
            **account.as_dict(),
        )


def _inside(chosen: Sequence[int], begin: int, count: int) -> Sequence[int]:
    """Which of ``count`` rows from ``begin`` on are chosen, counted from there."""
    if isinstance(chosen, range):
        return range(count)
    first, last = np.searchsorted(chosen, [begin, begin + count])
    return [index - begin for index in chosen[first:last]]


def _nothing_left(name: str, account: Account, bad: int) -> UserError:
    unusable = f", {bad:,} cannot be used" if bad else ""
    return UserError(
        f"no row is left to train on: {account.dropped_long:,} are too long, and "
        f"{account.without_label:,} have no label{unusable}",
        where=name,
        hint="raise data.max_length, or check the answers: empty and truncated ones have no label",
    )
