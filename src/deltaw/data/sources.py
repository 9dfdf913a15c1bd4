"""A reference becomes rows: files, folders, packages and data sets on a hub.

Rows are read as a whole (:func:`read_rows`), or in chunks where there may be more of them than memory
(:func:`open_source`). It knows where rows are; :mod:`deltaw.data.row_files` reads files, and
:mod:`deltaw.data.formats` knows what the columns mean.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from deltaw.contained import require_contained
from deltaw.data import reasoning_gym
from deltaw.data.example import rows_of
from deltaw.data.report import MAX_ROW_BYTES, SKIPPING, BadRowError, Report
from deltaw.data.row_files import KINDS, KNOWN, TYPED, OnBad, Opened, kind_of, reading
from deltaw.data.row_stream import FilePart, HubPart, RowStream, empty_file
from deltaw.data.rows import Row, Rows, Table
from deltaw.data.sequences import lengths_of, picked
from deltaw.data.settings import DataSettings, EvalSets, held_out_number, held_out_reference
from deltaw.errors import UserError, did_you_mean, files_near
from deltaw.hub import packages
from deltaw.hub.refusals import refused_fetch
from deltaw.machine.memory import free_memory_bytes, memory_limit_bytes

if TYPE_CHECKING:
    import datasets


__all__ = ["KINDS", "Row", "Rows", "Table", "open_source", "read_rows"]

_NAME = r"[A-Za-z0-9][\w.-]*"
_COMMIT = re.compile(r"[0-9a-f]{40}")
# A file of a data set: owner/name@revision/path, where a revision is one word, or refs/pr/3.
_HUB_FILE = re.compile(
    rf"(?P<id>{_NAME}/{_NAME})@(?P<revision>refs/\w+/[\w.-]+|[\w.-]+)/(?P<path>{_NAME}(?:/{_NAME})*)"
)
# owner/name[/config][@revision][:split]
_HUB = re.compile(
    rf"(?P<id>{_NAME}/{_NAME})(?:/(?P<config>{_NAME}))?(?:@(?P<revision>[\w./-]+))?"
    r"(?::(?P<split>[\w.+\[\]%:-]+))?"
)
_HELD_OUT_NAME = re.compile(r"(?:test|dev|val|valid|validation|eval)(?:[-_.\d].*)?", re.IGNORECASE)
# Of rows that are kept in memory: bytes of each beside its text, and bytes after which memory is looked at.
_ROW_BYTES, _LOOK_BYTES = 64, 2**24
# A row in a file whose line is not given yet.
_ROW_PLACE = re.compile(r"(?P<file>.+?), row (?P<row>\d+)(?P<rest>(?!.*\(.*line)\D.*|)", re.DOTALL)
# Folders that archives and version control leave behind.
_NOT_DATA = frozenset(("__MACOSX", "__pycache__"))


def read_rows(reference: str, on_bad: OnBad | None = None, *, max_bytes: int = MAX_ROW_BYTES) -> Rows:
    """Read a file, a folder of files, ``pypi:package==version/path``, a hub id
    ``owner/name[/config][@revision][:split]`` or a file of one, ``owner/name@revision/path``, or
    ``reasoning-gym:name``, all rows at once.

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
    room = _Room(reference)
    first_bad: list[BadRowError] = []

    def note(error: BadRowError, row: object) -> None:
        assert on_bad is not None
        first_bad.append(error) if not first_bad else None
        on_bad(error, row)

    noting = None if on_bad is None else note
    parts = [(name, *_read_file(path, name, noting, max_bytes, room)) for path, name in found]
    rows = Rows(reference, parts, fills_nulls=any(kind_of(path) in TYPED for path, _ in found))
    if not len(rows):
        size = sum(path.stat().st_size for path, _ in found)
        raise empty_file(reference, first_bad[0] if first_bad else None, size)
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
    if reasoning_gym.is_reference(reference):
        return reasoning_gym.load(reference)
    if packages.is_package_reference(reference):
        return _files(packages.member(reference), reference)
    path = Path(os.path.expanduser(reference))
    if path.exists():
        return _files(path, reference)
    if (file := _hub_file(reference)) is not None:
        return [(_fetched(*file.group("id", "revision", "path")), reference)]
    if (hub := _hub_set(reference)) is not None:
        return _load_hub(hub, reference)
    raise _missing(path, reference)


def _hub_file(reference: str) -> re.Match[str] | None:
    found = _HUB_FILE.fullmatch(reference)
    return found if found and ".." not in reference and kind_of(Path(found["path"])) is not None else None


