"""Write predictions as JSON Lines, CSV or Parquet, in chunks, and resume after a kill.

Records go to ``OUTPUT.partial``, as JSON Lines. The journal ``OUTPUT.partial.json`` contains the number of rows and
bytes on the disk, and the identity of the run, the file and the settings. The complete file is renamed to OUTPUT, or
converted.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from filelock import FileLock, Timeout

from deltaw import platforms
from deltaw.atomic_files import atomic_path, sync_folder, write_text
from deltaw.errors import UserError

SUFFIXES = (".jsonl", ".csv", ".parquet")
# Rows of a row group in Parquet.
GROUP_ROWS = 4096
# The JSON escape of an unpaired surrogate, which tables cannot contain, after any escaped backslashes.
_SURROGATE = re.compile(r"(?<!\\)((?:\\\\)*)\\ud[89a-f]..")


@dataclass
class PredictionProgress:
    """Records written by this process and earlier ones.

    Attributes:
        identity: Identity of the run, the file and the settings, by name.
        columns: Names of all columns. Empty before the first record.
        rows: Number of records.
        bytes: Length of the partial file.
        errors: Number of rows without predictions, by reason.
        first_error: Message of the first error.
    """

    identity: Mapping[str, Any] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    rows: int = 0
    bytes: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    first_error: str = ""

    @property
    def predicted(self) -> int:
        """Number of rows with predictions."""
        return self.rows - sum(self.errors.values())


def check_output(output: Path, reference: str, *, force: bool) -> None:
    """Reject an output that cannot be written.

    Raises:
        UserError: if its type is unknown, it exists, or it is the input file.
    """
    platforms.reject_reserved_names(output)
    if output.suffix.lower() not in SUFFIXES:
        hint = f"use a file name that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise UserError(f"predictions cannot be written as '{output.suffix}'", location=str(output), hint=hint)
    if output.exists() and Path(reference).exists() and output.samefile(reference):
        raise UserError("the output is the input file", location=str(output), hint="use another --output")
    if output.is_dir() or (output.exists() and not force):
        raise UserError("the output exists", location=str(output), hint="use another --output or add --force")


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

    def __init__(self, output: Path, identity: Mapping[str, Any], *, force: bool) -> None:
        self.output = output
        self._partial, self._journal = (output.with_name(f"{output.name}.partial{end}") for end in ("", ".json"))
        self._lock = FileLock(f"{self._partial}.lock")
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError("another process is writing this file", location=str(output)) from None
        except OSError as error:
            message = f"cannot write '{output.name}': {error.strerror or error}"
            raise UserError(message, location=str(output.parent), hint="choose a folder you may write to") from error
        identity = json.loads(json.dumps(identity, default=str))
        self.progress = self._read_journal(identity, force) or PredictionProgress(identity)
        self._file = self._partial.open("r+b" if self.progress.rows else "wb")
        self._file.truncate(self.progress.bytes)
        self._file.seek(self.progress.bytes)

    def _read_journal(self, identity: Mapping[str, Any], force: bool) -> PredictionProgress | None:
        """Return the progress of an unfinished file, or None if it cannot be resumed."""
        try:
            progress = PredictionProgress(**json.loads(self._journal.read_text(encoding="utf-8")))
            complete = self._partial.stat().st_size >= progress.bytes
            progress.errors = Counter(progress.errors)
        except (OSError, ValueError, TypeError):
            return None
        changed = [name for name in identity if identity[name] != progress.identity.get(name)]
        if changed and not force:
            message = f"an unfinished file exists, and {' and '.join(changed)} changed since then"
            hint = "repeat the original command to resume, or discard the file with --force"
            raise UserError(message, location=str(self._partial), hint=hint)
        return progress if complete and not changed else None

    def write(self, lines: bytes) -> None:
        """Append the records of a chunk, which :attr:`progress` includes."""
        self._file.write(lines)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.progress.bytes = self._file.tell()
        write_text(self._journal, json.dumps(vars(self.progress)))

    def finish(self) -> None:
        """Replace the output by the complete file."""
        self._file.close()
        convert = {".csv": to_csv, ".parquet": to_parquet}.get(self.output.suffix.lower())
        if convert is None:
            platforms.rename_path(self._partial, self.output)
            sync_folder(self.output.parent)
        else:
            with atomic_path(self.output) as temporary:
                convert(self._partial, temporary, self.progress.columns)
        self._discard()

    def _discard(self) -> None:
        for path in (self._journal, self._partial):
            platforms.remove_path(path)

    def close(self) -> None:
        """Release the lock, and remove a file without predictions."""
        self._file.close()
        if not self.progress.predicted:
            self._discard()
        self._lock.release()
        platforms.remove_path(Path(self._lock.lock_file))


def json_lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    """Return records as JSON Lines.

    NaN and infinity become null. Byte strings are replaced by their length. An unpaired surrogate is written as its
    JSON escape.
    """
    # The copy is needed because JSON has no NaN, and parse_constant is the only hook for it.
    copies = (json.loads(json.dumps(r, default=_display_value), parse_constant=lambda _: None) for r in records)
    return "".join(f"{json_text(copy)}\n" for copy in copies).encode("utf-8", "backslashreplace")


def _display_value(value: object) -> str:
    return f"<{len(value):,} bytes>" if isinstance(value, bytes) else re.sub(" at 0x[0-9a-fA-F]+", "", str(value))


def json_text(value: object) -> str:
    """Return a value as JSON."""
    return json.dumps(value, ensure_ascii=False)


def to_csv(lines: Path, path: Path, columns: Sequence[str]) -> None:
    """Convert JSON Lines to CSV. Lists and objects are written as JSON."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for table in _tables(lines, columns):
            writer.writerows(zip(*map(_as_text, table.values()), strict=True))


