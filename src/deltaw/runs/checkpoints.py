"""A checkpoint on disk, when a training writes one, which of them are kept, and which one a later run goes on from.

The tensors are written between two steps, straight from the training's own memory; flushing them to the disk,
which takes longer, is left to a thread. A checkpoint counts once it is durable, and only then are older ones
deleted.

It knows a training's state and what others want kept with it; not what a run is told.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from torch import Tensor

from deltaw import platforms
from deltaw.durable import open_to_all, sync_file, sync_folder
from deltaw.errors import UserError
from deltaw.tensor_files import TensorFile, write_tensors
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.state import TrainState

# A checkpoint on disk: tensors in safetensors, plain values in JSON, and a manifest of checksums.
#
# A checkpoint is a folder. It is written under a temporary name, flushed, and renamed, so that a folder with a
# checkpoint's name is whole; it is verified all the same when it is read. Tensors are written one by one while
# they are hashed, and read one by one, so that a large state is never in memory twice. Nothing is pickled.
#
# Knows tensors by name and values by key; not what a training is.


VALUES, TENSORS, MANIFEST = "state.json", "state.safetensors", "manifest.json"
# Of the layout of the folder; another number where an older one could not be read.
VERSION = 1
PREFIX = "step-"
# Hidden names of what is being written, and of what is being deleted; left by a process that was killed.
PARTIAL, DELETED = ".partial-", ".deleted-"
_CHUNK = 4 * 2**20


class DamagedCheckpoint(Exception):
    """A folder is not a whole checkpoint; the message says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was verified.

    Attributes:
        path: its folder. step: optimizer steps done.
        values: what ``state.json`` holds. tensors: by name, each read from the file when it is asked for.
    """

    path: Path
    step: int
    values: dict[str, Any]
    tensors: Mapping[str, Tensor]


class Draft:
    """A checkpoint that is written, but neither flushed nor under its name yet."""

    def __init__(self, temporary: Path, target: Path) -> None:
        self._temporary = temporary
        self.target = target

    def publish(self) -> Path:
        """Flush the files and give the folder its name; a checkpoint of this name is replaced.

        Raises:
            OSError: the disk is full or fails; nothing is left then.
        """
        try:
            for name in (TENSORS, VALUES, MANIFEST):
                sync_file(self._temporary / name)
            sync_folder(self._temporary)
            if self.target.exists():
                delete(self.target)
            platforms.renamed(self._temporary, self.target)
            sync_folder(self.target.parent)
        except BaseException:
            shutil.rmtree(self._temporary, ignore_errors=True)
            raise
        return self.target


def name_of(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"{PREFIX}{step:06d}"


def step_of(name: str) -> int | None:
    """The step that a folder's name tells; None where it is no checkpoint's."""
    digits = name.removeprefix(PREFIX)
    return int(digits) if name.startswith(PREFIX) and digits.isascii() and digits.isdigit() else None


def write(parent: Path, step: int, values: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Draft:
    """Write a checkpoint's files below ``parent``; they count once they are published.

    Args:
        values: ready for JSON. tensors: on any device; each is brought to the processor when its turn comes.

    Raises:
        OSError: the disk is full, or the folder cannot be written; nothing is left then.
    """
    parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{name_of(step)}-", dir=parent))
    try:
        with (temporary / TENSORS).open("wb") as file:
            hashed_tensors = _Hashing(file)
            write_tensors(hashed_tensors, tensors, {"format": "pt"})
            files = {TENSORS: hashed_tensors.entry()}
        text = json.dumps({"step": step, **values}, indent=1, ensure_ascii=False, allow_nan=False)
        with (temporary / VALUES).open("wb") as file:
            hashed_text = _Hashing(file)
            hashed_text.write(text.encode())
            files[VALUES] = hashed_text.entry()
        manifest = json.dumps({"version": VERSION, "step": step, "files": files}, indent=1)
        (temporary / MANIFEST).write_text(manifest + "\n", encoding="utf-8", newline="\n")
        open_to_all(temporary, 0o777)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Draft(temporary, parent / name_of(step))


def read(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder``, every byte of it verified.

    Raises:
        DamagedCheckpoint: a file is missing, cut short, changed or not a checkpoint's.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["version"] != VERSION:
            raise DamagedCheckpoint(f"{MANIFEST} has version {manifest['version']}, not {VERSION}")
        for name in (VALUES, TENSORS):  # sizes first: they show most damage at once
            wanted = manifest["files"][name]["bytes"]
            found = (folder / name).stat().st_size
            if found != wanted:
                raise DamagedCheckpoint(f"{name} has {found:,} bytes instead of {wanted:,}")
        for name in (VALUES, TENSORS):
            if _digest(folder / name) != manifest["files"][name]["sha256"]:
                raise DamagedCheckpoint(f"the checksum of {name} is wrong")
        values = json.loads((folder / VALUES).read_text(encoding="utf-8"))
        step = values["step"]
        if type(step) is not int or step != manifest["step"] or step != step_of(folder.name):
            raise DamagedCheckpoint(f"it is the state of step {step}")
        return Checkpoint(folder, step, values, TensorFile(folder / TENSORS))
    except OSError as error:
        raise DamagedCheckpoint(f"{error.strerror or error}: {Path(error.filename or '').name}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"its files are not a checkpoint's ({type(error).__name__})") from error


def delete(folder: Path) -> None:
    """Remove a checkpoint: first its name, so that half of one is never found under it."""
    hidden = folder.with_name(f"{DELETED}{folder.name}-{os.getpid()}")
    platforms.renamed(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def clear_leftovers(parent: Path) -> None:
    """Remove what killed processes left half written or half deleted; nobody else may be writing here."""
    for path in [p for mark in (PARTIAL, DELETED) for p in parent.glob(f"{mark}*")]:
        shutil.rmtree(path, ignore_errors=True)


class _Hashing:
    """Writes to a file and hashes what it writes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        for start in range(0, len(data), _CHUNK):
            chunk = data[start : start + _CHUNK]
            self._file.write(chunk)
            self._digest.update(chunk)
            self._bytes += len(chunk)

    def entry(self) -> dict[str, object]:
        """What the manifest says of the file."""
        self._file.flush()
        return {"sha256": self._digest.hexdigest(), "bytes": self._bytes}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# What a checkpoint's values hold, and of which kind; the last four say how the run began.