def _hub_set(reference: str) -> re.Match[str] | None:
    path = Path(os.path.expanduser(reference))
    return _HUB.fullmatch(reference) if not path.parent.is_dir() and kind_of(path) is None else None


def is_on_hub(reference: str) -> bool:
    """Whether a reference to rows is a hub id, or a file of one; nothing is asked for."""
    here = packages.is_package_reference(reference) or Path(os.path.expanduser(reference)).exists()
    return not here and (_hub_file(reference) or _hub_set(reference)) is not None


def commit_of(reference: str) -> str | None:
    """The commit that rows on a hub are read from; None for rows that are not on one, and where it is not known."""
    if not is_on_hub(reference):
        return None
    if (file := _hub_file(reference)) is not None:
        parts = _fetched(*file.group("id", "revision", "path")).parts  # in the hub's cache: …/snapshots/commit/path
        return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None
    found = _hub_set(reference)
    return None if found is None else _commit(found["id"], found["revision"])


@functools.cache
def _commit(name: str, revision: str | None) -> str | None:
    """The commit that a revision of a data set stands for; asked once a process, so that all rows are of one."""
    from huggingface_hub import HfApi

    if _COMMIT.fullmatch(revision or ""):
        return revision
    try:
        return HfApi().dataset_info(name, revision=revision).sha
    except Exception:  # whoever reads the rows says what is wrong
        return None


