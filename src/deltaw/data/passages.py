"""Queries with a matching passage, and files of passages, for mining and retrieval evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from deltaw.data.columns import PASSAGES as POSITIVES
from deltaw.data.columns import QUERIES, listed
from deltaw.data.formats import require
from deltaw.data.messages import cell_text
from deltaw.data.report import MAX_ROW_BYTES, BadRowError, BadRows, too_long_error
from deltaw.data.row_files import COMPRESSED, DecompressedFile, decode, reading
from deltaw.data.sources import open_source, row_errors
from deltaw.errors import UserError, did_you_mean

# Common names of passage columns, in order of preference.
PASSAGES = ("text", "passage", "document", "content", "positive", "answer", "completion", "body")


def read_pairs(
    reference: str, bad: BadRows, *, columns: Sequence[str | None] = (None, None), max_bytes: int = MAX_ROW_BYTES
) -> list[tuple[str, str]]:
    """Read queries and their passages, in row order.

    Args:
        reference: File or data set.
        bad: Collects unusable rows.
        columns: Columns of query and passage. None selects the first column with a common name.
        max_bytes: Maximum size of a row in its file.

    Raises:
        UserError: if the file cannot be read, lacks a column, or has no usable row.
    """
    roles = (("query", columns[0], QUERIES), ("positive", columns[1], POSITIVES))
    return [(texts[0], texts[1]) for texts in _read(reference, roles, bad, max_bytes)]


@row_errors()
def read_passages(
    reference: str, bad: BadRows, *, column: str | None = None, max_bytes: int = MAX_ROW_BYTES
) -> list[str]:
    """Read passages in row order. In a ``.txt`` file, which may be compressed, each nonblank line is a passage.

    ``column`` is the column of the passage, or None to select the first column with a common name. The other arguments
    and the errors are those of :func:`read_pairs`.
    """
    suffixes = [suffix.lower() for suffix in Path(reference).suffixes if suffix.lower() not in COMPRESSED]
    if suffixes[-1:] == [".txt"] and Path(reference).is_file():
        passages = list(_lines(Path(reference), reference, bad, max_bytes))
        if not passages:
            raise UserError("the file has no passages", location=reference)
        return passages
    return [texts[0] for texts in _read(reference, (("passage", column, PASSAGES),), bad, max_bytes)]


def text_key(text: str) -> str:
    """Normalize case and spacing for comparisons of texts."""
    return " ".join(text.split()).casefold()


@row_errors()
def _read(
    reference: str, roles: Sequence[tuple[str, str | None, Sequence[str]]], bad: BadRows, max_bytes: int
) -> list[list[str]]:
    """Read columns of each usable row.

    Args:
        roles: For each column, its role, its name or None, and its common names.
    """
    stream = open_source(reference, bad.add if bad.mode == "skip" else None, max_bytes=max_bytes)
    stream.scan()
    columns = [_column(reference, stream.columns, *role) for role in roles]
    if len(set(columns)) < len(columns):
        raise UserError(f"'{columns[0]}' is both query and passage", location=reference, hint="name different columns")
    texts: list[list[str]] = []
    for rows in stream.chunks():
        for index, (_, row) in enumerate(rows):
            location = rows.row_location(index)
            try:
                require(row, columns, location, f"every row needs {listed(columns)}")
                texts.append([cell_text(row[column], column, location) for column in columns])
            except BadRowError as error:
                bad.add(error, row)
    if not texts:
        raise UserError("the file has no usable row", location=reference, hint=f"every row needs {listed(columns)}")
    return texts


def _column(reference: str, available: Sequence[str], role: str, requested: str | None, common: Sequence[str]) -> str:
    if requested is not None and requested not in available:
        raise UserError(f"no column '{requested}'", location=reference, hint=did_you_mean(requested, available))
    column = requested or next((name for name in common if name in available), None)
    if column is None and role == "passage" and len(available) == 1:
        column = available[0]
    if column is None:
        location, flag = f"{reference}, whose columns are {listed(available)}", f"--{role}-column"
        hint = f"name it with {flag}; common names are {listed(common)}"
        raise UserError(f"no column with the {role} was found", location=location, hint=hint)
    return column


def _lines(path: Path, name: str, bad: BadRows, max_bytes: int) -> Iterator[str]:
    number = 0
    with reading(name), DecompressedFile(path) as opened:
        while line := opened.file.readline(max_bytes + 1):
            number += 1
            if len(line) > max_bytes:
                raise too_long_error(f"line {number}", max_bytes, location=f"{name}, line {number}").of_file()
            try:
                text = decode(line, name, first_line=number).strip()
            except BadRowError as error:
                bad.add(error, line)
                continue
            if text:
                yield text