_KEYS: dict[str, type | tuple[type, ...]] = {
    "training": dict,
    "metrics_lines": int,
    "best": (dict, type(None)),
    "extras": dict,
    "settings": dict,
    "choices": dict,
    "rows": dict,
    "model": (str, type(None)),
}


class Stateful(Protocol):
    """Something that changes over a training and must be as it was when the training goes on."""

    def state(self) -> dict[str, Any]:
        """All of it, as plain values ready for JSON; a copy."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Be as :meth:`state` said."""


@dataclass(eq=False)
class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: that they are in; made with the first.
        every: steps between two; None: by time alone. minutes: between two; None: by steps alone.
        keep: of the last ones. The one with the best evaluation is kept as well.
        about: what every checkpoint of the run holds: ``settings``, ``choices``, ``rows`` and ``model``.
        extras: by name, whose state is written with the training's.
        sync: called before one is written; makes durable what belongs to it, and returns the number of lines
            that the metrics have.
        durable: called between two steps once one is on the disk.

    Attributes:
        enabled: whether any are written at all.
        last: the newest one that was written, durable or not yet; None where there is none.
    """

    folder: Path
    every: int | None
    minutes: float | None
    keep: int
    about: dict[str, object]
    extras: Mapping[str, Stateful] = field(default_factory=dict)
    sync: Callable[[], int] = lambda: 0
    durable: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.enabled = self.every is not None or self.minutes is not None
        self.last: Path | None = None
        self._state: TrainState | None = None
        self._best: tuple[float, int] | None = None
        self._written: int | None = None
        self._since = time.monotonic()
        self._writer: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def begin(self, state: TrainState) -> None:
        """The first step is about to begin; ``state`` stays current."""
        self._state = state
        self._since = time.monotonic()

    def went_on_from(self, found: Checkpoint) -> None:
        """Count a checkpoint that the training goes on from, and restore what it holds for others.

        Raises:
            KeyError, TypeError, ValueError: it holds something else.
        """
        self.last = found.path
        self._written = found.step
        best = found.values["best"]
        if best is not None:
            self._best = (float(best["rank"]), int(best["step"]))
        for name, extra in self.extras.items():
            if name in found.values["extras"]:
                extra.restore(found.values["extras"][name])

    def clear(self, after: int) -> None:
        """Remove what killed processes left half written, and the damaged checkpoints after a step."""
        if not self.enabled and not self.folder.is_dir():
            return
        clear_leftovers(self.folder)
        for step in _steps_in(self.folder):
            if step > after:
                delete(self.folder / name_of(step))

    def evaluated(self, step: int, evaluation: Evaluation) -> bool:
        """Note how well the model did after a step; whether it never did better."""
        value = evaluation.metrics.get(evaluation.main, math.nan)
        rank = value if evaluation.higher_is_better else -value
        if not math.isfinite(rank) or (self._best is not None and rank <= self._best[0]):
            return False
        self._best = (rank, step)
        return True

    def step_done(self, best: bool = False) -> None:
        """Call after each step and what follows it: writes a checkpoint where one is due, and ends the
        training where the last one could not be written.

        Args:
            best: whether the model was just found to be better than ever.

        Raises:
            UserError: the disk is full or fails.
        """
        self.check()
        state = self._state
        if state is None or not self.enabled:
            return
        by_steps = self.every is not None and state.step % self.every == 0
        by_time = self.minutes is not None and time.monotonic() - self._since >= 60 * self.minutes
        if by_steps or by_time or best or state.step == state.total_steps:
            self.write()

    def write(self) -> None:
        """Write a checkpoint now, unless there is one of this step; between two steps, or after the last.

        Raises:
            UserError: the disk is full or fails.
        """
        self.check(until_durable=True)
        state = self._state
        if state is None or not self.enabled or state.step == self._written:
            return
        step = state.step
        try:
            lines = self.sync()
            saved = state.view()
            values = {**self.about, "training": saved.values, "metrics_lines": lines, **self.beside()}
            draft = write(self.folder, step, values, saved.tensors)
        except OSError as error:
            raise self._cannot_write(step, error) from error
        self._written = step
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending = self._writer.submit(self._finish, draft, step)
        self._since = time.monotonic()

    def beside(self) -> dict[str, Any]:
        """What a checkpoint holds besides the training: ``best`` and ``extras``."""
        best = None if self._best is None else {"rank": self._best[0], "step": self._best[1]}
        return {"best": best, "extras": {name: extra.state() for name, extra in self.extras.items()}}

    def check(self, *, until_durable: bool = False) -> None:
        """Learn what became of the last checkpoint.

        Args:
            until_durable: wait for it.

        Raises:
            UserError: it could not be written.
        """
        pending = self._pending
        if pending is None or not (until_durable or pending.done()):
            return
        self._pending = None
        try:
            pending.result()
        except OSError as error:
            step, self._written = self._written or 0, None
            raise self._cannot_write(step, error) from error
        self.durable()

    def settled(self) -> Path | None:
        """The newest checkpoint, once one that is being written is durable or has failed."""
        if self._pending is not None:
            wait([self._pending])
        return self.last

    def close(self) -> None:
        """Wait until the last checkpoint is durable, and end the thread.

        Raises:
            UserError: it could not be written.
        """
        try:
            self.check(until_durable=True)
            if self._written is not None and self.enabled:
                self._delete_others(self._written)  # the last evaluation may have found another one best
        finally:
            if self._writer is not None:
                self._writer.shutdown()
                self._writer = None

    def _finish(self, draft: Draft, step: int) -> None:
        """In the thread: make a checkpoint durable, then delete those that it replaces."""
        self.last = draft.publish()
        self._delete_others(step)

    def _delete_others(self, step: int) -> None:
        """Delete the checkpoints that are neither among the last ones, nor the best, nor that of a step."""
        there = sorted(_steps_in(self.folder), reverse=True)
        kept = set(there[: self.keep]) | {step}
        if self._best is not None:
            kept.add(self._best[1])
        for other in there:
            if other not in kept:
                # Windows keeps one that another program reads; the next checkpoint's turn comes soon.
                with contextlib.suppress(*([PermissionError] if platforms.WINDOWS else [])):
                    delete(self.folder / name_of(other))

    def _cannot_write(self, step: int, error: OSError) -> UserError:
        before = "" if self.last is None else f": it goes on from {self.last.name}"
        what = f"the checkpoint of step {step} cannot be written: {error.strerror or error}"
        return UserError(what, where=str(self.folder), hint=f"make room there and run the same command again{before}")


def listed(folder: Path) -> list[Path]:
    """The checkpoints in a folder by name, the oldest first; they are not verified."""
    return [folder / name_of(step) for step in sorted(_steps_in(folder))]


def newest(folder: Path) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """The newest whole checkpoint in a folder, and the damaged ones that are newer, with what is wrong."""
    damaged: list[tuple[Path, str]] = []
    for path in reversed(listed(folder)):
        try:
            found = read(path)
            for key, kind in _KEYS.items():
                if key not in found.values or not isinstance(found.values[key], kind):
                    raise DamagedCheckpoint(f"it has no '{key}' of a run, so another program wrote it")
            return found, damaged
        except DamagedCheckpoint as error:
            damaged.append((path, str(error)))
    return None, damaged


def _steps_in(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    found = [(step_of(path.name), path) for path in folder.iterdir()]
    return [step for step, path in found if step is not None and path.is_dir()]
