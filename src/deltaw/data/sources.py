"""Resolution of data references (files, folders, packages, hub data sets, generated rows) and selection of rows.

Rows are read completely (:func:`read_rows`), or in chunks if they may exceed memory (:func:`open_source`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from deltaw.data.example import lengths_of, rows_of, select_rows
from deltaw.data.report import SKIP_HINT, BadRowError, PreparationReport
from deltaw.data.row_files import KINDS, SUPPORTED_FORMATS, TYPED, DecompressedFile, OnBad, kind_of, reading
from deltaw.data.row_stream import FilePart, HubPart, HubRows, RowStream, empty_file
from deltaw.data.rows import NumberedRows, Row, Table
from deltaw.errors import UserError, did_you_mean, find_similar_files
from deltaw.hub import packages
from deltaw.hub.hub_errors import fetch_error
from deltaw.machine.memory import free_memory_bytes, memory_limit_bytes
from deltaw.settings.data import MAX_ROW_BYTES, DataSettings, EvalSets, eval_reference, eval_size
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
            raise UserError(f"a '{path.suffix}' file cannot be read", location=name, hint=f"give {SUPPORTED_FORMATS}")
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


# Choosing, deduplicating and splitting rows. Rows are represented by arrays of 16-byte keys and group digests, so that
# millions of rows take seconds. Duplicates and rows of one group are on the same side of the split.

# independent random streams of one seed
_CHOOSING = 1
_SPLITTING = 2
# Approximate number of keys that are sorted at a time.
_BUCKET = 2**20
KEY_BYTES = 16


T = TypeVar("T")


def choose_rows(count: int, max_rows: int | None, seed: int) -> Sequence[int]:
    """Return the indices of the chosen rows (``data.rows``), in file order."""
    if max_rows is None or max_rows >= count:
        return range(count)
    return sorted(_random(seed, _CHOOSING).choice(count, size=max_rows, replace=False).tolist())


def check_group(name: str, columns: Sequence[str], column: str | None) -> None:
    """Raise a UserError if the columns of a file do not include ``data.group``."""
    if column is not None and column not in columns:
        hint = did_you_mean(column, columns)
        raise UserError(f"the file has no column '{column}'", location=f"data.group for {name}", hint=hint)


def groups_of(rows: NumberedRows, indices: Sequence[int], column: str | None) -> list[Hashable]:
    """Return the group of each row at ``indices``. A row without a value gets None.

    Raises:
        UserError: if a value is a list or an object.
    """
    if column is None:
        return [None] * len(indices)
    groups: list[Hashable] = []
    for index in indices:
        value = rows[index][1].get(column)
        if isinstance(value, list | dict):
            message = f"'{column}' is a {type(value).__name__}, which cannot name a group"
            raise UserError(message, location=rows.row_location(index), hint="use a column of texts or numbers")
        groups.append(None if value is None or value == "" else value)  # type: ignore[arg-type]
    return groups


def as_keys(digests: Sequence[bytes]) -> np.ndarray:
    """Return n 16-byte digests as (n, 2) uint64."""
    return np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)


def group_digest(value: Hashable) -> bytes:
    """Return 16 bytes that are equal for equal groups, or zeros for a row without a group."""
    if value is None or value != value:
        return bytes(KEY_BYTES)
    if isinstance(value, bool | int) or (isinstance(value, float) and value.is_integer()):
        value = int(value)  # 1, 1.0 and true are one group
    text = f"{type(value).__name__} {value}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=KEY_BYTES).digest()


def split_indices(
    keys: np.ndarray, groups: np.ndarray | None, settings: DataSettings, seed: int, linked: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, int, list[int]]:
    """Drop duplicates and sample the held-out rows.

    Args:
        keys: (n, 2) uint64, equal for duplicates.
        groups: (n, 2) uint64 group digests, zeros for rows without a group.
        linked: (n,) integers, equal for examples of one row, which are on the same side.

    Returns:
        Indices of the training rows and of the held-out rows, ascending; the number of duplicates; and the number of
        groups on each side.

    Raises:
        UserError: if ``data.eval`` requests more rows than exist, or if all rows are in one group.
    """
    first = first_occurrences(keys)
    selected = np.arange(len(first))
    distinct = first == selected
    duplicates = len(first) - int(distinct.sum())
    if settings.duplicates != "keep":
        selected = np.flatnonzero(distinct)
        first = np.arange(len(selected))
        distinct = np.ones(len(selected), bool)
    group_of = None if groups is None else _first_of_groups(groups[selected])
    classes = [first] if group_of is None else [first, group_of]
    if linked is not None:
        _, index, inverse = np.unique(linked[selected], return_index=True, return_inverse=True)
        classes.append(index[inverse])
    is_held_out = _sample_eval_rows(_connected(classes), distinct, settings, seed)
    counts = [0, 0]
    if group_of is not None and groups is not None:
        in_group = (groups[selected] != 0).any(1)
        counts = [len(np.unique(group_of[in_group & side])) for side in (~is_held_out, is_held_out)]
    return selected[~is_held_out], selected[is_held_out], duplicates, counts


def split_rows(
    rows: Sequence[Any],
    keys: np.ndarray,
    groups: np.ndarray | None,
    report: PreparationReport,
    settings: DataSettings,
    *,
    seed: int,
    read_eval: Callable[[str], tuple[Sequence[Any], np.ndarray, PreparationReport]],
    linked: np.ndarray | None = None,
    weigh: Callable[[np.ndarray], np.ndarray] = lambda indices: indices,
) -> tuple[Sequence[Any], Sequence[Any], PreparationReport]:
    """Drop duplicates, and sample or read the evaluation rows.

    Args:
        rows: Usable rows of the training files: a list, or a view of stored rows.
        keys: Keys of the rows, see :func:`split_indices`.
        groups: Groups of the rows, see :func:`split_indices`.
        report: Report so far.
        read_eval: Reads the evaluation file that ``data.eval`` names. Returns its rows, their keys and their report.
        linked: See :func:`split_indices`.
        weigh: Maps indices of training rows to indices of an epoch, which may repeat or omit rows.

    Returns:
        Training rows, evaluation rows, and the complete report.

    Raises:
        UserError: if ``data.eval`` requests more rows than exist, or if all rows are in one group.
    """
    split = split_indices(keys, groups, settings, seed, linked)
    train_indices, eval_indices, duplicates, (train_groups, eval_groups) = split
    epoch_indices = weigh(train_indices)
    train = select_rows(rows, epoch_indices)
    num_distinct = len(np.unique(epoch_indices))
    report = replace(
        with_token_counts(report, train),
        rows_kept=num_distinct,
        repeated=len(epoch_indices) - num_distinct,
        not_sampled=len(train_indices) - num_distinct,
        duplicates=duplicates,
        duplicates_kept=settings.duplicates == "keep",
    )
    reference = eval_reference(settings.eval)
    if reference is not None:
        eval_rows, eval_keys, evaluation = read_eval(reference)
        overlap = count_overlap(keys[train_indices], eval_keys)
        report = replace(report, held_out_source=reference, overlap=overlap, evaluation=evaluation)
    else:
        eval_rows = select_rows(rows, eval_indices)
        if settings.group is not None:
            report = replace(report, group=settings.group, groups=train_groups, held_out_groups=eval_groups)
    report = replace(report, held_out=len(eval_rows), longest=max(report.longest, _longest(eval_rows)))
    return train, eval_rows, report


def with_eval_counts(rows: Sequence[Any], report: PreparationReport, keys: np.ndarray) -> PreparationReport:
    """Return the report of an evaluation file, in which duplicates are used."""
    duplicates = int((first_occurrences(keys) != np.arange(len(keys))).sum())
    return replace(with_token_counts(report, rows), duplicates=duplicates, duplicates_kept=True)


def with_token_counts(report: PreparationReport, rows: Sequence[Any]) -> PreparationReport:
    """Return the report with the totals over ``rows``."""
    labels = rows.label_counts if hasattr(rows, "label_counts") else [row.label_count for row in rows]
    tokens = int(lengths_of(rows).sum())
    return replace(report, rows_kept=len(rows), tokens=tokens, label_tokens=int(np.sum(labels)), longest=_longest(rows))


def _longest(rows: Sequence[Any]) -> int:
    """Return the number of tokens of the longest row, including rows of groups."""
    if isinstance(rows, list):
        rows = [row for item in rows for row in rows_of(item)]
    return int(lengths_of(rows).max(initial=0))


def first_occurrences(keys: np.ndarray) -> np.ndarray:
    """Return (n,) the index of the first equal key, for (n, 2) uint64 keys.

    Keys are sorted in buckets, which limits the additional memory.
    """
    count = len(keys)
    first = np.arange(count)
    bits = max(0, (count // _BUCKET).bit_length())
    bucket = keys[:, 0] >> np.uint64(64 - bits) if bits else np.zeros(count, np.uint8)
    for number in range(1 << bits):
        indices = np.flatnonzero(bucket == number)
        if len(indices) < 2:
            continue
        part = keys[indices]
        order = np.lexsort((part[:, 1], part[:, 0]))  # stable: equal keys stay in the order of the file
        part = part[order]
        is_first = np.concatenate([[True], (part[1:] != part[:-1]).any(1)])
        first[indices[order]] = indices[order[is_first]][np.cumsum(is_first) - 1]
    return first


def count_overlap(train: np.ndarray, evaluation: np.ndarray) -> int:
    """Return the number of evaluation keys that are also training keys."""
    return int((first_occurrences(np.concatenate([train, evaluation]))[len(train) :] < len(train)).sum())


def keys_of(items: Sequence[T], key: Callable[[T], bytes]) -> np.ndarray:
    """Return (n, 2) uint64, equal for items with equal ``key``."""
    return as_keys([hashlib.blake2b(key(item), digest_size=KEY_BYTES).digest() for item in items])


def group_keys(groups: Sequence[Hashable]) -> np.ndarray | None:
    """Return (n, 2) uint64 digests of the groups of n rows, or None if no row has a group."""
    return None if all(group is None for group in groups) else as_keys(list(map(group_digest, groups)))


def _first_of_groups(groups: np.ndarray) -> np.ndarray:
    """Return the index of the first row of each row's group, or the row's index if it has no group."""
    first = first_occurrences(groups)
    ungrouped = ~(groups != 0).any(1)
    first[ungrouped] = np.flatnonzero(ungrouped)
    return first


def _connected(classes: Sequence[np.ndarray]) -> np.ndarray:
    """Return (n,) a component number per row, equal for directly or indirectly linked rows: the smallest index.

    Args:
        classes: Arrays of shape (n,), each with the index of the first row that a row is linked to.
    """
    units = classes[0]
    if len(classes) == 1:
        return units
    while True:
        previous = units
        for links in classes:
            smallest = np.full(len(units), len(units))
            np.minimum.at(smallest, links, units)
            units = smallest[links]
        if (units == previous).all():
            return units


def _sample_eval_rows(units: np.ndarray, distinct: np.ndarray, settings: DataSettings, seed: int) -> np.ndarray:
    """Return (n,) bool, True for held-out rows. Linked rows are held out together.

    Args:
        units: (n,) component of each row.
        distinct: (n,) True if a row is the first with its key.
    """
    if eval_reference(settings.eval) is not None:
        return np.zeros(len(units), bool)
    num_eval = _num_eval_rows(settings.eval, int(distinct.sum()))
    if distinct.all() and (units == np.arange(len(units))).all():  # no links: vectorized for millions of rows
        is_held_out = np.zeros(len(units), bool)
        permutation = _random(seed, _SPLITTING).permutation(len(units))
        is_held_out[permutation[: min(num_eval, len(units) - 1)]] = True
        return is_held_out
    order, unit_of = np.unique(units, return_inverse=True)
    is_held_out = np.zeros(len(order), bool)
    sizes = np.bincount(unit_of[distinct], minlength=len(order)).tolist()  # distinct rows in each
    if num_eval and len(order) == 1 and sizes[0] > 1:
        message = f"'{settings.group}' links all rows into one group, so none can be held out"
        raise UserError(message, location="data.group", hint="use another column, or set data.eval to a file or null")
    taken = 0
    for count, index in enumerate(_random(seed, _SPLITTING).permutation(len(order)).tolist()):
        size = sizes[index]
        # Include the last group if that is closer to the requested number.
        if taken >= num_eval or count == len(order) - 1 or (taken and taken + size - num_eval > num_eval - taken):
            break
        is_held_out[index] = True
        taken += size
    return is_held_out[unit_of]


def _num_eval_rows(share: EvalSets, distinct: int) -> int:
    """Return the number of held-out rows. A share holds out at least one row if another one remains."""
    number = eval_size(share)
    if number == 0:
        return 0
    if number < 1:
        return min(max(1, round(number * distinct)), distinct - 1)
    if number >= distinct:
        hint = "hold out fewer rows, so that some remain for training"
        raise UserError(f"data.eval requests {int(number)} of {distinct} distinct rows", hint=hint)
    return int(number)


def _random(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed % 2**64, stream])


_PREFIX = "reasoning-gym:"
_SIZE = 1000
_SEED = 0
_MAX_SIZE = 1_000_000


def is_generated(reference: str) -> bool:
    """Return True if a reference names one of these data sets."""
    return reference.startswith(_PREFIX)


def load_generated(reference: str) -> datasets.Dataset:
    """Return the rows of a data set.

    Raises:
        UserError: if the package is missing, the data set does not exist, the configuration is invalid, or the scorer
            cannot read the metadata after conversion to JSON.
    """
    import datasets

    name, _, config = reference.removeprefix(_PREFIX).partition("?")
    values = {"size": _SIZE, "seed": _SEED, **_values(config, reference)}
    size = values["size"]
    if not isinstance(size, int) or not 0 < size <= _MAX_SIZE:
        raise UserError(f"size must be an integer from 1 to {_MAX_SIZE}", location=reference, hint="write ?size=500")
    if not isinstance(values["seed"], int) or values["seed"] < 0:
        raise UserError("seed must be a whole number from 0", location=reference, hint="write ?seed=1")
    dataset = _create(name, values | {"seed": values["seed"] * _MAX_SIZE}, reference)
    rows = [_row(dataset, index) for index in range(size)]
    first = dataset[0]
    if dataset.score_answer(first["answer"], first) != dataset.score_answer(first["answer"], _json_round_trip(first)):
        message = f"the scorer of '{name}' cannot read the metadata of a row"
        raise UserError(message, location=reference, hint="choose another data set")
    return datasets.Dataset.from_list(rows)


def _create(name: str, values: dict[str, Any], reference: str) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        message = f"the package 'reasoning-gym' cannot be imported: {error}"
        raise UserError(message, location=reference, hint="pip install 'deltaw[reward]'") from error
    if name not in DATASETS:
        raise UserError(f"no data set '{name}' exists", location=reference, hint=did_you_mean(name, sorted(DATASETS)))
    try:
        return reasoning_gym.create_dataset(name, **values)
    except (TypeError, ValueError, AssertionError) as error:
        message = f"the configuration does not fit: {error or 'a value is out of range'}"
        raise UserError(message, location=reference, hint=f"see reasoning-gym's configuration of {name}") from error


def _row(dataset: Any, index: int) -> dict[str, str | None]:
    entry = dataset[index]
    answer = entry["answer"]
    metadata = json.dumps(entry["metadata"], default=str)
    return {"prompt": entry["question"], "answer": None if answer is None else str(answer), "metadata": metadata}


def _json_round_trip(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a problem after conversion of its metadata to JSON and back."""
    return {**entry, "metadata": json.loads(json.dumps(entry["metadata"], default=str))}


def _values(text: str, reference: str) -> dict[str, Any]:
    """Parse ``key=value&key=value`` with values in JSON or plain text.

    Raises:
        UserError: if a part has another form.
    """
    values: dict[str, Any] = {}
    for part in filter(None, text.split("&")):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise UserError(f"'{part}' is no key=value", location=reference, hint="write ?size=500&seed=1")
        try:
            values[key] = json.loads(value)
        except ValueError:
            values[key] = value
    return values
