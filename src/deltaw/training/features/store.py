"""Stores for features of rows: on disk and memory-mapped, in memory, or none.

A disk store is a folder with an array of values, a completion flag (one byte) per row, and a description. Flags are
written after their values are on disk, so an interrupted run recomputes the remaining rows. A store in use is locked.
Other runs with the same key get a separate copy.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from deltaw import atomic_files, platforms
from deltaw.cache.entries import Cache
from deltaw.errors import UserError

# Maximum total size of all stores. The least recently used ones are removed first.
LIMIT_BYTES = 16 * 2**30
# Disk space that is left free.
MIN_FREE_BYTES = 2**30
# Interval at which values are flushed. A killed run loses at most this amount of work.
SECONDS_BETWEEN_MARKS = 2.0
# Maximum number of runs that use features of the same rows at the same time.
COPIES = 4
# Approximate maximum of a store's mapped pages in a process. They are released then, and read again from the page
# cache.
RESIDENT_BYTES = 256 * 2**20
FREE_SPACE = "free space there, or choose another cache folder in DELTAW_CACHE"
VALUES = "values.bin"
DONE = "done.bin"
DESCRIPTION = "store.json"


@dataclass(frozen=True)
class Shape:
    """Shape of a store: ``units`` vectors of ``width`` numbers for ``rows`` rows.

    Args:
        rows: Number of rows.
        units: Number of vectors.
        width: Size of a vector.
        dtype: Name of the torch dtype.
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
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def bytes(self) -> int:
        return self.units * self.width * self.torch_dtype.itemsize


@dataclass(frozen=True)
class StoreLocation:
    """Location of stores on disk.

    Attributes:
        folder: Folder of the stores. None for the cache folder.
        limit: Maximum total size of all stores in bytes.
    """

    folder: Path | None = None
    limit: int = LIMIT_BYTES


class FeatureStore:
    """Vectors by index, with a completion flag per row. This base class stores no values and reads zeros.

    Attributes:
        done: (rows,) bool, True if the row's values are stored.
        resident_bytes: Maximum main memory that the store takes.
        folder: Folder on disk, if any.
    """

    folder: Path | None = None

    def __init__(self, shape: Shape, resident_bytes: int = 0) -> None:
        self.shape = shape
        self.resident_bytes = resident_bytes
        self.done = np.zeros(shape.rows, bool)

    def read(self, indices: np.ndarray) -> Tensor:
        """Return (n, width) the vectors at (n,) indices."""
        return torch.zeros(len(indices), self.shape.width, dtype=self.shape.torch_dtype)

    def write(self, rows: np.ndarray, indices: np.ndarray, values: Tensor) -> None:
        """Store ``values`` (n, width) at ``indices`` (n,). ``rows`` are complete with them."""

    def clear(self) -> None:
        """Mark all rows as missing."""
        self.done[:] = False

    def flush(self) -> None:
        """Write pending values to disk."""

    def close(self) -> None:
        """Release the store."""


class NoStore(FeatureStore):
    """Empty store. Everything is recomputed each time."""

    def __init__(self, rows: int) -> None:
        super().__init__(Shape(rows, 0, 0, "float32"))


class ShapeStore(FeatureStore):
    """Store for fake tensors. Rows are marked as done when they are written."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, min(shape.bytes, RESIDENT_BYTES))

    def write(self, rows: np.ndarray, indices: np.ndarray, values: Tensor) -> None:
        self.done[rows] = True


class MemoryStore(FeatureStore):
    """Store in main memory."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, shape.bytes)
        self._values = torch.zeros(shape.units, shape.width, dtype=shape.torch_dtype)

    def read(self, indices: np.ndarray) -> Tensor:
        return self._values.index_select(0, torch.from_numpy(indices))

    def write(self, rows: np.ndarray, indices: np.ndarray, values: Tensor) -> None:
        self._values.index_copy_(0, torch.from_numpy(indices), values.detach().cpu())
        self.done[rows] = True


