"""A file becomes rows, one after another: its type and compression by its name, errors with their line.

It knows single files; not references, folders or what columns mean.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from deltaw.data.rows import Row
from deltaw.errors import UserError

if TYPE_CHECKING:
    import pyarrow

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
# Types whose columns have a type of their own.
TYPED = ("parquet", "arrow")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
KNOWN = "jsonl, json, csv, tsv (also as .gz, .bz2, .xz, .zst), parquet or arrow"
# Rows of a Parquet or Arrow file that are made into objects at a time.
_BATCH = 1024

# Told of a row that cannot be read, where such rows are to be skipped: the error, the kind of fault in a few
# words, and the row as it stands in the file.
OnBad = Callable[[UserError, str, object], None]


def kind_of(path: Path) -> str | None:
    """The type of a file by its name, compressed or not; None for a file that holds no rows."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    kind = KINDS.get(suffixes[-1]) if suffixes else None
    return kind if kind not in TYPED or path.suffix.lower() == f".{kind}" else None


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """While open, what a damaged, missing or forbidden file raises becomes a UserError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        hint = "check that it is complete, and that you may read it"
        raise UserError(f"the file cannot be read: {said}", where=name, hint=hint) from error


class Opened:
    """A file of bytes, decompressed on the way.

    Attributes:
        file: lines and bytes of its content.
    """

    def __init__(self, path: Path) -> None:
        self._raw: IO[bytes] = path.open("rb")
        suffix = path.suffix.lower()
        try:
            self.file: IO[bytes] = _decompressed(self._raw, suffix)
        except BaseException:
            self._raw.close()
            raise

    @property
    def position(self) -> int:
        """Bytes of the file on the disk that were read so far."""
        return 0 if self._raw.closed else self._raw.tell()

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError, ValueError):  # of a damaged stream, which was said already
            self.file.close()
        self._raw.close()


def _decompressed(raw: IO[bytes], suffix: str) -> IO[bytes]:
    opened: Any = raw
    if suffix == ".gz":
        opened = gzip.GzipFile(fileobj=raw)
    elif suffix == ".bz2":
        opened = bz2.BZ2File(raw)
    elif suffix == ".xz":
        opened = lzma.LZMAFile(raw)  # noqa: SIM115 - closed by the caller
    elif suffix == ".zst":
        import pyarrow

        # Arrow has its own decompressor, so that no further package is needed.
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        opened = io.BufferedReader(stream, 2**18)
    return opened


# JSON Lines


def read_lines(
    file: Iterable[bytes], name: str, on_bad: OnBad | None = None
) -> Iterator[tuple[int, Row, int]]:
    """Number, row and bytes of each line of JSON Lines that is not blank.

    Raises:
        UserError: a line is no JSON object, and there is no ``on_bad`` to be told of it.
    """
    for number, line in enumerate(file, start=1):
        try:
            row = _row_of_line(line, number, name)
        except _BadLine as bad:
            if on_bad is None:
                raise bad.error from bad.__cause__
            on_bad(bad.error, bad.reason, line.decode("utf-8", "replace"))
            continue
        if row is not None:
            yield number, row, len(line)


class _BadLine(Exception):
    def __init__(self, error: UserError, reason: str) -> None:
        super().__init__(reason)
        self.error = error
        self.reason = reason


def _row_of_line(line: bytes, number: int, name: str) -> Row | None:
    """The object of a line; None for a blank one."""
    try:
        text = decode(line, name, first_line=number)
    except UserError as error:
        raise _BadLine(error, "not UTF-8") from error.__cause__
    if not text.strip():
        return None
    hint = "every line is one JSON object, such as "
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        said = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise _BadLine(
            UserError(
                f"line {number} is not JSON: {said}",
                where=f"{name}, line {number}",
                hint=hint + '{"prompt": "…", "completion": "…"}',
            ),
            "not JSON",
        ) from error
    if not isinstance(row, dict):
        raise _BadLine(
            UserError(
                f"line {number} is not a JSON object but a {type(row).__name__}",
                where=f"{name}, line {number}",
                hint=hint + '{"text": "…"}',
            ),
            "not a JSON object",
        )
    return row


def decode(data: bytes, name: str, first_line: int = 1) -> str:
    """UTF-8 text, without the mark that may begin a file.

    Raises:
        UserError: it is not UTF-8; names the line.
    """
    try:
        return data.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise UserError(
            f"line {line} is not UTF-8 (byte 0x{data[error.start]:02x})",
            where=f"{name}, line {line}",
            hint="save the file as UTF-8",
        ) from error


# JSON


def read_json(text: str, name: str) -> list[Row]:
    """The objects of a JSON list; none where the file is blank."""
    if not text.strip():
        return []
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        said = str(error)
        by_lines = said.startswith("Extra data")
        raise UserError(
            f"the file is no JSON: {said}",
            where=name,
            hint="it looks like one object per line: name it .jsonl" if by_lines else None,
        ) from error
    if not isinstance(rows, list):
        inside = (
            [key for key, value in rows.items() if isinstance(value, list)] if isinstance(rows, dict) else []
        )
        hint = f"; extract the list under '{inside[0]}'" if inside else ""
        raise UserError("the file is not a list of objects", where=name, hint="it must be [{…}, {…}]" + hint)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(
                f"row {number} is not an object but a {type(row).__name__}",
                where=f"{name}, row {number}",
                hint='every row is an object, such as {"text": "…"}',
            )
    return rows


# Tables


class TableReader:
    """The cells of a table, row after row.

    Every cell stays a string, unchanged: "1", "NA" and "" are answers like any other. A first row of numbers
    only is not a header: the columns are then column_1, column_2, and so on.

    Args:
        file: the table's bytes. name: of the file, for messages.
        on_bad: told of a row with too few or too many cells, which is skipped then.

    Attributes:
        header: names of the columns; empty for an empty file. has_header: whether they come from the file.

    Raises:
        UserError: the table cannot be read; names row and line. Also raised on the way.
    """

    def __init__(self, file: IO[bytes], name: str, delimiter: str, on_bad: OnBad | None = None) -> None:
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        self._name = name
        self._delimiter = delimiter
        self._on_bad = on_bad
        self._text = _Lines(file, name)
        self._reader = csv.reader(self._text, delimiter=delimiter, strict=True)
        self.has_header = True
        self.header: list[str] = []
        self._first: list[str] | None = None
        self._count = 0
        with self._naming():
            header = next(self._reader, None)
        if header is None:
            return
        if len(header) > 1 and all(map(_is_number, header)):
            self.has_header, self._first = False, header
            header = [f"column_{number}" for number in range(1, len(header) + 1)]
        self.header = header
        if len(set(header)) < len(header):
            twice = next(column for column in header if header.count(column) > 1)
            raise UserError(f"the column '{twice}' appears twice", where=f"{name}, line 1", hint="rename one")

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        """The number of each row, from 1, and its cells."""
        if self._first is not None:
            self._count += 1
            yield self._count, self._first
        while True:
            with self._naming():
                cells = next(self._reader, None)
            if cells is None:
                return
            if not cells:
                continue
            self._count += 1
            if len(cells) != len(self.header):
                error = UserError(
                    f"row {self._count} has {len(cells)} cells, the "
                    f"{'header' if self.has_header else 'first row'} has {len(self.header)}",
                    where=f"{self._name}, row {self._count} (ends in line {self._reader.line_num})",
                    hint=f"put cells that hold a {'tab' if self._delimiter != ',' else 'comma'} in quotes",
                )
                if self._on_bad is None:
                    raise error
                self._on_bad(error, "another number of cells", cells)
                continue
            yield self._count, cells

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except csv.Error as error:
            raise UserError(
                f"the table cannot be read: {error}",
                where=f"{self._name}, row {self._count + 1} (line {self._reader.line_num})",
                hint='a quote inside a quoted cell is written twice: ""',
            ) from error


class _Lines:
    """The lines of a file as text, with their ends; also those that end in a carriage return alone."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._lines = enumerate(file, start=1)
        self._name = name
        self._waiting: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if not self._waiting:
            number, line = next(self._lines)
            text = decode(line, self._name, first_line=number)
            self._waiting = list(io.StringIO(text, newline=""))[::-1]
        return self._waiting.pop() if self._waiting else ""


