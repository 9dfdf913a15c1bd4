"""Resolution of data references: files, folders, packages, hub data sets and generated rows.

Rows are read completely (:func:`read_rows`), or in chunks if they may exceed memory (:func:`open_source`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deltaw.data.bad_rows import SKIP_HINT, BadRowError, OnBad
from deltaw.data.compressed_files import DecompressedFile
from deltaw.data.reasoning_gym import is_generated, load_generated
from deltaw.data.row_files import KINDS, SUPPORTED_FORMATS, TYPED, kind_of, reading
from deltaw.data.row_stream import FilePart, HubPart, HubRows, RowStream, empty_file
from deltaw.data.rows import NumberedRows, Row, Table
from deltaw.errors import UserError, did_you_mean, find_similar_files
from deltaw.hub import packages
from deltaw.hub.hub_errors import fetch_error
from deltaw.machine.memory import free_memory_bytes, memory_limit_bytes
from deltaw.settings.data import MAX_ROW_BYTES
from deltaw.untrusted_paths import AllowedFolders, require_contained

if TYPE_CHECKING:
    import datasets

if TYPE_CHECKING:
    import datasets


__all__ = ["KINDS", "NumberedRows", "Row", "Table", "open_source", "read_rows"]

_NAME = r"[A-Za-z0-9][\w.-]*"
_COMMIT = re.compile(r"[0-9a-f]{40}")
# A file of a data set: owner/name@revision/path. A revision is one word, or refs/pr/3.
_HUB_FILE = re.compile(
    rf"(?P<id>{_NAME}/{_NAME})@(?P<revision>refs/\w+/[\w.-]+|[\w.-]+)/(?P<path>{_NAME}(?:/{_NAME})*)"
)
# owner/name[/config][@revision][:split]
_HUB = re.compile(
    rf"(?P<id>{_NAME}/{_NAME})(?:/(?P<config>{_NAME}))?(?:@(?P<revision>[\w./-]+))?"
    r"(?::(?P<split>[\w.+\[\]%:-]+))?"
)
_EVAL_NAME = re.compile(r"(?:test|dev|val|valid|validation|eval)(?:[-_.\d].*)?", re.IGNORECASE)
# Overhead of a row in memory in bytes, and number of bytes between two checks of free memory.
_ROW_BYTES = 64
_CHECK_BYTES = 2**24
# Location of a row without its line number.
_ROW_LOCATION = re.compile(r"(?P<file>.+?), row (?P<row>\d+)(?P<rest>(?!.*\(.*line)\D.*|)", re.DOTALL)
# Folders created by archive tools and Python.
_NOT_DATA = frozenset(("__MACOSX", "__pycache__"))


def read_rows(reference: str, on_bad: OnBad | None = None, *, max_bytes: int = MAX_ROW_BYTES) -> NumberedRows:
    """Read all rows of a reference into memory.

    A reference is a file, a folder of files, ``pypi:package==version/path``, a hub id
    ``owner/name[/config][@revision][:split]``, a file of a hub data set ``owner/name@revision/path``, or
    ``reasoning-gym:name``.

    Args:
        on_bad: See :func:`open_source`.
        max_bytes: See :func:`open_source`.

    Raises:
        UserError: if the file or data set does not exist, has no row, or cannot be read. The message names the file and
            the line or row.
    """
    resolved = _resolve(reference)
    if not isinstance(resolved, list):
        part = (reference, range(1, len(resolved) + 1), HubRows(resolved))
        return NumberedRows(reference, [part], columns=resolved.column_names, fills_nulls=True)
    budget = _MemoryBudget(reference)
    first_bad: list[BadRowError] = []

    def record_bad(error: BadRowError, row: object) -> None:
        assert on_bad is not None
        first_bad.append(error) if not first_bad else None
        on_bad(error, row)

    on_bad_row = None if on_bad is None else record_bad
    parts = [(name, *_read_file(path, name, on_bad_row, max_bytes, budget)) for path, name in resolved]
    rows = NumberedRows(reference, parts, fills_nulls=any(kind_of(path) in TYPED for path, _ in resolved))
    if not len(rows):
        size = sum(path.stat().st_size for path, _ in resolved)
        raise empty_file(reference, first_bad[0] if first_bad else None, size)
    return rows


def open_source(reference: str, on_bad: OnBad | None = None, *, max_bytes: int = MAX_ROW_BYTES) -> RowStream:
    """Open a reference for reading in chunks.

    Args:
        on_bad: Receives unreadable lines, which are skipped. Without it they raise an error.
        max_bytes: Maximum size of a row in bytes, decompressed. Longer rows are unreadable.

    Raises:
        UserError: if the file or data set does not exist. Errors inside a file are raised when it is read.
    """
    resolved = _resolve(reference)
    if not isinstance(resolved, list):
        hub = HubPart(resolved, reference, max_bytes=max_bytes)
        return RowStream(reference, [hub], on_bad=on_bad, max_bytes=max_bytes)
    parts = [FilePart(path, name, max_bytes=max_bytes) for path, name in resolved]
    return RowStream(reference, parts, on_bad=on_bad, max_bytes=max_bytes)


def _resolve(reference: str) -> list[tuple[Path, str]] | datasets.Dataset:
    """Return files with their names for messages, or a hub data set."""
    if is_generated(reference):
        return load_generated(reference)
    if packages.is_package_reference(reference):
        return _files(packages.member(reference), reference)
    path = Path(os.path.expanduser(reference))
    if path.exists():
        allowed = AllowedFolders.of_process()
        if allowed is not None and allowed.find(path.absolute()) is None:  # replaced by a link after a check
            hint = "copy them into one of these folders"
            raise UserError("the rows are outside of the folders that are allowed", location=reference, hint=hint)
        return _files(path, reference)
    if (file := _hub_file(reference)) is not None:
        return [(_fetched(*file.group("id", "revision", "path")), reference)]
    if (hub := _hub_set(reference)) is not None:
        return _load_hub(hub, reference)
    raise _missing(path, reference)


def _hub_file(reference: str) -> re.Match[str] | None:
    match = _HUB_FILE.fullmatch(reference)
    return match if match and ".." not in reference and kind_of(Path(match["path"])) is not None else None


def _hub_set(reference: str) -> re.Match[str] | None:
    path = Path(os.path.expanduser(reference))
    return _HUB.fullmatch(reference) if not path.parent.is_dir() and kind_of(path) is None else None


def is_on_hub(reference: str) -> bool:
    """Return True if a reference is a hub id or a file of a hub data set. Does not access the network."""
    is_local = packages.is_package_reference(reference) or Path(os.path.expanduser(reference)).exists()
    return not is_local and (_hub_file(reference) or _hub_set(reference)) is not None


def commit_of(reference: str) -> str | None:
    """Return the commit of a hub reference, or None if the reference is not on a hub or the commit is unknown."""
    if not is_on_hub(reference):
        return None
    if (file := _hub_file(reference)) is not None:
        parts = _fetched(*file.group("id", "revision", "path")).parts  # in the hub's cache: …/snapshots/commit/path
        return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None
    match = _hub_set(reference)
    return None if match is None else _commit(match["id"], match["revision"])


@functools.cache
def _commit(name: str, revision: str | None) -> str | None:
    """Return the commit of a data set revision, resolved once per process so that all rows are from one commit."""
    from huggingface_hub import HfApi

    if _COMMIT.fullmatch(revision or ""):
        return revision
    try:
        return HfApi().dataset_info(name, revision=revision).sha
    except Exception:  # the error is reported when rows are read
        return None


@functools.cache
def _fetched(name: str, revision: str, path: str) -> Path:
    """Download a file of a hub data set to the hub's cache. All files of a process are from one commit."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, path, repo_type="dataset", revision=revision))
    except Exception as error:  # the hub client raises arbitrary exceptions of its HTTP transport
        raise fetch_error(error, f"{name}@{revision}/{path}", "data set", revision) from error