class WrappedStore(FeatureStore):
    """Store that wraps another one and shares its completion flags."""

    def __init__(self, inner: FeatureStore) -> None:
        super().__init__(inner.shape, inner.resident_bytes)
        self.inner = inner
        self.done = inner.done
        self.folder = inner.folder

    def clear(self) -> None:
        self.inner.clear()

    def flush(self) -> None:
        self.inner.flush()

    def close(self) -> None:
        self.inner.close()


class PartialStore(WrappedStore):
    """Store with capacity for the first rows, each with one unit. The remaining rows are recomputed.

    Args:
        inner: Store of the first rows.
        rows: Total number of rows.
    """

    def __init__(self, inner: FeatureStore, rows: int) -> None:
        super().__init__(inner)
        self.done = np.zeros(rows, bool)
        self.done[: inner.shape.rows] = inner.done
        inner.done = self.done[: inner.shape.rows]

    def read(self, indices: np.ndarray) -> Tensor:
        return self.inner.read(indices)

    def write(self, rows: np.ndarray, indices: np.ndarray, values: Tensor) -> None:
        fitting = indices < self.shape.units
        if fitting.any():
            self.inner.write(rows[fitting], indices[fitting], values[torch.from_numpy(fitting)])


class DiskStore(FeatureStore):
    """Store in ``folder``.

    Args:
        folder: Folder of the store.
        shape: Shape of the store.
        lock: Acquired lock of the folder, which the store releases. None if another process of the run owns it.

    Attributes:
        run_file: File that is removed when the run closes the store, if any.
    """

    folder: Path

    def __init__(self, folder: Path, shape: Shape, lock: FileLock | None) -> None:
        super().__init__(shape, min(shape.bytes, RESIDENT_BYTES))
        self.run_file: Path | None = None
        self.folder = folder
        self._lock = lock
        self._map = np.memmap(folder / VALUES, np.uint8, "r+", shape=(shape.bytes,))
        self._values = torch.from_numpy(self._map).view(shape.torch_dtype).view(shape.units, shape.width)
        self._marks = np.memmap(folder / DONE, np.uint8, "r+", shape=(shape.rows,))
        self.done = self._marks != 0
        self._marked = time.monotonic()
        self._touched = 0

    def read(self, indices: np.ndarray) -> Tensor:
        values = self._values.index_select(0, torch.from_numpy(indices))
        self._touch(len(indices))
        return values

    def write(self, rows: np.ndarray, indices: np.ndarray, values: Tensor) -> None:
        self._values.index_copy_(0, torch.from_numpy(indices), values.detach().cpu())
        self.done[rows] = True
        self._touch(len(indices))
        if time.monotonic() - self._marked > SECONDS_BETWEEN_MARKS:
            self.flush()

    def _touch(self, units: int) -> None:
        """Count touched pages and release all when the limit is reached."""
        self._touched += units * max(self.shape.width * self.shape.torch_dtype.itemsize, mmap.PAGESIZE)
        mapped = self._map.base
        if self._touched > RESIDENT_BYTES and isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            # A shared mapping loses no data, including pages that are not on disk yet.
            mapped.madvise(mmap.MADV_DONTNEED)
            self._touched = 0

    def flush(self) -> None:
        """Write the values to disk, then their completion flags."""
        done = np.array(self.done)  # other processes may write in the meantime
        if (done != (self._marks != 0)).any():
            self._map.flush()
            self._marks[:] = done
            self._marks.flush()
        self._marked = time.monotonic()

    def clear(self) -> None:
        super().clear()
        self._marks[:] = 0
        self._marks.flush()

    def close(self) -> None:
        self.flush()
        # Release the maps, because Windows cannot remove mapped files.
        self.done = np.array(self.done)
        self._values = torch.empty(0)
        del self._map, self._marks
        if self.run_file is not None:
            platforms.remove_path(self.run_file)
        if self._lock is not None:
            self._lock.release()


