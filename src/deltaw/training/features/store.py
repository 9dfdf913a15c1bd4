"""Features of rows on disk: computed once, mapped into memory, found again by the next run.

A store is a folder with one array of values, one byte a row that says whether the row's values are there,
and a description. The byte is written after the values are on the disk: whoever is killed on the way computes
those rows again. A store that a process works with is locked; others of the same key get one of their own.

Knows rows by number and values by place; not models, batches or what the values mean.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from deltaw import durable
from deltaw.errors import UserError
from deltaw.hub.packages import cache_folder

# All stores together; what was used last is kept longest.
LIMIT_BYTES = 16 * 2**30
# What stays free on the disk for everybody else.
LEFT_FREE_BYTES = 2**30
# Values are brought to the disk this often: a killed run loses at most so much work.
SECONDS_BETWEEN_MARKS = 2.0
# Runs that may work with features of the same rows at the same time.
COPIES = 4
# Pages of a mapped store that a process holds at most, roughly: they are given back then, and read again from
# the system's own cache.
RESIDENT_BYTES = 256 * 2**20
VALUES, DONE, DESCRIPTION = "values.bin", "done.bin", "store.json"


@dataclass(frozen=True)
class Shape:
    """What a store holds: ``units`` vectors of ``width`` numbers over ``rows`` rows.

    Args:
        dtype: of the numbers, a name in torch.
    """

    rows: int
    units: int
    width: int
    dtype: str

    @classmethod
    def of(cls, rows: int, units: int, width: int, dtype: torch.dtype) -> Shape:
        return cls(rows, units, width, str(dtype).removeprefix("torch."))

    @property
    def torch_dtype(self) -> torch.dtype:
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def bytes(self) -> int:
        return self.units * self.width * self.torch_dtype.itemsize


class FeatureStore(Protocol):
    """Vectors by their place, and which rows have theirs."""

    shape: Shape
    done: np.ndarray
    """bool (rows,)."""

    @property
    def resident_bytes(self) -> int:
        """Main memory that it takes at most."""

    def read(self, places: np.ndarray) -> Tensor:
        """(n,) places to (n, width)."""

    def write(self, rows: np.ndarray, places: np.ndarray, values: Tensor) -> None:
        """Keep ``values`` (n, width) at ``places`` (n,); ``rows`` are whole with them."""

    def forget(self) -> None:
        """No row has its values any longer."""

    def mark(self) -> None:
        """Bring everything to the disk."""

    def close(self) -> None:
        """Let others have it."""


class NoStore:
    """Keeps nothing: all is computed again each time."""

    def __init__(self, rows: int) -> None:
        self.shape = Shape(rows, 0, 0, "float32")
        self.done = np.zeros(rows, bool)
        self.resident_bytes = 0

    def read(self, places: np.ndarray) -> Tensor:
        return torch.zeros(len(places), 0)

    def write(self, rows: np.ndarray, places: np.ndarray, values: Tensor) -> None:
        """There is nowhere to keep it."""

    def forget(self) -> None:
        """Nothing is there."""

    def mark(self) -> None:
        """Nothing is there."""

    def close(self) -> None:
        """Nobody else has it."""


class MemoryStore:
    """A store that is gone with the process."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.resident_bytes = shape.bytes
        self.done = np.zeros(shape.rows, bool)
        self._values = torch.zeros(shape.units, shape.width, dtype=shape.torch_dtype)

    def read(self, places: np.ndarray) -> Tensor:
        return self._values.index_select(0, torch.from_numpy(places))

    def write(self, rows: np.ndarray, places: np.ndarray, values: Tensor) -> None:
        self._values.index_copy_(0, torch.from_numpy(places), values.detach().cpu())
        self.done[rows] = True

    def forget(self) -> None:
        self.done[:] = False

    def mark(self) -> None:
        """It is not on the disk."""

    def close(self) -> None:
        """Nobody else has it."""