def _files(path: Path, name: str) -> list[tuple[Path, str]]:
    if not path.is_dir():
        if kind_of(path) is None:
            is_spreadsheet = path.suffix.lower() in (".xlsx", ".xls", ".ods")
            spreadsheet_hint = "save the sheet as CSV, or use deltaw studio, which reads .xlsx files"
            hint = spreadsheet_hint if is_spreadsheet else f"give {SUPPORTED_FORMATS}"
            raise UserError(f"a '{path.suffix}' file cannot be read", location=name, hint=hint)
        return [(path, name)]
    return [(file, f"{name.rstrip('/')}/{file.relative_to(path).as_posix()}") for file in _inside(path, name)]


def _inside(folder: Path, name: str) -> list[Path]:
    """Return the data files of a folder and its subfolders, sorted by path.

    Raises:
        UserError: if the files have several types, if training and evaluation files are mixed, or if a link leads out
            of the folder.
    """
    files = [file for file in walk(folder) if kind_of(file)]
    require_contained(folder, only=files)
    kinds = sorted({str(kind_of(file)) for file in files})
    if not files:
        raise UserError("the folder has no data file", location=name, hint=f"put {SUPPORTED_FORMATS} files there")
    names = [file.relative_to(folder).as_posix() for file in files]
    if len(kinds) > 1:
        hint = "name the files to read, one or a list, since some may be copies: " + ", ".join(names[:6])
        raise UserError(f"the folder has files of several types ({', '.join(kinds)})", location=name, hint=hint)
    eval_names = [file for file in names if any(_EVAL_NAME.fullmatch(part.split(".")[0]) for part in file.split("/"))]
    if eval_names and len(eval_names) < len(files):
        message = f"the folder also has evaluation data ('{eval_names[0]}'), which must not be trained on"
        raise UserError(message, location=name, hint="name the files or folders: data.train and data.eval")
    return files


def walk(folder: Path) -> list[Path]:
    """Return all files below a folder that are not hidden. Links to folders are not followed."""
    files: list[Path] = []
    for root, folders, names in os.walk(folder):
        folders[:] = [inner for inner in folders if not inner.startswith(".") and inner not in _NOT_DATA]
        files += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(file for file in files if file.is_file())