def to_parquet(lines: Path, path: Path, columns: Sequence[str]) -> None:
    """Convert JSON Lines to Parquet in constant memory. Columns with values of several types become text."""
    types: dict[str, Any] = dict.fromkeys(columns, pyarrow.null())
    for table in _tables(lines, columns):
        types = {name: _common_type(types[name], values) for name, values in table.items()}
    for name, kind in types.items():
        if kind == pyarrow.list_(pyarrow.float64()) and name.endswith("embedding"):
            types[name] = pyarrow.list_(pyarrow.float32())
        elif kind == pyarrow.null() or "struct<>" in str(kind):  # Parquet has no empty structs
            types[name] = pyarrow.string()
    with pyarrow.parquet.ParquetWriter(path, pyarrow.schema(types.items())) as writer:
        for table in _tables(lines, columns):
            texts = {name: _as_text(table[name]) for name, kind in types.items() if kind == pyarrow.string()}
            arrays = [pyarrow.array((table | texts)[name], kind) for name, kind in types.items()]
            writer.write_table(pyarrow.table(arrays, names=columns))


def _common_type(kind: Any, values: list[Any]) -> Any:
    """Return the Arrow type of values and of earlier values of type ``kind``."""
    try:
        schemas = [pyarrow.schema({"": type_}) for type_ in (kind, pyarrow.array(values).type)]
        return pyarrow.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pyarrow.ArrowException, OverflowError):
        return pyarrow.string()


def _tables(lines: Path, columns: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    """Yield the values of each column, for some rows at a time."""
    with lines.open(encoding="utf-8", newline="\n") as file:
        while records := [json.loads(_SURROGATE.sub("\\1\ufffd", line)) for line in islice(file, GROUP_ROWS)]:
            yield {name: [record.get(name) for record in records] for name in columns}


def _as_text(values: list[Any]) -> list[str | None]:
    return [value if value is None or isinstance(value, str) else json_text(value) for value in values]
