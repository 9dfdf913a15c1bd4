"""Queries with a passage that answers each, and files of passages: which columns hold them, and which can be used.

It knows rows and texts; no tokens and no models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from deltaw.data.columns import PASSAGES as POSITIVES
from deltaw.data.columns import QUERIES, listed
from deltaw.data.formats import require
from deltaw.data.messages import written_text
from deltaw.data.report import MAX_ROW_BYTES, BadRowError, BadRows, too_long
from deltaw.data.row_files import COMPRESSED, Opened, decode, reading
from deltaw.data.sources import open_source, skipping_named
from deltaw.errors import UserError, did_you_mean

# Usual names of the columns; the first that a file has is read.
PASSAGES = ("text", "passage", "document", "content", "positive", "answer", "completion", "body")


def read_pairs(
    reference: str, bad: BadRows, *, columns: Sequence[str | None] = (None, None), max_bytes: int = MAX_ROW_BYTES
) -> list[tuple[str, str]]:
    """Queries and their passages, in the order of the rows.

    Args:
        bad: told of rows that cannot be used. columns: of query and passage; None for those of usual names.
        max_bytes: the most bytes of a row in its file.

    Raises:
        UserError: the file cannot be read, lacks a column, or has no row that can be used.
    """
    named = (("query", columns[0], QUERIES), ("positive", columns[1], POSITIVES))
    return [(of_row[0], of_row[1]) for of_row in _read(reference, named, bad, max_bytes)]


@skipping_named()
def read_passages(
    reference: str, bad: BadRows, *, column: str | None = None, max_bytes: int = MAX_ROW_BYTES
) -> list[str]:
    """Passages in the order of the rows; of a ``.txt`` file, each line that is not blank.

    Args, Raises: as :func:`read_pairs`.
    """
    suffixes = [suffix.lower() for suffix in Path(reference).suffixes if suffix.lower() not in COMPRESSED]
    if suffixes[-1:] == [".txt"] and Path(reference).is_file():
        found = list(_lines(Path(reference), reference, bad, max_bytes))
        if not found:
            raise UserError("the file is empty: it has no passage", where=reference)
        return found
    return [of_row[0] for of_row in _read(reference, (("passage", column, PASSAGES),), bad, max_bytes)]


def text_key(text: str) -> str:
    """Equal for texts that are the same but for case and spacing."""
    return " ".join(text.split()).casefold()


@skipping_named()
def _read(
    reference: str, named: Sequence[tuple[str, str | None, Sequence[str]]], bad: BadRows, max_bytes: int
) -> list[list[str]]:
    """Some columns of each row that can be used: what each is, its name if it was given, and its usual ones."""
    stream = open_source(reference, bad.add if bad.mode == "skip" else None, max_bytes=max_bytes)
    stream.scan()
    columns = [_column(reference, stream.columns, *one) for one in named]
    if len(set(columns)) < len(columns):
        raise UserError(f"'{columns[0]}' cannot be query and passage at once", where=reference, hint="name two columns")
    found: list[list[str]] = []
    for rows in stream.chunks():
        for index, (_, row) in enumerate(rows):
            where = rows.place(index)
            try:
                require(row, columns, where, f"every row has {listed(columns)}")
                found.append([written_text(row[column], column, where) for column in columns])
            except BadRowError as error:
                bad.add(error, row)
    if not found:
        raise UserError("no row of the file can be used", where=reference, hint=f"every row has {listed(columns)}")
    return found


def _column(reference: str, there: Sequence[str], what: str, given: str | None, usual: Sequence[str]) -> str:
    if given is not None and given not in there:
        raise UserError(f"the file has no column '{given}'", where=reference, hint=did_you_mean(given, there))
    found = given or next((name for name in usual if name in there), None)
    if found is None and what == "passage" and len(there) == 1:
        found = there[0]
    if found is None:
        where, flag = f"{reference}, whose columns are {listed(there)}", f"--{what}-column"
        hint = f"name it with {flag}; usual names are {listed(usual)}"
        raise UserError(f"no column is known to hold the {what}", where=where, hint=hint)
    return found


def _lines(path: Path, name: str, bad: BadRows, max_bytes: int) -> Iterator[str]:
    number = 0
    with reading(name), Opened(path) as opened:
        while line := opened.file.readline(max_bytes + 1):
            number += 1
            if len(line) > max_bytes:
                raise too_long(f"line {number}", max_bytes, where=f"{name}, line {number}").of_file()
            try:
                text = decode(line, name, first_line=number).strip()
            except BadRowError as error:
                bad.add(error, line)
                continue
            if text:
                yield text