def _read_file(
    path: Path, name: str, on_bad: OnBad | None, max_bytes: int, budget: _MemoryBudget
) -> tuple[Sequence[int], Sequence[Row]]:
    file = FilePart(path, name, max_bytes=max_bytes)
    numbers: list[int] = []
    if kind_of(path) != "csv":
        rows: list[Row] = []
        for number, row, size in file.read(on_bad):
            numbers.append(number)
            rows.append(row)
            budget.take(size)
        return numbers, rows
    cells: list[list[str]] = []
    with reading(name), DecompressedFile(path) as opened:
        reader = file.table(opened, on_bad)
        for number, row_cells in reader:
            numbers.append(number)
            cells.append(row_cells)
            budget.take(sum(map(len, row_cells)))
    if not reader.has_header:
        interned: dict[str, str] = {}  # tables of numbers repeat the same strings
        cells = [[interned.setdefault(cell, cell) for cell in row] for row in cells]
    return numbers, Table(reader.header, cells, reader.has_header)


class _MemoryBudget:
    """Rejects rows before they exhaust the memory."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._taken = self._checked = 0

    def take(self, size: int) -> None:
        """Count a row of ``size`` bytes.

        Raises:
            UserError: if less than 5% of the memory is free.
        """
        self._taken += size + _ROW_BYTES
        if self._taken - self._checked < _CHECK_BYTES:
            return
        self._checked = self._taken
        if free_memory_bytes() < memory_limit_bytes().value // 20:
            message = f"the rows do not fit into memory: {self._taken / 1e6:,.0f} MB of them were read"
            raise UserError(message, location=self._name, hint="use fewer rows; only unlabeled text is read in chunks")


def _load_hub(hub: re.Match[str], reference: str) -> datasets.Dataset:
    import datasets

    hint = "check the id, the revision and the split, or name a file on this machine"
    revision = _commit(hub["id"], hub["revision"]) or hub["revision"]
    options = {key: value for key, value in (("name", hub["config"]), ("revision", revision)) if value}
    try:
        dataset = datasets.load_dataset(hub["id"], split=hub["split"] or "train", **options)
    except datasets.exceptions.DatasetNotFoundError as error:
        message = f"neither a file '{reference}' nor a data set with that id exists"
        raise UserError(message, location=reference, hint=hint) from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = f"no such file exists, and the data set could not be loaded: {reason}"
        raise UserError(message, location=reference, hint=hint) from error
    if not len(dataset):
        raise UserError("the data set has no row", location=reference, hint="name another split")
    return dataset


def _missing(path: Path, reference: str) -> UserError:
    folder = path.parent
    if not folder.is_dir():
        hint = "check the path, which is relative to the current folder"
        return UserError(f"there is no file '{reference}', nor a folder '{folder}'", location=reference, hint=hint)
    near = find_similar_files(path, lambda entry: kind_of(entry) is not None)
    hint = did_you_mean(path.name, near) if near else "give the path of a file, relative to the current folder"
    return UserError(f"there is no file '{reference}'", location=str(folder.resolve()), hint=hint)


def with_lines(locations: Sequence[str]) -> list[str]:
    """Add line numbers to row locations such as "data.csv, row 7".

    Each file is read once, up to the last of these rows. Locations in other files, such as Parquet, are returned
    unchanged.
    """
    rows: dict[str, set[int]] = {}
    matches = [_ROW_LOCATION.fullmatch(location) for location in locations]
    for match in filter(None, matches):
        rows.setdefault(match["file"], set()).add(int(match["row"]))
    lines = {file: _lines_of(file, numbers) for file, numbers in rows.items()}

    def complete(location: str, match: re.Match[str] | None) -> str:
        line = None if match is None else lines[match["file"]].get(int(match["row"]))
        has_line = match is not None and line is not None
        return f"{match['file']}, row {match['row']} (line {line}){match['rest']}" if match and has_line else location

    return [complete(location, match) for location, match in zip(locations, matches, strict=True)]


def _lines_of(file: str, numbers: set[int]) -> dict[int, int]:
    try:
        path = packages.local_path(file)
        return FilePart(path, file).lines_of(numbers) if path.is_file() and kind_of(path) else {}
    except (UserError, OSError, ValueError):  # the original error is more important
        return {}


@contextlib.contextmanager
def row_errors() -> Iterator[None]:
    """Add the line of the row to errors, and a hint about skipping unusable rows."""
    try:
        yield
    except UserError as error:
        location = error.location and with_lines([error.location])[0]
        if isinstance(error, BadRowError):
            hint = error.hint or ""
            hint = hint if SKIP_HINT in hint else "; ".join(filter(None, (hint, SKIP_HINT)))
            raise BadRowError(error.message, reason=error.reason, location=location, hint=hint) from error
        if location == error.location:
            raise
        raise UserError(error.message, location=location, hint=error.hint) from error
