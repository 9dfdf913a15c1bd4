"""Features of rows on disk: computed once, mapped into memory, found again by the next run.

A store is a folder with one array of values, one byte a row that says whether the row's values are there,
and a description. The byte is written after the values are on the disk: whoever is killed on the way computes
those rows again. A store that a process works with is locked; others of the same key get one of their own.

Knows rows by number and values by place; not models, batches or what the values mean.
"""

from __future__ import annotations

import base64
import json
import math
import mmap
import os
import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from deltaw import durable, platforms
from deltaw.cache import Cache
from deltaw.errors import UserError

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
FREE_SPACE = "free space there, or choose another cache folder in DELTAW_CACHE"
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


class FeatureStore:
    """Vectors by their place, and which rows have theirs. This one keeps none: what it reads is zeros of the right
    shape, and no row ever has its values.

    Attributes:
        done: bool (rows,). resident_bytes: main memory that it takes at most.
        folder: where it is on the disk; None in memory.
    """

    folder: Path | None = None

    def __init__(self, shape: Shape, resident_bytes: int = 0) -> None:
        self.shape, self.resident_bytes = shape, resident_bytes
        self.done = np.zeros(shape.rows, bool)

    def read(self, places: np.ndarray) -> Tensor:
        """(n,) places to (n, width)."""
        return torch.zeros(len(places), self.shape.width, dtype=self.shape.torch_dtype)

    def write(self, rows: np.ndarray, places: np.ndarray, values: Tensor) -> None:
        """Keep ``values`` (n, width) at ``places`` (n,); ``rows`` are whole with them."""

    def forget(self) -> None:
        """No row has its values any longer."""
        self.done[:] = False

    def mark(self) -> None:
        """Bring everything to the disk."""

    def close(self) -> None:
        """Let others have it."""


class NoStore(FeatureStore):
    """Keeps nothing: all is computed again each time."""

    def __init__(self, rows: int) -> None:
        super().__init__(Shape(rows, 0, 0, "float32"))


class ShapeStore(FeatureStore):
    """Stands in for a store where tensors have no values: rows are done once they were written."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, min(shape.bytes, RESIDENT_BYTES))

    def write(self, rows: np.ndarray, places: np.ndarray, values: Tensor) -> None:
        self.done[rows] = True


class MemoryStore(FeatureStore):
    """A store that is gone with the process."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, shape.bytes)
        self._values = torch.zeros(shape.units, shape.width, dtype=shape.torch_dtype)

    def read(self, places: np.ndarray) -> Tensor:
        return self._values.index_select(0, torch.from_numpy(places))

    def write(self, rows: np.ndarray, places: np.ndarray, values: Tensor) -> None:
        self._values.index_copy_(0, torch.from_numpy(places), values.detach().cpu())
        self.done[rows] = True


class StoreOver(FeatureStore):
    """A store above another one, with which it shares what is done."""

    def __init__(self, inner: FeatureStore) -> None:
        super().__init__(inner.shape, inner.resident_bytes)
        self.inner, self.done, self.folder = inner, inner.done, inner.folder

    def forget(self) -> None:
        self.inner.forget()

    def mark(self) -> None:
        self.inner.mark()

    def close(self) -> None:
        self.inner.close()


class PartStore(StoreOver):
    """A store with room for the first rows alone, each of one unit; the others have to be computed again.

    Args:
        inner: the store of these. rows: how many there are in all.
    """

    def __init__(self, inner: FeatureStore, rows: int) -> None:
        super().__init__(inner)
        self.done = np.zeros(rows, bool)
        self.done[: inner.shape.rows] = inner.done
        inner.done = self.done[: inner.shape.rows]

    def read(self, places: np.ndarray) -> Tensor:
        return self.inner.read(places)

    def write(self, rows: np.ndarray, places: np.ndarray, values: Tensor) -> None:
        fitting = places < self.shape.units
        if fitting.any():
            self.inner.write(rows[fitting], places[fitting], values[torch.from_numpy(fitting)])