@functools.cache
def _fetched(name: str, revision: str, path: str) -> Path:
    """A file of a data set on a hub, in the hub's cache; of the same commit for the whole process."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, path, repo_type="dataset", revision=revision))
    except Exception as error:  # the hub's client passes on whatever its transport raises
        raise refused_fetch(error, f"{name}@{revision}/{path}", "data set", revision) from error


def _files(path: Path, name: str) -> list[tuple[Path, str]]:
    if not path.is_dir():
        if kind_of(path) is None:
            raise UserError(f"a '{path.suffix}' file cannot be read as data", where=name, hint=f"give {KNOWN}")
        return [(path, name)]
    return [(file, f"{name.rstrip('/')}/{file.relative_to(path).as_posix()}") for file in _inside(path, name)]


def _inside(folder: Path, name: str) -> list[Path]:
    """The data files of a folder and of those inside it, in order of their paths: of one type, not both for
    training and evaluation, and none a link to a file elsewhere."""
    files = [file for file in walk(folder) if kind_of(file)]
    require_contained(folder, among=files)
    kinds = sorted({str(kind_of(file)) for file in files})
    if not files:
        raise UserError("the folder holds no data file", where=name, hint=f"put {KNOWN} files there, or name one")
    shown = [file.relative_to(folder).as_posix() for file in files]
    if len(kinds) > 1:
        hint = "one may be a copy of another; name those to read, one or a list: " + ", ".join(shown[:6])
        raise UserError(f"the folder holds files of several types ({', '.join(kinds)})", where=name, hint=hint)
    held_out = [file for file in shown if any(_HELD_OUT_NAME.fullmatch(part.split(".")[0]) for part in file.split("/"))]
    if held_out and len(held_out) < len(files):
        what = f"the folder also holds evaluation data ('{held_out[0]}'), which must not be trained on"
        raise UserError(what, where=name, hint="name the files or folders: data.train and data.eval")
    return files


def walk(folder: Path) -> list[Path]:
    """All files below a folder that are not hidden; a link to a folder is not followed."""
    found: list[Path] = []
    for root, folders, names in os.walk(folder):
        folders[:] = [inner for inner in folders if not inner.startswith(".") and inner not in _NOT_DATA]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(file for file in found if file.is_file())


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
            what = f"the rows do not fit into memory: {self._taken / 1e6:,.0f} MB of them were read"
            raise UserError(what, where=self._name, hint="give fewer rows; only text without labels is read in chunks")


def _load_hub(hub: re.Match[str], reference: str) -> datasets.Dataset:
    import datasets

    hint = "check the id, the revision and the split, or name a file on this machine"
    revision = _commit(hub["id"], hub["revision"]) or hub["revision"]
    more = {key: value for key, value in (("name", hub["config"]), ("revision", revision)) if value}
    try:
        found = datasets.load_dataset(hub["id"], split=hub["split"] or "train", **more)
    except datasets.exceptions.DatasetNotFoundError as error:
        what = f"there is neither a file '{reference}' nor a data set with that id"
        raise UserError(what, where=reference, hint=hint) from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = f"there is no such file, and no data set could be loaded: {said}"
        raise UserError(what, where=reference, hint=hint) from error
    if not len(found):
        raise UserError("the data set is empty: it has no row", where=reference, hint="name another split")
    return found


def _missing(path: Path, reference: str) -> UserError:
    folder = path.parent
    if not folder.is_dir():
        hint = "check the path, which is relative to the current folder"
        return UserError(f"there is no file '{reference}', nor a folder '{folder}'", where=reference, hint=hint)
    near = files_near(path, lambda entry: kind_of(entry) is not None)
    hint = did_you_mean(path.name, near) if near else "give the path of a file, relative to the current folder"
    return UserError(f"there is no file '{reference}'", where=str(folder.resolve()), hint=hint)


def with_lines(places: Sequence[str]) -> list[str]:
    """Add the line in which each row begins to places such as "data.csv, row 7".

    Each file is read once, up to its last row of these. Places in other files, such as Parquet, are returned unchanged.
    """
    rows: dict[str, set[int]] = {}
    matches = [_ROW_PLACE.fullmatch(place) for place in places]
    for match in filter(None, matches):
        rows.setdefault(match["file"], set()).add(int(match["row"]))
    lines = {file: _lines_of(file, numbers) for file, numbers in rows.items()}

    def complete(place: str, match: re.Match[str] | None) -> str:
        line = None if match is None else lines[match["file"]].get(int(match["row"]))
        known = match is not None and line is not None
        return f"{match['file']}, row {match['row']} (line {line}){match['rest']}" if match and known else place

    return [complete(place, match) for place, match in zip(places, matches, strict=True)]


def _lines_of(file: str, numbers: set[int]) -> dict[int, int]:
    try:
        path = packages.local_path(file)
        return FilePart(path, file).lines_of(numbers) if path.is_file() and kind_of(path) else {}
    except (UserError, OSError, ValueError):  # the first error is more important
        return {}


@contextlib.contextmanager
def skipping_named() -> Iterator[None]:
    """Add the line of the row to errors, and how to skip rows that cannot be used."""
    try:
        yield
    except UserError as error:
        where = error.where and with_lines([error.where])[0]
        if isinstance(error, BadRowError):
            hint = error.hint or ""
            hint = hint if SKIPPING in hint else "; ".join(filter(None, (hint, SKIPPING)))
            raise BadRowError(error.what, reason=error.reason, where=where, hint=hint) from error
        if where == error.where:
            raise
        raise UserError(error.what, where=where, hint=error.hint) from error


# Which rows are trained on and which are held out: chosen, deduplicated, split.
#
# Duplicates and rows of one group stay on the same side. It knows rows by keys and groups of 16 bytes, and
# works on arrays of them, so that millions of rows take seconds; of examples it knows that they have a length,
# labels and a key.


_CHOOSING, _SPLITTING = 1, 2  # independent random streams of one seed
# Rows whose keys are sorted at a time, roughly.
_BUCKET = 2**20
KEY_BYTES = 16


T = TypeVar("T")


def choose(count: int, wanted: int | None, seed: int) -> Sequence[int]:
    """Indices of the chosen rows (``data.rows``), in the order of the file."""
    if wanted is None or wanted >= count:
        return range(count)
    return sorted(_random(seed, _CHOOSING).choice(count, size=wanted, replace=False).tolist())


def check_group(name: str, columns: Sequence[str], column: str | None) -> None:
    """Raise a UserError if a file of these columns lacks that of ``data.group``."""
    if column is not None and column not in columns:
        hint = did_you_mean(column, columns)
        raise UserError(f"the file has no column '{column}'", where=f"data.group for {name}", hint=hint)


def groups_of(rows: Rows, indices: Sequence[int], column: str | None) -> list[Hashable]:
    """The group of each row at ``indices``; a row without a value is a group of its own.

    Raises:
        UserError: a value is no text, number or truth value.
    """
    if column is None:
        return [None] * len(indices)
    groups: list[Hashable] = []
    for index in indices:
        value = rows[index][1].get(column)
        if isinstance(value, list | dict):
            what = f"'{column}' holds a {type(value).__name__}, which names no group"
            raise UserError(what, where=rows.place(index), hint="set data.group to a column of texts or numbers")
        groups.append(None if value is None or value == "" else value)  # type: ignore[arg-type]
    return groups


def as_keys(digests: Sequence[bytes]) -> np.ndarray:
    """(n, 2) uint64 of n digests of 16 bytes."""
    return np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)


def group_digest(value: Hashable) -> bytes:
    """16 bytes, equal for equal groups; zeros for a row that is its own group."""
    if value is None or value != value:
        return bytes(KEY_BYTES)
    if isinstance(value, bool | int) or (isinstance(value, float) and value.is_integer()):
        value = int(value)  # 1, 1.0 and true are one group
    text = f"{type(value).__name__} {value}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=KEY_BYTES).digest()


def division(
    keys: np.ndarray, groups: np.ndarray | None, settings: DataSettings, seed: int, linked: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, int, list[int]]:
    """Drop duplicates, and draw the rows that are held out.

    Args:
        keys: (n, 2) uint64, equal for duplicates. groups: (n, 2), zeros for a row that is its own group.
        linked: (n,) int, equal for examples of one row, which stay on one side.

    Returns:
        the places of the rows to train on and of those held out, ascending; how many have the key of an earlier
        one; and the number of groups on either side, without rows that are their own group.

    Raises:
        UserError: ``data.eval`` asks for more rows than there are, or no whole group can be held out.
    """
    first = first_places(keys)
    kept = np.arange(len(first))
    distinct = first == kept
    duplicates = len(first) - int(distinct.sum())
    if settings.duplicates != "keep":
        kept = np.flatnonzero(distinct)
        first, distinct = np.arange(len(kept)), np.ones(len(kept), bool)
    group_of = None if groups is None else _first_of_groups(groups[kept])
    classes = [first] if group_of is None else [first, group_of]
    if linked is not None:
        _, index, inverse = np.unique(linked[kept], return_index=True, return_inverse=True)
        classes.append(index[inverse])
    is_apart = _drawn(_connected(classes), distinct, settings, seed)
    counts = [0, 0]
    if group_of is not None and groups is not None:
        in_group = (groups[kept] != 0).any(1)
        counts = [len(np.unique(group_of[in_group & side])) for side in (~is_apart, is_apart)]
    return kept[~is_apart], kept[is_apart], duplicates, counts


def divide(
    rows: Sequence[Any],
    keys: np.ndarray,
    groups: np.ndarray | None,
    report: Report,
    settings: DataSettings,
    *,
    seed: int,
    read_apart: Callable[[str], tuple[Sequence[Any], np.ndarray, Report]],
    linked: np.ndarray | None = None,
    weigh: Callable[[np.ndarray], np.ndarray] = lambda places: places,
) -> tuple[Sequence[Any], Sequence[Any], Report]:
    """Drop duplicates, and draw or read the rows that are held out.

    Args:
        rows: all usable rows of the training files; a list, or a view of stored ones.
        keys, groups, linked: of them, as in :func:`division`.
        report: the report so far.
        read_apart: reads the evaluation file that ``data.eval`` names: its rows, their keys and their report.
        weigh: places of the rows to train on to places as often as they come in an epoch.

    Returns:
        rows to train on, rows held out, and the complete report.

    Raises:
        UserError: ``data.eval`` asks for more rows than there are, or no whole group can be held out.
    """
    for_training, drawn, duplicates, (of_train, of_held_out) = division(keys, groups, settings, seed, linked)
    places = weigh(for_training)
    train, once = picked(rows, places), len(np.unique(places))
    report = replace(
        counted(report, train),
        rows_kept=once,
        repeated=len(places) - once,
        not_drawn=len(for_training) - once,
        duplicates=duplicates,
        duplicates_kept=settings.duplicates == "keep",
    )
    apart = held_out_reference(settings.eval)
    if apart is not None:
        held_out, others, evaluation = read_apart(apart)
        overlap = count_overlap(keys[for_training], others)
        report = replace(report, held_out_source=apart, overlap=overlap, evaluation=evaluation)
    else:
        held_out = picked(rows, drawn)
        if settings.group is not None:
            report = replace(report, group=settings.group, groups=of_train, held_out_groups=of_held_out)
    report = replace(report, held_out=len(held_out), longest=max(report.longest, _longest(held_out)))
    return train, held_out, report


def evaluated(rows: Sequence[Any], report: Report, keys: np.ndarray) -> Report:
    """The report of an evaluation file, which keeps duplicates."""
    duplicates = int((first_places(keys) != np.arange(len(keys))).sum())
    return replace(counted(report, rows), duplicates=duplicates, duplicates_kept=True)


def counted(report: Report, rows: Sequence[Any]) -> Report:
    """The report with the sums over ``rows``."""
    labels = rows.label_counts if hasattr(rows, "label_counts") else [row.label_count for row in rows]
    tokens = int(lengths_of(rows).sum())
    return replace(report, rows_kept=len(rows), tokens=tokens, label_tokens=int(np.sum(labels)), longest=_longest(rows))


def _longest(rows: Sequence[Any]) -> int:
    """Tokens of the longest row, also of those in groups."""
    if isinstance(rows, list):
        rows = [row for item in rows for row in rows_of(item)]
    return int(lengths_of(rows).max(initial=0))


def first_places(keys: np.ndarray) -> np.ndarray:
    """(n,) for each of the keys (n, 2) the place of the first equal one.

    Keys are sorted a part at a time, so that this takes little memory beside its result.
    """
    count = len(keys)
    first = np.arange(count)
    bits = max(0, (count // _BUCKET).bit_length())
    bucket = keys[:, 0] >> np.uint64(64 - bits) if bits else np.zeros(count, np.uint8)
    for number in range(1 << bits):
        places = np.flatnonzero(bucket == number)
        if len(places) < 2:
            continue
        part = keys[places]
        order = np.lexsort((part[:, 1], part[:, 0]))  # stable: equal keys stay in the order of the file
        part = part[order]
        begins = np.concatenate([[True], (part[1:] != part[:-1]).any(1)])
        first[places[order]] = places[order[begins]][np.cumsum(begins) - 1]
    return first


def count_overlap(train: np.ndarray, held_out: np.ndarray) -> int:
    """How many of the held-out keys are also among those of the training rows."""
    first = first_places(np.concatenate([train, held_out]))
    return int((first[len(train) :] < len(train)).sum())


def keys_of(items: Sequence[T], key: Callable[[T], bytes]) -> np.ndarray:
    """(n, 2) uint64, equal for items with equal ``key``."""
    return as_keys([hashlib.blake2b(key(item), digest_size=KEY_BYTES).digest() for item in items])


def group_keys(groups: Sequence[Hashable]) -> np.ndarray | None:
    """(n, 2) uint64 of the groups of n rows; None if each is its own group."""
    return None if all(group is None for group in groups) else as_keys(list(map(group_digest, groups)))


def _first_of_groups(groups: np.ndarray) -> np.ndarray:
    """The place of the first row of each row's group; its own for a row that is its own group."""
    first = first_places(groups)
    alone = ~(groups != 0).any(1)
    first[alone] = np.flatnonzero(alone)
    return first


