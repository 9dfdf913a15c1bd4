"""Predictions as a file: JSON Lines, CSV or Parquet, written chunk by chunk and resumed after a kill.

Records go to ``OUTPUT.partial``. A journal beside it, ``OUTPUT.partial.json``, has the number of rows and bytes that
are on the disk, and the identity of the run, the rows and the settings. A complete file is renamed to its own name.
Parquet is converted from JSON Lines at the end. Knows records; no models.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from deltaw import platforms
from deltaw.durable import replacing, sync_folder, write_text
from deltaw.errors import UserError

SUFFIXES = (".jsonl", ".csv", ".parquet")
# Seconds between two writes of the journal, and rows of a row group in Parquet.
JOURNAL_SECONDS, GROUP_ROWS = 1.0, 4096
Record = Mapping[str, Any]


@dataclass
class Progress:
    """What is written so far.

    Attributes:
        identity: Names the run, the rows and the settings. columns: Names of all columns; empty before the first rows.
        rows: Number of records. bytes: Length of the partial file. errors: Rows without a prediction, by reason.
        first_error: Message of the first one.
    """

    identity: dict[str, Any]
    columns: list[str] = field(default_factory=list)
    rows: int = 0
    bytes: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    first_error: str = ""


def check_output(output: Path, reference: str, *, force: bool) -> None:
    """Refuse an output that cannot be written.

    Raises:
        UserError: if its type is unknown, it exists, or it is the file that is read.
    """
    platforms.refuse_names(output)
    if output.suffix.lower() not in SUFFIXES:
        hint = f"name a file that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise UserError(f"predictions cannot be written as '{output.suffix}'", where=str(output), hint=hint)
    if output.exists() and Path(reference).exists() and output.samefile(reference):
        raise UserError("the output is the file that is read", where=str(output), hint="name another --output")
    if output.is_dir() or (output.exists() and not force):
        raise UserError("the output exists", where=str(output), hint="name another --output, or overwrite with --force")


class PredictionFile:
    """A file of predictions that can be resumed.

    Args:
        output: Its final name. identity: Names the run, the rows and the settings, by what they are called.
        force: Discard an unfinished file of other predictions.

    Attributes:
        progress: What is written so far, also by earlier processes.

    Raises:
        UserError: if another process writes the file, or an unfinished file is there with another identity.
    """

    def __init__(self, output: Path, identity: dict[str, Any], *, force: bool) -> None:
        self.output, self.kind = output, output.suffix.lower()
        self._partial, self._journal, self._locked = (
            output.with_name(output.name + end) for end in (".partial", ".partial.json", ".partial.lock")
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self._locked)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError("another process is writing this file", where=str(output)) from None
        identity = json.loads(json.dumps(identity, default=str))
        self.progress = self._resumed(identity, force) or Progress(identity)
        self._file = self._partial.open("r+b" if self.progress.bytes else "wb")
        self._file.truncate(self.progress.bytes)
        self._file.seek(self.progress.bytes)
        self._noted = time.monotonic()

    def _resumed(self, identity: dict[str, Any], force: bool) -> Progress | None:
        """The progress of an unfinished file, or None if there is none."""
        try:
            found = Progress(**json.loads(self._journal.read_text(encoding="utf-8")))
            found.errors = Counter(found.errors)
            whole = self._partial.stat().st_size >= found.bytes
        except (OSError, ValueError, TypeError):
            return None
        changed = [name for name in identity if identity[name] != found.identity.get(name)]
        if changed and not force:
            what = f"unfinished predictions are there, and since then {' and '.join(changed)} changed"
            hint = "give the command that began it to resume, or --force to discard it"
            raise UserError(what, where=str(self._partial), hint=hint)
        return found if whole and not changed else None

    def write(self, records: Iterable[Record], columns: Sequence[str]) -> None:
        """Append the records of a chunk."""
        progress = self.progress
        if not progress.columns:
            progress.columns = [*columns]
            self._file.write(csv_lines([], columns, header=True) if self.kind == ".csv" else b"")
        self._file.write(csv_lines(records, progress.columns) if self.kind == ".csv" else json_lines(records))
        if time.monotonic() - self._noted >= JOURNAL_SECONDS:
            self.note()

    def note(self) -> None:
        """Put all that is written on the disk, and the journal after it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self.progress.bytes = self._file.tell()
        write_text(self._journal, json.dumps(vars(self.progress)))
        self._noted = time.monotonic()

    def finish(self) -> None:
        """Give the complete file its name."""
        self.note()
        self._file.close()
        if self.kind == ".parquet":
            with replacing(self.output) as temporary:
                to_parquet(self._partial, temporary, self.progress.columns)
        else:
            platforms.renamed(self._partial, self.output)
        sync_folder(self.output.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the partial file and its journal."""
        self._file.close()
        for path in (self._journal, self._partial):
            platforms.removed(path)

    def close(self) -> None:
        """Let another process write the file. A file without a record is removed."""
        self._file.close()
        if not self.progress.rows:
            self.discard()
        self._lock.release()
        platforms.removed(self._locked)


def json_lines(records: Iterable[Record]) -> bytes:
    """Records as JSON Lines. Half of a surrogate pair has no UTF-8; its escape is JSON."""
    lines = (json.dumps(_plain(record), ensure_ascii=False) + "\n" for record in records)
    return "".join(lines).encode("utf-8", "backslashreplace")


def csv_lines(records: Iterable[Record], columns: Sequence[str], *, header: bool = False) -> bytes:
    """Records as lines of CSV; lists and objects are JSON."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(columns)
    for record in records:
        plain = _plain(record)
        cells = (plain.get(column) for column in columns)
        writer.writerow([_text(cell) if isinstance(cell, list | dict | bool) else cell for cell in cells])
    return text.getvalue().encode("utf-8", "backslashreplace")


def to_parquet(lines: Path, path: Path, columns: Sequence[str]) -> None:
    """Convert JSON Lines to Parquet, some rows at a time. A column with values of several types becomes text."""
    import pyarrow
    import pyarrow.parquet

    kinds: dict[str, Any] = dict.fromkeys(columns, pyarrow.null())
    for records in _groups(lines):
        for name in columns:
            kinds[name] = _common_type(kinds[name], [record.get(name) for record in records])
    vectors = pyarrow.list_(pyarrow.float64())
    for name, kind in kinds.items():
        if kind == pyarrow.null() or "struct<>" in str(kind):  # Parquet has no empty structs
            kinds[name] = pyarrow.string()
        elif kind == vectors and name.endswith("embedding"):
            kinds[name] = pyarrow.list_(pyarrow.float32())
    with pyarrow.parquet.ParquetWriter(path, pyarrow.schema(list(kinds.items()))) as writer:
        for records in _groups(lines):
            table = {}
            for name, kind in kinds.items():
                values = [record.get(name) for record in records]
                if kind == pyarrow.string():
                    values = [value if value is None or isinstance(value, str) else _text(value) for value in values]
                table[name] = pyarrow.array(values, kind)
            writer.write_table(pyarrow.table(table))


def _common_type(kind: Any, values: list[Any]) -> Any:
    """The Arrow type of a column that has had the type ``kind`` so far."""
    import pyarrow

    try:
        fields = [pyarrow.schema({"": one}) for one in (kind, pyarrow.array(values).type)]
        return pyarrow.unify_schemas(fields, promote_options="permissive").field(0).type
    except (pyarrow.ArrowException, OverflowError):
        return pyarrow.string()


def _groups(lines: Path) -> Iterator[list[dict[str, Any]]]:
    with lines.open(encoding="utf-8", newline="\n") as file:
        while records := [json.loads(line) for line in islice(file, GROUP_ROWS)]:
            yield records


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """A value as JSON has it: bytes by their number, and numbers that are not finite as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return f"<{len(value):,} bytes>" if isinstance(value, bytes) else str(value)
