"""Write predictions as JSON Lines, CSV or Parquet, in chunks, and resume after a kill.

Records go to ``OUTPUT.partial``. The journal ``OUTPUT.partial.json`` contains the number of rows and bytes on the disk,
and the identity of the run, the file and the settings. A complete file is renamed to OUTPUT. Parquet is converted from
JSON Lines at the end.
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
    """Records written by this process and earlier ones.

    Attributes:
        identity: Identity of the run, the file and the settings, by name.
        columns: Names of all columns; empty before the first prediction.
        rows: Number of records. bytes: Length of the partial file at the last write of the journal.
        errors: Number of rows without predictions by reason. first_error: Message of the first.
    """

    identity: dict[str, Any]
    columns: list[str] = field(default_factory=list)
    rows: int = 0
    bytes: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    first_error: str = ""


def check_output(output: Path, reference: str, *, force: bool) -> None:
    """Reject an output that cannot be written.

    Raises:
        UserError: if its type is unknown, it exists, or it is the input file.
    """
    platforms.refuse_names(output)
    if output.suffix.lower() not in SUFFIXES:
        hint = f"name a file that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise UserError(f"predictions cannot be written as '{output.suffix}'", where=str(output), hint=hint)
    if output.exists() and Path(reference).exists() and output.samefile(reference):
        raise UserError("the output is the input file", where=str(output), hint="name another --output")
    if output.is_dir() or (output.exists() and not force):
        raise UserError("the output exists", where=str(output), hint="name another --output, or overwrite with --force")


class PredictionFile:
    """File of predictions that can be resumed.

    Args:
        output: Final name of the file.
        identity: Identity of the run, the file and the settings, by the name for messages.
        force: Discard an unfinished file with another identity.

    Raises:
        UserError: if the folder cannot be written to, another process writes the file, or an unfinished file has
            another identity.
    """

    def __init__(self, output: Path, identity: dict[str, Any], *, force: bool) -> None:
        self.output, self.suffix = output, output.suffix.lower()
        self._partial, self._journal = (output.with_name(f"{output.name}.partial{end}") for end in ("", ".json"))
        self._lock = FileLock(f"{self._partial}.lock")
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError("another process is writing this file", where=str(output)) from None
        except OSError as error:
            what = f"cannot write '{output.name}': {error.strerror or error}"
            raise UserError(what, where=str(output.parent), hint="choose a folder that you may write to") from error
        identity = json.loads(json.dumps(identity, default=str))
        self.progress = self._read_journal(identity, force) or Progress(identity)
        self._file = self._partial.open("r+b" if self.progress.rows else "wb")
        self._file.truncate(self.progress.bytes)
        self._file.seek(self.progress.bytes)
        self._journal_time = time.monotonic()

    def _read_journal(self, identity: dict[str, Any], force: bool) -> Progress | None:
        """Return the progress of an unfinished file, or None if it cannot be resumed."""
        try:
            progress = Progress(**json.loads(self._journal.read_text(encoding="utf-8")))
            complete = self._partial.stat().st_size >= progress.bytes
            progress.errors = Counter(progress.errors)
        except (OSError, ValueError, TypeError):
            return None
        changed = [name for name in identity if identity[name] != progress.identity.get(name)]
        if changed and not force:
            what = f"an unfinished file exists, and {' and '.join(changed)} changed since then"
            hint = "repeat the command that began it to resume, or discard it with --force"
            raise UserError(what, where=str(self._partial), hint=hint)
        return progress if complete and not changed else None

    def write(self, records: Iterable[Record]) -> None:
        """Append the records of a chunk."""
        columns = self.progress.columns
        is_new = not self._file.tell()
        self._file.write(csv_lines(records, columns, is_new) if self.suffix == ".csv" else json_lines(records))
        if time.monotonic() - self._journal_time >= JOURNAL_SECONDS:
            self._write_journal()

    def _write_journal(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self.progress.bytes = self._file.tell()
        write_text(self._journal, json.dumps(vars(self.progress)))
        self._journal_time = time.monotonic()

    def finish(self) -> None:
        """Rename the complete file to its final name."""
        self._write_journal()
        self._file.close()
        if self.suffix == ".parquet":
            with replacing(self.output) as temporary:
                to_parquet(self._partial, temporary, self.progress.columns)
        else:
            platforms.renamed(self._partial, self.output)
        sync_folder(self.output.parent)
        self._discard()

    def _discard(self) -> None:
        for path in (self._journal, self._partial):
            platforms.removed(path)

    def close(self) -> None:
        """Release the lock, and remove a file without records."""
        self._file.close()
        if not self.progress.rows:
            self._discard()
        self._lock.release()
        platforms.removed(Path(self._lock.lock_file))


def json_lines(records: Iterable[Record]) -> bytes:
    """Return records as JSON Lines. An unpaired surrogate is written as its JSON escape."""
    lines = (json.dumps(_as_json(record), ensure_ascii=False) + "\n" for record in records)
    return "".join(lines).encode("utf-8", "backslashreplace")


def csv_lines(records: Iterable[Record], columns: Sequence[str], header: bool) -> bytes:
    """Return records as lines of CSV. Lists and objects are written as JSON."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([columns] if header else [])
    for record in map(_as_json, records):
        cells = (record.get(column) for column in columns)
        writer.writerow([json_text(cell) if isinstance(cell, list | dict | bool) else cell for cell in cells])
    return text.getvalue().encode("utf-8", "backslashreplace")


def to_parquet(lines: Path, path: Path, columns: Sequence[str]) -> None:
    """Convert JSON Lines to Parquet in constant memory. Columns with values of several types become text."""
    import pyarrow
    import pyarrow.parquet

    types: dict[str, Any] = dict.fromkeys(columns, pyarrow.null())
    for table in _tables(lines, columns):
        types = {name: _common_type(types[name], values) for name, values in table.items()}
    for name, kind in types.items():
        if kind == pyarrow.null() or "struct<>" in str(kind):  # Parquet has no empty structs
            types[name] = pyarrow.string()
        elif kind == pyarrow.list_(pyarrow.float64()) and name.endswith("embedding"):
            types[name] = pyarrow.list_(pyarrow.float32())
    with pyarrow.parquet.ParquetWriter(path, pyarrow.schema(list(types.items()))) as writer:
        for table in _tables(lines, columns):
            for name in columns:
                if types[name] == pyarrow.string():
                    table[name] = [v if v is None or isinstance(v, str) else json_text(v) for v in table[name]]
            writer.write_table(pyarrow.table({name: pyarrow.array(table[name], types[name]) for name in columns}))


def _common_type(kind: Any, values: list[Any]) -> Any:
    """Return the Arrow type of values and of earlier values of type ``kind``."""
    import pyarrow

    try:
        schemas = [pyarrow.schema({"": one}) for one in (kind, pyarrow.array(values).type)]
        return pyarrow.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pyarrow.ArrowException, OverflowError):
        return pyarrow.string()


def _tables(lines: Path, columns: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    """Yield the values of each column, for some rows at a time."""
    with lines.open(encoding="utf-8", newline="\n") as file:
        while records := [json.loads(line) for line in islice(file, GROUP_ROWS)]:
            yield {name: [record.get(name) for record in records] for name in columns}


def json_text(value: object) -> str:
    """Return a value as JSON for a cell."""
    return json.dumps(value, ensure_ascii=False)


def _as_json(value: Any) -> Any:
    """Return a value that JSON can represent. Bytes become their number, NaN and infinity null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return f"<{len(value):,} bytes>" if isinstance(value, bytes) else str(value)