class PartStore:
    """A store with room for the first rows alone, each of one unit; the others have to be computed again.

    Args:
        inner: the store of these. rows: how many there are in all.
    """

    def __init__(self, inner: FeatureStore, rows: int) -> None:
        self.inner = inner
        self.shape = inner.shape
        self.resident_bytes = inner.resident_bytes
        self.done = np.zeros(rows, bool)
        self.done[: inner.shape.rows] = inner.done
        inner.done = self.done[: inner.shape.rows]

    def read(self, places: np.ndarray) -> Tensor:
        return self.inner.read(places)

    def write(self, rows: np.ndarray, places: np.ndarray, values: Tensor) -> None:
        fitting = places < self.shape.units
        if fitting.any():
            self.inner.write(rows[fitting], places[fitting], values[torch.from_numpy(fitting)])

    def forget(self) -> None:
        self.inner.forget()

    def mark(self) -> None:
        self.inner.mark()

    def close(self) -> None:
        self.inner.close()


class ShapeStore:
    """Stands in for a store where tensors have no values: what it reads has the right shape."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.resident_bytes = min(shape.bytes, RESIDENT_BYTES)
        self.done = np.zeros(shape.rows, bool)

    def read(self, places: np.ndarray) -> Tensor:
        return torch.zeros(len(places), self.shape.width, dtype=self.shape.torch_dtype)

    def write(self, rows: np.ndarray, places: np.ndarray, values: Tensor) -> None:
        self.done[rows] = True

    def forget(self) -> None:
        self.done[:] = False

    def mark(self) -> None:
        """It is not on the disk."""

    def close(self) -> None:
        """Nobody else has it."""


class DiskStore:
    """A store in ``folder``, whose lock the caller holds and hands over; None where another process of the
    run holds it.

    Attributes:
        of_run: a file that goes with the run; None where there is none.
    """

    def __init__(self, folder: Path, shape: Shape, lock: FileLock | None) -> None:
        self.of_run: Path | None = None
        self.shape = shape
        self.resident_bytes = min(shape.bytes, RESIDENT_BYTES)
        self.folder = folder
        self._lock = lock
        self._map = np.memmap(folder / VALUES, np.uint8, "r+", shape=(shape.bytes,))
        self._values = torch.from_numpy(self._map).view(shape.torch_dtype).view(shape.units, shape.width)
        self._marks = np.memmap(folder / DONE, np.uint8, "r+", shape=(shape.rows,))
        self.done = self._marks != 0
        self._marked = time.monotonic()
        self._touched = 0

    def read(self, places: np.ndarray) -> Tensor:
        values = self._values.index_select(0, torch.from_numpy(places))
        self._touch(len(places))
        return values

    def write(self, rows: np.ndarray, places: np.ndarray, values: Tensor) -> None:
        self._values.index_copy_(0, torch.from_numpy(places), values.detach().cpu())
        self.done[rows] = True
        self._touch(len(places))
        if time.monotonic() - self._marked > SECONDS_BETWEEN_MARKS:
            self.mark()

    def _touch(self, units: int) -> None:
        """Count pages that were touched, and give all back once they are many."""
        self._touched += units * max(self.shape.width * self.shape.torch_dtype.itemsize, mmap.PAGESIZE)
        mapped = self._map.base
        if (
            self._touched > RESIDENT_BYTES
            and isinstance(mapped, mmap.mmap)
            and hasattr(mmap, "MADV_DONTNEED")
        ):
            # Of a shared mapping nothing is lost by it, what is not on the disk yet included.
            mapped.madvise(mmap.MADV_DONTNEED)
            self._touched = 0

    def mark(self) -> None:
        """Bring the values to the disk, and then the marks that say so."""
        done = np.array(self.done)  # other processes may go on meanwhile
        if (done != (self._marks != 0)).any():
            self._map.flush()
            self._marks[:] = done
            self._marks.flush()
        self._marked = time.monotonic()

    def forget(self) -> None:
        self.done[:] = False
        self._marks[:] = 0
        self._marks.flush()

    def close(self) -> None:
        self.mark()
        if self.of_run is not None:
            self.of_run.unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.release()


def features_folder() -> Path:
    """Where stores are: ``features`` in deltaw's cache (``$DELTAW_CACHE``, else ``~/.cache/deltaw``)."""
    return cache_folder().parent / "features"


