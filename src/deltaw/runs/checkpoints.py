"""Write, verify, prune and find checkpoints.

Tensors are written between two steps, directly from the memory of the training. A background thread flushes them to
disk. A checkpoint counts once it is durable, and only then are older ones deleted.
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
from typing import Any, BinaryIO, Protocol, TypeAlias

from torch import Tensor

from deltaw import platforms
from deltaw.atomic_files import apply_umask, sync_file, sync_folder
from deltaw.errors import UserError
from deltaw.tensor_files import TensorFile, write_tensors
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.state import TrainState

JSONMap: TypeAlias = Mapping[str, object]

# A checkpoint is a folder with tensors in safetensors, plain values in JSON, and a manifest of checksums. It is written
# under a temporary name, flushed and renamed, so a folder with a checkpoint's name is complete. It is verified when it
# is read nevertheless. Tensors are written, hashed and read one by one, so a large state is never copied in memory.
# Pickle is not used.


VALUES = "state.json"
TENSORS = "state.safetensors"
MANIFEST = "manifest.json"
# Version of the format. Increased if older checkpoints cannot be read.
VERSION = 1
PREFIX = "step-"
# Hidden name prefixes of folders that are being written or deleted. A killed process may leave them behind.
PARTIAL = ".partial-"
DELETED = ".deleted-"
_CHUNK = 4 * 2**20


class DamagedCheckpoint(Exception):
    """Raised for a folder that is not a complete checkpoint, with the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """Verified checkpoint.

    Attributes:
        path: Folder of the checkpoint.
        step: Number of optimizer steps done.
        values: Content of ``state.json``.
        tensors: Tensors by name, read lazily from the file.
    """

    path: Path
    step: int
    values: dict[str, Any]
    tensors: Mapping[str, Tensor]


class CheckpointWriter:
    """Checkpoint with written files that has not been flushed or renamed yet."""

    def __init__(self, temporary: Path, target: Path) -> None:
        self._temporary = temporary
        self.target = target

    def publish(self) -> Path:
        """Flush the files and rename the folder, replacing a checkpoint of the same name.

        Raises:
            OSError: If the disk is full or fails. The files are removed then.
        """
        try:
            for name in (TENSORS, VALUES, MANIFEST):
                sync_file(self._temporary / name)
            sync_folder(self._temporary)
            if self.target.exists():
                delete_checkpoint(self.target)
            platforms.rename_path(self._temporary, self.target)
            sync_folder(self.target.parent)
        except BaseException:
            shutil.rmtree(self._temporary, ignore_errors=True)
            raise
        return self.target


def folder_name(step: int) -> str:
    """Return the folder name of a checkpoint."""
    return f"{PREFIX}{step:06d}"


def parse_step(name: str) -> int | None:
    """Return the step of a checkpoint's folder name, or None for other names."""
    digits = name.removeprefix(PREFIX)
    return int(digits) if name.startswith(PREFIX) and digits.isascii() and digits.isdigit() else None