def delimiter_of(path: Path) -> str:
    """A tab for ``.tsv``, else a comma."""
    return "\t" if ".tsv" in [suffix.lower() for suffix in path.suffixes[-2:]] else ","


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


# Arrow and Parquet


@contextlib.contextmanager
def reading_arrow(name: str, kind: str) -> Iterator[None]:
    """While open, what a damaged file raises becomes a UserError."""
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        hint = "copy the file again, and check that its suffix matches its content"
        shown = "Parquet file" if kind == "parquet" else "Arrow file"
        raise UserError(f"the {shown} cannot be read: {error}", where=name, hint=hint) from error


class ArrowBatches:
    """A Parquet or Arrow file, some rows at a time.

    Attributes:
        columns: their names. rows: how many rows there are; None where only reading the file tells.
    """

    def __init__(self, path: Path, name: str, kind: str) -> None:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet

        self._name, self._kind = name, kind
        self.rows: int | None = None
        with reading(name), reading_arrow(name, kind):
            if kind == "parquet":
                self._parquet = pyarrow.parquet.ParquetFile(path)
                self.columns = list(self._parquet.schema_arrow.names)
                self.rows = self._parquet.metadata.num_rows
                return
            file = pyarrow.memory_map(str(path))
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            self._stream = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(file)
            self._is_file = is_file
            self.columns = list(self._stream.schema.names)

    def __iter__(self) -> Iterator[tuple[list[Row], int]]:
        """Rows and their bytes."""
        with reading(self._name), reading_arrow(self._name, self._kind):
            for batch in self._batches():
                for start in range(0, batch.num_rows, _BATCH):
                    part = batch.slice(start, _BATCH)
                    yield part.to_pylist(), part.nbytes

    def _batches(self) -> Iterator[pyarrow.RecordBatch]:
        if self._kind == "parquet":
            yield from self._parquet.iter_batches(batch_size=_BATCH)
        elif self._is_file:
            for number in range(self._stream.num_record_batches):
                yield self._stream.get_batch(number)
        else:
            yield from self._stream