def open_store(
    key: str, shape: Shape, *, about: str = "", folder: Path | None = None, limit: int = LIMIT_BYTES
) -> DiskStore:
    """The store of this key, made where there is none; others make room for it, the longest unused first.

    Args:
        key: fit to be a file's name; says all that the values depend on.
        about: a line for a person who reads the folder.
        folder: where stores are. limit: bytes that all stores may take.

    Raises:
        UserError: it is larger than the limit or than the disk has room, or cannot be written.
    """
    root = folder or features_folder()
    if shape.bytes > limit:
        raise UserError(
            f"features would take {size_text(shape.bytes)}, all stores together may take {size_text(limit)}",
            where=str(root),
            hint="train on fewer or shorter rows",
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        taken, lock = _locked(root, key)
        try:
            if not is_whole(taken, shape):
                _remove(taken)
                _make_room(root, shape.bytes, limit)
                _make(taken, shape, about)
            os.utime(taken / DESCRIPTION)
            return DiskStore(taken, shape, lock)
        except BaseException:
            lock.release()
            raise
    except OSError as error:
        raise UserError(
            f"features of {size_text(shape.bytes)} cannot be kept: {error.strerror or error}",
            where=str(root),
            hint="free space there, or choose another cache folder in DELTAW_CACHE",
        ) from error


def _locked(root: Path, key: str) -> tuple[Path, FileLock]:
    """The first folder of this key that nobody works with, and its lock."""
    for copy in range(COPIES):
        name = key if copy == 0 else f"{key}-{copy}"
        lock = _free(root, name)
        if lock is not None:
            return root / name, lock
    raise UserError(
        f"{COPIES} runs work with the same features", where=str(root), hint="wait until one of them is done"
    )


def _free(root: Path, name: str) -> FileLock | None:
    """The lock of a store, which is now this process's; None where another has it."""
    lock = FileLock(root / f"{name}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock


def is_whole(folder: Path, shape: Shape) -> bool:
    """Whether a folder holds a store of this shape."""
    try:
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        return (
            described["shape"] == asdict(shape)
            and (folder / VALUES).stat().st_size == shape.bytes
            and (folder / DONE).stat().st_size == shape.rows
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _make(folder: Path, shape: Shape, about: str) -> None:
    folder.mkdir()
    try:
        for name, size in ((VALUES, shape.bytes), (DONE, shape.rows)):
            with (folder / name).open("wb") as file:
                _reserve(file.fileno(), size)
        text = json.dumps({"about": about, "shape": asdict(shape)}, indent=2)
        durable.write_text(folder / DESCRIPTION, text + "\n")
    except BaseException:
        _remove(folder)
        raise


def _reserve(file: int, size: int) -> None:
    """Zeros that have their room on the disk: writing into a map that has none would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    block = bytes(2**20)
    for start in range(0, size, len(block)):
        os.write(file, block[: size - start])


def _make_room(root: Path, needed: int, limit: int) -> None:
    """Remove the stores that were unused longest and that nobody works with, until ``needed`` bytes fit."""
    stores = [(use, name, size) for name, use, size in _stores(root)]
    total = sum(size for _, _, size in stores)
    for _, name, size in sorted(stores):
        if total + needed <= limit and _free_bytes(root) >= needed:
            break
        lock = _free(root, name)
        if lock is None:
            continue
        try:
            _remove(root / name)
            total -= size
        finally:
            lock.release()
    if total + needed > limit:
        raise UserError(
            f"features of {size_text(needed)} do not fit with the {size_text(total)} of other runs",
            where=str(root),
            hint="wait until one of them is done",
        )
    spare = _free_bytes(root)
    if spare < needed:
        raise UserError(
            f"features would take {size_text(needed)}, and the disk has {size_text(max(0, spare))} to spare",
            where=str(root),
            hint="free space there, or choose another cache folder in DELTAW_CACHE",
        )


def _stores(root: Path) -> Iterator[tuple[str, float, int]]:
    """Name, time of last use and bytes of every store."""
    for folder in root.iterdir():
        with contextlib.suppress(OSError):
            if folder.is_dir() and not folder.is_symlink():
                size = sum(file.stat().st_size for file in folder.iterdir())
                described = folder / DESCRIPTION
                used = (described if described.exists() else folder).stat().st_mtime
                yield folder.name, used, size


def _remove(folder: Path) -> None:
    """Remove a store, its description first, so that half of one is never taken for a whole."""
    (folder / DESCRIPTION).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def _free_bytes(root: Path) -> int:
    return shutil.disk_usage(root).free - LEFT_FREE_BYTES


def size_text(count: int) -> str:
    """Bytes as a person reads them."""
    if count < 2**20:
        return f"{math.ceil(count / 2**10)} KB"
    return f"{count / 2**20:.0f} MB" if count < 2**30 else f"{count / 2**30:.1f} GB"
