"""A checkpoint on disk: tensors in safetensors, plain values in JSON, and a manifest of checksums.

A checkpoint is a folder. It is written under a temporary name, flushed, and renamed, so that a folder with a
checkpoint's name is whole; it is verified all the same when it is read. Tensors are written one by one while
they are hashed, and read one by one, so that a large state is never in memory twice. Nothing is pickled.

Knows tensors by name and values by key; not what a training is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from deltaw.durable import sync_folder
from deltaw.tensor_files import TensorFile, write_tensors

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
                with (self._temporary / name).open("rb") as file:
                    os.fsync(file.fileno())
            sync_folder(self._temporary)
            if self.target.exists():
                delete(self.target)
            self._temporary.rename(self.target)
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
        files = {}
        with (temporary / TENSORS).open("wb") as file:
            files[TENSORS] = _write_tensors(file, tensors)
        text = json.dumps({"step": step, **values}, indent=1, ensure_ascii=False, allow_nan=False)
        with (temporary / VALUES).open("wb") as file:
            hashing = _Hashing(file)
            hashing.write(text.encode())
            files[VALUES] = hashing.entry()
        manifest = json.dumps({"version": VERSION, "step": step, "files": files}, indent=1)
        (temporary / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
        temporary.chmod(0o777 & ~_umask())
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
    folder.rename(hidden)
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


def _write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """Write them as a safetensors file; returns what the manifest says of it."""
    hashing = _Hashing(file)
    write_tensors(hashing, tensors, {"format": "pt"})
    return hashing.entry()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