class DiskStore(FeatureStore):
    """A store in ``folder``, whose lock the caller holds and hands over; None where another process of the
    run holds it.

    Attributes:
        of_run: a file that goes with the run; None where there is none.
    """

    folder: Path

    def __init__(self, folder: Path, shape: Shape, lock: FileLock | None) -> None:
        super().__init__(shape, min(shape.bytes, RESIDENT_BYTES))
        self.of_run: Path | None = None
        self.folder, self._lock = folder, lock
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
        if self._touched > RESIDENT_BYTES and isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
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
        super().forget()
        self._marks[:] = 0
        self._marks.flush()

    def close(self) -> None:
        self.mark()
        # Let go of the maps: Windows removes no file that has one.
        self.done, self._values = np.array(self.done), torch.empty(0)
        del self._map, self._marks
        if self.of_run is not None:
            platforms.removed(self.of_run)
        if self._lock is not None:
            self._lock.release()


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
    cache = Cache("features", limit, mark=f"{{}}/{DESCRIPTION}", folder=folder)
    if shape.bytes > limit:
        what = f"features would take {size_text(shape.bytes)}, all stores together may take {size_text(limit)}"
        raise UserError(what, where=str(cache.folder), hint="train on fewer or shorter rows")
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        name, lock = _locked(cache, key)
        try:
            taken = cache.folder / name
            if not is_whole(taken, shape):
                cache.remove(name)
                _make_room(cache, shape.bytes, limit)
                _make(taken, shape, about)
            cache.used(name)
            return DiskStore(taken, shape, lock)
        except BaseException:
            lock.release()
            raise
    except OSError as error:
        what = f"features of {size_text(shape.bytes)} cannot be kept: {error.strerror or error}"
        raise UserError(what, where=str(cache.folder), hint=FREE_SPACE) from error


def _locked(cache: Cache, key: str) -> tuple[str, FileLock]:
    """The first entry of this key that nobody works with, and its lock."""
    for name in (key, *(f"{key}-{copy}" for copy in range(1, COPIES))):
        if (lock := cache.try_lock(name)) is not None:
            return name, lock
    what = f"{COPIES} runs work with the same features"
    raise UserError(what, where=str(cache.folder), hint="wait until one of them is done")


def is_whole(folder: Path, shape: Shape) -> bool:
    """Whether a folder holds a store of this shape."""
    try:
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        sizes = [(folder / name).stat().st_size for name in (VALUES, DONE)]
        return bool(described["shape"] == asdict(shape)) and sizes == [shape.bytes, shape.rows]
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
        shutil.rmtree(folder)
        raise


def _reserve(file: int, size: int) -> None:
    """Zeros that have their room on the disk: writing into a map that has none would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    block = bytes(2**20)
    for start in range(0, size, len(block)):
        os.write(file, block[: size - start])


def _make_room(cache: Cache, needed: int, limit: int) -> None:
    """Remove the stores that were unused longest and that nobody works with, until ``needed`` bytes fit."""
    total = cache.make_room(needed, spare=LEFT_FREE_BYTES)
    if total + needed > limit:
        what = f"features of {size_text(needed)} do not fit with the {size_text(total)} of other runs"
        raise UserError(what, where=str(cache.folder), hint="wait until one of them is done")
    spare = cache.free_bytes() - LEFT_FREE_BYTES
    if spare < needed:
        what = f"features would take {size_text(needed)}, and the disk has {size_text(max(0, spare))} to spare"
        raise UserError(what, where=str(cache.folder), hint=FREE_SPACE)


def size_text(count: int) -> str:
    """Bytes as a person reads them."""
    if count < 2**20:
        return f"{math.ceil(count / 2**10)} KB"
    return f"{count / 2**20:.0f} MB" if count < 2**30 else f"{count / 2**30:.1f} GB"


# Which rows' features were stored at a point of a training, so that it can go on from there to the bit.
#
# Features are computed together with those of the rows beside them, which decides their rounding. A training
# that goes on from a checkpoint must find stored what was stored then, and nothing more: what a killed process
# stored afterwards is computed again.


@dataclass(frozen=True)
class FeatureRecord:
    """Remembers and restores which rows of a store are done.

    Attributes:
        store: None where no features are kept. kept: how far up they go, in words.
        say: told where the steps to come cannot be equal to the bit.
    """

    store: FeatureStore | None
    kept: str
    say: Callable[[str], None]

    def state(self) -> dict[str, Any]:
        """Plain values, ready for JSON; the rows as compressed bits."""
        store = self.store
        if store is None:
            return {"kept": self.kept}
        store.mark()
        folder = store.folder and store.folder.name
        bits = base64.b64encode(zlib.compress(np.packbits(store.done).tobytes(), 1)).decode()
        return {"kept": self.kept, "folder": folder, "rows": len(store.done), "done": bits}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Have stored what was stored then, as far as it is still there."""
        store = self.store
        if state.get("kept") != self.kept:
            self._tell(f"features of frozen layers are {self.kept}, and were {state.get('kept')}")
        if store is None or state.get("rows") != len(store.done):
            return
        bits = np.frombuffer(zlib.decompress(base64.b64decode(state["done"])), np.uint8)
        then = np.unpackbits(bits, count=len(store.done)).astype(bool)
        missing = int((then & ~store.done).sum())
        if missing and state.get("folder") is not None:
            self._tell(f"features of {missing:,} rows are no longer stored, and are computed again")
        elif missing:
            self._tell(f"features of {missing:,} rows were in memory, and are computed again")
        elif store.folder is not None and state.get("folder") not in (None, store.folder.name):
            self._tell("features are read from another store")
        store.done &= then

    def _tell(self, what: str) -> None:
        self.say(f"{what}: the next steps may be rounded differently")