def _connected(classes: Sequence[np.ndarray]) -> np.ndarray:
    """(n,) a number for each row, equal for rows that are linked, also through others: the first of them.

    Args:
        classes: each (n,) the place of the first row that this row is linked with.
    """
    units = classes[0]
    if len(classes) == 1:
        return units
    while True:
        before = units
        for of_class in classes:
            lowest = np.full(len(units), len(units))
            np.minimum.at(lowest, of_class, units)
            units = lowest[of_class]
        if (units == before).all():
            return units


def _drawn(units: np.ndarray, distinct: np.ndarray, settings: DataSettings, seed: int) -> np.ndarray:
    """(n,) bool, whether each row is held out; linked rows are held out as a whole.

    Args:
        distinct: (n,) whether a row is the first of its key.
    """
    if held_out_reference(settings.eval) is not None:
        return np.zeros(len(units), bool)
    wanted = _held_out_size(settings.eval, int(distinct.sum()))
    if distinct.all() and (units == np.arange(len(units))).all():  # each alone: millions need no loop
        apart = np.zeros(len(units), bool)
        drawn = _random(seed, _SPLITTING).permutation(len(units))
        apart[drawn[: min(wanted, len(units) - 1)]] = True
        return apart
    order, unit_of = np.unique(units, return_inverse=True)
    apart = np.zeros(len(order), bool)
    sizes = np.bincount(unit_of[distinct], minlength=len(order)).tolist()  # distinct rows in each
    if wanted and len(order) == 1 and sizes[0] > 1:
        what = f"'{settings.group}' links all rows into one group, so none can be held out"
        raise UserError(what, where="data.group", hint="group by another column, or set data.eval to a file or to null")
    taken = 0
    for count, index in enumerate(_random(seed, _SPLITTING).permutation(len(order)).tolist()):
        size = sizes[index]
        # The last group is taken or left, whichever comes closer to the number asked for.
        if taken >= wanted or count == len(order) - 1 or (taken and taken + size - wanted > wanted - taken):
            break
        apart[index] = True
        taken += size
    return apart[unit_of]


def _held_out_size(share: EvalSets, distinct: int) -> int:
    """How many of ``distinct`` rows are held out; a share holds out at least one if that leaves one."""
    number = held_out_number(share)
    if number == 0:
        return 0
    if number < 1:
        return min(max(1, round(number * distinct)), distinct - 1)
    if number >= distinct:
        hint = "hold out fewer rows: some must be left to train on"
        raise UserError(f"data.eval asks for {int(number)} rows, and there are {distinct} distinct ones", hint=hint)
    return int(number)


def _random(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed % 2**64, stream])
