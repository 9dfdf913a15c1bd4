"""A reference becomes rows: files, folders, packages and data sets on a hub.

It knows file types, and where in a file a row is. :mod:`deltaw.data.formats` knows what the columns mean.
"""

from __future__ import annotations

import bisect
import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from deltaw.errors import UserError, did_you_mean, nearest
from deltaw.hub import packages

Row = Mapping[str, object]

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".bz2", ".xz")
_KNOWN = "jsonl, json, csv, tsv (also as .gz, .bz2, .xz), parquet or arrow"
_HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.+\[\]%:-]+))?")
_HELD_OUT_NAME = re.compile(r"(?:test|dev|val|valid|validation|eval)(?:[-_.\d].*)?", re.IGNORECASE)


class Rows(Sequence[tuple[int, Row]]):
    """Rows with their numbers: a sequence of ``(number, row)``.

    Args:
        name: the reference, as given.
        parts: for each file, its name, the numbers of its rows (from 1; lines in JSON Lines) and the rows.
        columns: names of all columns, in the order in which they first appear.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[tuple[str, Sequence[int], Sequence[Row]]],
        columns: Sequence[str] | None = None,
    ) -> None:
        self.name = name
        self._parts = list(parts)
        self._starts = [0]
        for _, numbers, _rows in self._parts:
            self._starts.append(self._starts[-1] + len(numbers))
        self.columns = list(columns) if columns is not None else _columns_of(self._parts)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        """``(number, row)`` for an index, a list of them for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        part, inside = self._find(index % len(self))
        _, numbers, rows = self._parts[part]
        return numbers[inside], rows[inside]

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        for _, numbers, rows in self._parts:
            yield from zip(numbers, rows, strict=True)

    def number(self, index: int) -> int:
        """The number of the row at ``index``."""
        part, inside = self._find(index)
        return self._parts[part][1][inside]

    def place(self, index: int) -> str:
        """Where the row at ``index`` is, for a message: ``"data.jsonl, row 7"``."""
        part, inside = self._find(index)
        name, numbers, _ = self._parts[part]
        return f"{name}, row {numbers[inside]}"

    def tables(self) -> list[Table] | None:
        """The files as tables, if all of them are."""
        tables = [rows for _, _, rows in self._parts if isinstance(rows, Table)]
        return tables if len(tables) == len(self._parts) else None

    def _find(self, index: int) -> tuple[int, int]:
        part = bisect.bisect_right(self._starts, index) - 1
        return part, index - self._starts[part]


def read_rows(reference: str) -> Rows:
    """Read a file, a folder of files, ``pypi:package==version/path`` or a hub id ``owner/name[:split]``.

    Raises:
        UserError: there is no such file or data set, it has no row, or part of it cannot be read; the message
            names the file and the line or row.
    """
    if packages.is_package_reference(reference):
        return _read_path(packages.member(reference), reference)
    path = Path(os.path.expanduser(reference))
    if path.exists():
        return _read_path(path, reference)
    hub = _HUB.fullmatch(reference)
    if hub and not path.parent.is_dir() and _kind(path) is None:
        return _read_hub(hub[1], hub[2] or "train", reference)
    raise _missing(path, reference)


def _read_path(path: Path, name: str) -> Rows:
    files = _files_in(path, name) if path.is_dir() else [path]
    parts: list[tuple[str, Sequence[int], Sequence[Row]]] = []
    for file in files:
        shown = name if file == path else f"{name.rstrip('/')}/{file.name}"
        numbers, rows = _read_file(file, shown)
        parts.append((shown, numbers, rows))
    result = Rows(name, parts)
    if not len(result):
        raise UserError(
            "the file is empty: it has no row", where=name, hint="name the file that has the rows"
        )
    return result