def open_store(
    key: str, shape: Shape, *, about: str = "", folder: Path | None = None, limit: int = LIMIT_BYTES
) -> DiskStore:
    """Open or create the store of this key. Unused stores are removed to make space, least recently used first.

    Args:
        key: Key of everything that the values depend on, valid as a file name.
        shape: Shape of the store.
        about: Description for a user who reads the folder.
        folder: Folder of the stores.
        limit: Maximum total size of all stores in bytes.

    Raises:
        UserError: if the store exceeds the limit or the disk space, or cannot be written.
    """
    cache = Cache("features", limit, mark=f"{{}}/{DESCRIPTION}", folder=folder)
    if shape.bytes > limit:
        message = f"features would take {size_text(shape.bytes)}, the limit of all stores is {size_text(limit)}"
        raise UserError(message, location=str(cache.folder), hint="train on fewer or shorter rows")
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        name, lock = _locked(cache, key)
        try:
            store_folder = cache.folder / name
            if not is_complete(store_folder, shape):
                cache.remove(name)
                _free_space(cache, shape.bytes, limit)
                _create_files(store_folder, shape, about)
            cache.touch(name)
            return DiskStore(store_folder, shape, lock)
        except BaseException:
            lock.release()
            raise
    except OSError as error:
        message = f"features of {size_text(shape.bytes)} cannot be stored: {error.strerror or error}"
        raise UserError(message, location=str(cache.folder), hint=FREE_SPACE) from error


def _locked(cache: Cache, key: str) -> tuple[str, FileLock]:
    """Return the first unused entry of this key and its lock."""
    for name in (key, *(f"{key}-{copy}" for copy in range(1, COPIES))):
        if (lock := cache.try_lock(name)) is not None:
            return name, lock
    message = f"{COPIES} runs use the same features"
    raise UserError(message, location=str(cache.folder), hint="wait until one of them is done")


def is_complete(folder: Path, shape: Shape) -> bool:
    """Return True if a folder contains a store of this shape."""
    try:
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        sizes = [(folder / name).stat().st_size for name in (VALUES, DONE)]
        return bool(described["shape"] == asdict(shape)) and sizes == [shape.bytes, shape.rows]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _create_files(folder: Path, shape: Shape, about: str) -> None:
    folder.mkdir()
    try:
        for name, size in ((VALUES, shape.bytes), (DONE, shape.rows)):
            with (folder / name).open("wb") as file:
                _reserve(file.fileno(), size)
        text = json.dumps({"about": about, "shape": asdict(shape)}, indent=2)
        atomic_files.write_text(folder / DESCRIPTION, text + "\n")
    except BaseException:
        shutil.rmtree(folder)
        raise


def _reserve(file: int, size: int) -> None:
    """Allocate disk space filled with zeros. Writing to a map without allocated space would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    block = bytes(2**20)
    for start in range(0, size, len(block)):
        os.write(file, block[: size - start])


def _free_space(cache: Cache, needed: int, limit: int) -> None:
    """Remove unused stores, least recently used first, until ``needed`` bytes fit."""
    total = cache.evict(needed, min_free_bytes=MIN_FREE_BYTES)
    if total + needed > limit:
        message = f"features of {size_text(needed)} do not fit in addition to the {size_text(total)} of other runs"
        raise UserError(message, location=str(cache.folder), hint="wait until one of them is done")
    spare = cache.free_bytes() - MIN_FREE_BYTES
    if spare < needed:
        message = f"features would take {size_text(needed)}, and {size_text(max(0, spare))} are free on the disk"
        raise UserError(message, location=str(cache.folder), hint=FREE_SPACE)


def size_text(count: int) -> str:
    """Format a size in bytes."""
    if count < 2**20:
        return f"{math.ceil(count / 2**10)} KB"
    return f"{count / 2**20:.0f} MB" if count < 2**30 else f"{count / 2**30:.1f} GB"
