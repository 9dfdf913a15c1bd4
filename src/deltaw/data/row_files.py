"""Kinds of files with rows, and errors of files that cannot be read."""

from __future__ import annotations

import contextlib
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path

from deltaw.data.compressed_files import COMPRESSED
from deltaw.errors import UserError

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv"}
KINDS |= {".parquet": "parquet", ".arrow": "arrow"}
# File types with typed columns.
TYPED = ("parquet", "arrow")
SUPPORTED_FORMATS = "jsonl, json, csv, tsv (also as .gz, .bz2, .xz, .zst), parquet or arrow"


def kind_of(path: Path) -> str | None:
    """Return the type of a file by its name, or None if it contains no rows."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    kind = KINDS.get(suffixes[-1]) if suffixes else None
    return kind if kind not in TYPED or path.suffix.lower() == f".{kind}" else None


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Convert exceptions from missing, damaged or unreadable files to UserErrors."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        hint = "check that it is complete, and that you have permission to read it"
        raise UserError(f"the file cannot be read: {reason}", location=name, hint=hint) from error