def _files_in(folder: Path, name: str) -> list[Path]:
    """The data files of a folder, sorted by name: of one type, and not both for training and evaluation."""
    entries = sorted(
        entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith(".")
    )
    files = [entry for entry in entries if _kind(entry)]
    kinds = sorted({str(_kind(file)) for file in files})
    if not files:
        raise UserError(
            "the folder holds no data file", where=name, hint=f"put {_KNOWN} files there, or name one"
        )
    if len(kinds) > 1:
        raise UserError(
            f"the folder holds files of several types ({', '.join(kinds)})",
            where=name,
            hint="name one file: " + ", ".join(file.name for file in files[:6]),
        )
    held_out = [file for file in files if _HELD_OUT_NAME.fullmatch(file.name.split(".")[0])]
    if held_out and len(held_out) < len(files):
        raise UserError(
            f"the folder also holds evaluation data ('{held_out[0].name}'), which must not be trained on",
            where=name,
            hint="name the files: data.train and data.eval",
        )
    return files


def _kind(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    kind = KINDS.get(suffixes[-1]) if suffixes else None
    return kind if kind not in ("parquet", "arrow") or path.suffix.lower() == f".{kind}" else None


def _read_file(path: Path, name: str) -> tuple[Sequence[int], Sequence[Row]]:
    kind = _kind(path)
    if kind is None:
        raise UserError(
            f"a file that ends in '{path.suffix}' cannot be read as data", where=name, hint=f"give {_KNOWN}"
        )
    try:
        if kind in ("parquet", "arrow"):
            return _read_arrow(path, name, kind)
        with _open(path) as file:
            if kind == "jsonl":
                return _read_jsonl(file, name)
            text = _decode(file.read(), name)
        return _read_json(text, name) if kind == "json" else _read_csv(text, name, _delimiter(path))
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        hint = "check that it is complete, and that you may read it"
        raise UserError(f"the file cannot be read: {said}", where=name, hint=hint) from error


def _open(path: Path) -> BinaryIO | gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.GzipFile(path)
    if suffix == ".bz2":
        return bz2.BZ2File(path)
    return lzma.LZMAFile(path) if suffix == ".xz" else path.open("rb")


def _read_jsonl(file: Iterable[bytes], name: str) -> tuple[list[int], list[Row]]:
    numbers: list[int] = []
    rows: list[Row] = []
    for number, line in enumerate(file, start=1):
        text = _decode(line, name, first_line=number)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            said = (
                f"{error.msg}, column {error.colno}"
                if isinstance(error, json.JSONDecodeError)
                else str(error)
            )
            raise UserError(
                f"line {number} is not JSON: {said}",
                where=f"{name}, line {number}",
                hint="every line is one JSON object, such as " + '{"prompt": "…", "completion": "…"}',
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f"line {number} is not a JSON object but a {type(row).__name__}",
                where=f"{name}, line {number}",
                hint="every line is one JSON object, such as " + '{"text": "…"}',
            )
        numbers.append(number)
        rows.append(row)
    return numbers, rows


def _read_json(text: str, name: str) -> tuple[Sequence[int], list[Row]]:
    if not text.strip():
        return [], []
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
    return range(1, len(rows) + 1), rows


def _delimiter(path: Path) -> str:
    return "\t" if ".tsv" in [suffix.lower() for suffix in path.suffixes[-2:]] else ","


class Table(Sequence[Row]):
    """The rows of a table, which all have the same columns: stored as cells, made into rows on access.

    Args:
        header: names of the columns. rows: the cells of each row.
        has_header: whether the names come from the file.
    """

    def __init__(self, header: Sequence[str], rows: Sequence[Sequence[str]], has_header: bool = True) -> None:
        self.header = list(header)
        self.has_header = has_header
        self.cells = rows

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return dict(zip(self.header, self.cells[index], strict=True))


def _read_csv(text: str, name: str, delimiter: str) -> tuple[Sequence[int], Table]:
    """Every cell stays a string, unchanged: "1", "NA" and "" are answers like any other.

    A first row of numbers only is not a header: the columns are then column_1, column_2, and so on.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    once: dict[str, str] = {}  # tables of numbers repeat the same strings
    try:
        header = next(reader, None)
        if header is None:
            return [], Table([], [])
        bare = len(header) > 1 and all(map(_is_number, header))
        if bare:
            rows.append(header)
            header = [f"column_{number}" for number in range(1, len(header) + 1)]
        _check_header(header, name)
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"row {len(rows) + 1} has {len(cells)} cells, the "
                    f"{'first row' if bare else 'header'} has {len(header)}",
                    where=f"{name}, row {len(rows) + 1} (ends in line {reader.line_num})",
                    hint=f"put cells that hold a {'tab' if delimiter != ',' else 'comma'} in quotes",
                )
            rows.append([once.setdefault(cell, cell) for cell in cells] if bare else cells)
    except csv.Error as error:
        raise UserError(
            f"the table cannot be read: {error}",
            where=f"{name}, row {len(rows) + 1} (line {reader.line_num})",
            hint='a quote inside a quoted cell is written twice: ""',
        ) from error
    return range(1, len(rows) + 1), Table(header, rows, has_header=not bare)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _check_header(header: list[str], name: str) -> None:
    if len(set(header)) < len(header):
        twice = next(column for column in header if header.count(column) > 1)
        raise UserError(f"the column '{twice}' appears twice", where=f"{name}, line 1", hint="rename one")


def _read_arrow(path: Path, name: str, kind: str) -> tuple[Sequence[int], list[Row]]:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    try:
        if kind == "parquet":
            table = pyarrow.parquet.ParquetFile(path).read()
        else:
            with pyarrow.memory_map(str(path)) as file:
                is_file = file.read(6) == b"ARROW1"
                file.seek(0)
                table = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(file).read_all()
        rows = table.to_pylist()
    except pyarrow.ArrowException as error:
        hint = "copy the file again, and check that its suffix matches its content"
        shown = "Parquet file" if kind == "parquet" else "Arrow file"
        raise UserError(f"the {shown} cannot be read: {error}", where=name, hint=hint) from error
    return range(1, len(rows) + 1), rows


def _read_hub(identity: str, split: str, reference: str) -> Rows:
    import datasets

    hint = "check the id and the split, or name a file on this machine"
    try:
        found = datasets.load_dataset(identity, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"there is neither a file '{reference}' nor a data set with that id", where=reference, hint=hint
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"there is no such file, and no data set could be loaded: {said}",
            where=reference,
            hint=hint,
        ) from error
    if not len(found):
        raise UserError("the data set is empty: it has no row", where=reference, hint="name another split")
    return Rows(reference, [(reference, range(1, len(found) + 1), found)], columns=found.column_names)


def _missing(path: Path, reference: str) -> UserError:
    folder = path.parent
    if not folder.is_dir():
        return UserError(
            f"there is no file '{reference}', nor a folder '{folder}'",
            where=reference,
            hint="check the path, which is relative to the current folder",
        )
    names = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
    near = nearest(path.name, names) or sorted(name for name in names if _kind(Path(name)))
    hint = (
        did_you_mean(path.name, near) if near else "give the path of a file, relative to the current folder"
    )
    return UserError(f"there is no file '{reference}'", where=str(folder.resolve()), hint=hint)


def _decode(data: bytes, name: str, first_line: int = 1) -> str:
    try:
        return data.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise UserError(
            f"line {line} is not UTF-8 (byte 0x{data[error.start]:02x})",
            where=f"{name}, line {line}",
            hint="save the file as UTF-8",
        ) from error


def _columns_of(parts: Sequence[tuple[str, Sequence[int], Sequence[Row]]]) -> list[str]:
    columns: dict[str, None] = {}
    for _, _, rows in parts:
        if isinstance(rows, Table):
            columns.update(dict.fromkeys(rows.header if len(rows) else ()))
            continue
        for row in rows:
            if not columns.keys() >= row.keys():
                columns.update(dict.fromkeys(row))
    return list(columns)