def write_checkpoint(parent: Path, step: int, values: JSONMap, tensors: Mapping[str, Tensor]) -> CheckpointWriter:
    """Write the files of a checkpoint below ``parent``. It counts after :meth:`CheckpointWriter.publish`.

    Args:
        values: Values for JSON.
        tensors: Tensors on any device, copied to the CPU one at a time.

    Raises:
        OSError: If the disk is full or the folder is not writable. The files are removed then.
    """
    parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{folder_name(step)}-", dir=parent))
    try:
        with (temporary / TENSORS).open("wb") as file:
            hashed_tensors = _HashingWriter(file)
            write_tensors(hashed_tensors, tensors, {"format": "pt"})
            files = {TENSORS: hashed_tensors.entry()}
        text = json.dumps({"step": step, **values}, indent=1, ensure_ascii=False, allow_nan=False)
        with (temporary / VALUES).open("wb") as file:
            hashed_text = _HashingWriter(file)
            hashed_text.write(text.encode())
            files[VALUES] = hashed_text.entry()
        manifest = json.dumps({"version": VERSION, "step": step, "files": files}, indent=1)
        (temporary / MANIFEST).write_text(manifest + "\n", encoding="utf-8", newline="\n")
        apply_umask(temporary, 0o777)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return CheckpointWriter(temporary, parent / folder_name(step))


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read and completely verify the checkpoint in ``folder``.

    Raises:
        DamagedCheckpoint: If a file is missing, truncated, changed or invalid.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["version"] != VERSION:
            raise DamagedCheckpoint(f"{MANIFEST} has version {manifest['version']}, not {VERSION}")
        for name in (VALUES, TENSORS):  # check sizes first, which is fast
            expected_size = manifest["files"][name]["bytes"]
            file_size = (folder / name).stat().st_size
            if file_size != expected_size:
                raise DamagedCheckpoint(f"{name} has {file_size:,} bytes instead of {expected_size:,}")
        for name in (VALUES, TENSORS):
            if _digest(folder / name) != manifest["files"][name]["sha256"]:
                raise DamagedCheckpoint(f"the checksum of {name} is wrong")
        values = json.loads((folder / VALUES).read_text(encoding="utf-8"))
        step = values["step"]
        if type(step) is not int or step != manifest["step"] or step != parse_step(folder.name):
            raise DamagedCheckpoint(f"it is the state of step {step}")
        return Checkpoint(folder, step, values, TensorFile(folder / TENSORS))
    except OSError as error:
        raise DamagedCheckpoint(f"{error.strerror or error}: {Path(error.filename or '').name}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"its files are not those of a checkpoint ({type(error).__name__})") from error


def delete_checkpoint(folder: Path) -> None:
    """Rename a checkpoint and delete it, so that an incomplete one is never found under its name."""
    hidden = folder.with_name(f"{DELETED}{folder.name}-{os.getpid()}")
    platforms.rename_path(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def clear_leftovers(parent: Path) -> None:
    """Remove partially written or deleted checkpoints of killed processes. No other process may be writing."""
    for path in [p for mark in (PARTIAL, DELETED) for p in parent.glob(f"{mark}*")]:
        shutil.rmtree(path, ignore_errors=True)


class _HashingWriter:
    """Writes to a file and computes the hash of its content."""

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
        """Return the file's entry in the manifest."""
        self._file.flush()
        return {"sha256": self._digest.hexdigest(), "bytes": self._bytes}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# Keys and types of a checkpoint's values. The last four describe the start of the run.
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
    """State that changes during a training and must be restored when it is resumed."""

    def state(self) -> dict[str, Any]:
        """Return a copy of the state as plain values for JSON."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state returned by :meth:`state`."""


@dataclass(eq=False)
class Checkpoints:
    """Checkpoints of a run.

    Args:
        folder: Folder of the checkpoints, created with the first one.
        every: Steps between checkpoints, or None.
        minutes: Minutes between checkpoints, or None.
        num_latest: Number of latest checkpoints to keep, in addition to the one with the best evaluation.
        common_values: Values stored in every checkpoint: ``settings``, ``choices``, ``rows`` and ``model``.
        extras: Additional state by name.
        sync: Called before writing. Flushes related files and returns the number of metrics lines.
        durable: Called between two steps when a checkpoint has been flushed to disk.

    Attributes:
        enabled: True if checkpoints are written.
        last: Newest written checkpoint, durable or not, or None.
    """

    folder: Path
    every: int | None
    minutes: float | None
    num_latest: int
    common_values: dict[str, object]
    extras: Mapping[str, Stateful] = field(default_factory=dict)
    sync: Callable[[], int] = lambda: 0
    durable: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.enabled = self.every is not None or self.minutes is not None
        self.last: Path | None = None
        self._state: TrainState | None = None
        self._best: tuple[float, int] | None = None
        self._written_step: int | None = None
        self._last_write = time.monotonic()
        self._executor: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def start(self, state: TrainState) -> None:
        """Prepare for the first step. ``state`` is updated during the training."""
        self._state = state
        self._last_write = time.monotonic()

    def resume_from(self, checkpoint: Checkpoint) -> None:
        """Register the checkpoint that the training resumes from, and restore the additional state.

        Raises:
            KeyError, TypeError, ValueError: If its content is invalid.
        """
        self.last = checkpoint.path
        self._written_step = checkpoint.step
        if (best := checkpoint.values["best"]) is not None:
            self._best = (float(best["rank"]), int(best["step"]))
        for name, extra in self.extras.items():
            if name in checkpoint.values["extras"]:
                extra.restore(checkpoint.values["extras"][name])

    def clear(self, after: int) -> None:
        """Remove incomplete checkpoints of killed processes, and checkpoints after a step."""
        if not self.enabled and not self.folder.is_dir():
            return
        clear_leftovers(self.folder)
        for step in _steps_in(self.folder):
            if step > after:
                delete_checkpoint(self.folder / folder_name(step))

    def evaluated(self, step: int, evaluation: Evaluation) -> bool:
        """Record the evaluation after a step. Returns True if it is the best so far."""
        value = evaluation.metrics.get(evaluation.main, math.nan)
        rank = value if evaluation.higher_is_better else -value
        if not math.isfinite(rank) or (self._best is not None and rank <= self._best[0]):
            return False
        self._best = (rank, step)
        return True

    def step_done(self, best: bool = False) -> None:
        """Write a checkpoint if one is due, and report failures of the previous one. Call this after each step.

        Args:
            best: The last evaluation was the best so far.

        Raises:
            UserError: If the disk is full or fails.
        """
        self.check()
        state = self._state
        if state is None or not self.enabled:
            return
        by_steps = self.every is not None and state.step % self.every == 0
        by_time = self.minutes is not None and time.monotonic() - self._last_write >= 60 * self.minutes
        if by_steps or by_time or best or state.step == state.total_steps:
            self.write()

    def write(self) -> None:
        """Write a checkpoint of the current step unless it exists. Call this between two steps, or after the last one.

        Raises:
            UserError: If the disk is full or fails.
        """
        self.check(until_durable=True)
        state = self._state
        if state is None or not self.enabled or state.step == self._written_step:
            return
        step = state.step
        try:
            lines = self.sync()
            saved = state.view()
            values = {**self.common_values, "training": saved.values, "metrics_lines": lines, **self.extra_state()}
            writer = write_checkpoint(self.folder, step, values, saved.tensors)
        except OSError as error:
            raise self._cannot_write(step, error) from error
        self._written_step = step
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending = self._executor.submit(self._finish, writer, step)
        self._last_write = time.monotonic()

    def extra_state(self) -> dict[str, Any]:
        """Return the checkpoint values other than the training state: ``best`` and ``extras``."""
        best = None if self._best is None else {"rank": self._best[0], "step": self._best[1]}
        return {"best": best, "extras": {name: extra.state() for name, extra in self.extras.items()}}

    def check(self, *, until_durable: bool = False) -> None:
        """Check the result of the last write.

        Args:
            until_durable: Wait until it is finished.

        Raises:
            UserError: If the checkpoint could not be written.
        """
        pending = self._pending
        if pending is None or not (until_durable or pending.done()):
            return
        self._pending = None
        try:
            pending.result()
        except OSError as error:
            step = self._written_step or 0
            self._written_step = None
            raise self._cannot_write(step, error) from error
        self.durable()

    def wait_for_last(self) -> Path | None:
        """Wait for a pending write and return the newest checkpoint."""
        if self._pending is not None:
            wait([self._pending])
        return self.last

    def close(self) -> None:
        """Wait until the last checkpoint is durable, and stop the thread.

        Raises:
            UserError: If the checkpoint could not be written.
        """
        try:
            self.check(until_durable=True)
            if self._written_step is not None and self.enabled:
                self._delete_others(self._written_step)  # the last evaluation may have changed the best checkpoint
        finally:
            if self._executor is not None:
                self._executor.shutdown()
                self._executor = None

    def _finish(self, writer: CheckpointWriter, step: int) -> None:
        """Flush a checkpoint, then delete those that it replaces. Runs in the background thread."""
        self.last = writer.publish()
        self._delete_others(step)

    def _delete_others(self, step: int) -> None:
        """Delete all checkpoints except the latest ones, the best one, and that of ``step``."""
        steps = sorted(_steps_in(self.folder), reverse=True)
        retained = set(steps[: self.num_latest]) | {step}
        if self._best is not None:
            retained.add(self._best[1])
        for candidate in steps:
            if candidate not in retained:
                # Windows cannot delete files that are open in another program. The next checkpoint retries.
                with contextlib.suppress(*([PermissionError] if platforms.WINDOWS else [])):
                    delete_checkpoint(self.folder / folder_name(candidate))

    def _cannot_write(self, step: int, error: OSError) -> UserError:
        resume_hint = "" if self.last is None else f": it resumes from {self.last.name}"
        message = f"the checkpoint of step {step} cannot be written: {error.strerror or error}"
        return UserError(message, location=str(self.folder), hint=f"free some space and rerun the command{resume_hint}")


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first, without verification."""
    return [folder / folder_name(step) for step in sorted(_steps_in(folder))]


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """Return the newest valid checkpoint in a folder, and newer damaged ones with the reasons."""
    damaged: list[tuple[Path, str]] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            checkpoint = read_checkpoint(path)
            for key, kind in _KEYS.items():
                if key not in checkpoint.values or not isinstance(checkpoint.values[key], kind):
                    raise DamagedCheckpoint(f"it has no '{key}' of a run, so another program wrote it")
            return checkpoint, damaged
        except DamagedCheckpoint as error:
            damaged.append((path, str(error)))
    return None, damaged


def _steps_in(folder: Path) -> list[int]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return [step for path in paths if (step := parse_step(path.name)) is not None and path.is_dir()]
