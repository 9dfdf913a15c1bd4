"""Store the results of an experiment and the settings that they depend on.

Each result is an atomically written JSON file, so an interrupted experiment can be resumed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from deltaw import platforms
from deltaw.atomic_files import write_text
from deltaw.cache.results import file_digest
from deltaw.errors import UserError
from deltaw.hub.app_stores import find_stored_model, is_store_reference
from deltaw.hub.outside_references import read_json_object
from deltaw.runs.folder import mapping, not_writable_error
from deltaw.settings import method_registry
from deltaw.settings.config import RunConfig, TrainSettings, duration_seconds
from deltaw.settings.data import eval_reference, eval_sets, eval_size
from deltaw.settings.mixture import references
from deltaw.settings.model_parts import parse_parts
from deltaw.training.optimizer import count_steps
from deltaw.untrusted_paths import is_inside


@dataclass(frozen=True)
class Budget:
    """Limit of a training in steps, in time, or both.

    Attributes:
        steps: Maximum number of optimizer steps.
        seconds: Maximum wall time in seconds, including evaluations.
    """

    steps: int | None = None
    seconds: float | None = None

    def times(self, share: float) -> Budget:
        """Return a share of the budget, at least one step."""
        steps = None if self.steps is None else max(1, round(share * self.steps))
        return Budget(steps, None if self.seconds is None else share * self.seconds)


def budget_from_settings(settings: TrainSettings, rows: int) -> Budget:
    """Return the budget of the settings: ``train.time`` if it is set, else ``train.epochs``, and ``train.max_steps``.

    Args:
        rows: Number of training rows.
    """
    if settings.time is not None:
        return Budget(settings.max_steps, duration_seconds(settings.time))
    return Budget(count_steps(rows, settings.batch_size, settings.epochs, settings.max_steps))


MARK = "study.json"  # the name is part of the file format
PIECES = "pieces"
LOGS = "logs"
LOCK = ".lock"
# Settings that do not affect results.
_IRRELEVANT = ("output", "force")


class ExperimentFolder(contextlib.AbstractContextManager["ExperimentFolder"]):
    """Folder of an experiment with an exclusive lock. A context manager.

    Args:
        path: Folder, created if it does not exist.
        kind: ``comparison``, ``tuning`` or ``chain``.

    Attributes:
        has_results: True if the folder contains results. Otherwise, a folder created by this process is deleted on
            exit, unless the user interrupted the experiment.

    Raises:
        UserError: If the folder is not writable, contains other files, or is in use by another process.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self.has_results = False
        check_folder(path, kind)
        for name in (PIECES, LOGS):
            if (path / name).is_symlink():
                raise UserError("a folder of results is a link", location=str(path / name), hint="remove it")
        self._created = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(path / LOCK)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            hint = "wait for it, or set 'output' to another folder"
            raise UserError(f"another process is working on this {kind}", location=str(path), hint=hint) from error
        except OSError as error:
            raise not_writable_error(path, error) from error
        if not (path / MARK).exists():
            write_text(path / MARK, json.dumps({"kind": kind}) + "\n")

    def log(self, name: str) -> Path:
        """Return the path of a worker's log file."""
        return self.path / LOGS / f"{name}.log"

    def piece(self, name: str) -> dict[str, object]:
        """Return a stored result, or an empty dictionary if it does not exist or cannot be read."""
        return read_json_object(self.path / PIECES / f"{name}.json")

    def write_piece(self, name: str, content: Mapping[str, object]) -> None:
        """Store a result on disk."""
        self.write_json(Path(PIECES) / f"{name}.json", content)

    def write_json(self, name: str | Path, content: Mapping[str, object]) -> None:
        try:
            write_text(self.path / name, json.dumps(content, ensure_ascii=False, allow_nan=False, indent=2) + "\n")
        except OSError as error:
            raise not_writable_error(self.path, error) from error

    def remove(self, run: Path) -> None:
        """Delete an incomplete run inside this folder."""
        if run.is_dir() and self.path in run.parents:
            platforms.remove_path(run)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._lock.release()
        if self._created and not self.has_results and kind is not KeyboardInterrupt:
            shutil.rmtree(self.path, ignore_errors=True)


def check_folder(path: Path, kind: str) -> None:
    """Check that a folder is empty or contains an experiment of this kind, without side effects.

    Raises:
        UserError: If the folder contains other files, cannot be read, or has a name reserved by Windows.
    """
    platforms.reject_reserved_names(path)
    try:
        names = sorted(p.name for p in path.iterdir() if p.name != LOCK) if path.exists() else []
    except OSError as error:
        raise not_writable_error(path, error) from error
    if names and read_json_object(path / MARK).get("kind") != kind:
        message = f"the output folder contains files that are not a {kind}'s, such as '{names[0]}'"
        raise UserError(message, location=str(path), hint="set 'output' to a new or empty folder")


def require_held_out(config: RunConfig) -> None:
    """Raise a UserError if no rows are held out."""
    if eval_reference(config.data.eval) is None and eval_size(config.data.eval) == 0:
        hint = "set data.eval to a share, a number of rows or a file"
        raise UserError("no rows are held out, so methods cannot be scored", location="data.eval", hint=hint)


def result_settings(config: RunConfig, *, without: Collection[str] = ()) -> dict[str, object]:
    """Return everything that results depend on by dotted key: settings, and hashes of local files.

    Args:
        without: Keys to omit.
    """
    flat: dict[str, object] = {}
    sections = method_registry.section_names()
    for name, value in config.model_dump(mode="json").items():
        if name in _IRRELEVANT or (name in sections and name != config.method):
            continue
        entries = {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
        flat |= {key: v for key, v in entries.items() if key not in without}
    local_references: dict[str, str | None] = {"the model's files": config.model}
    files = references(config.data.train)
    local_references |= {"the file data.train" if len(files) == 1 else f"the file {file}": file for file in files}
    for name, share in eval_sets(config.data.eval).items():
        local_references[f"the file data.eval{name and '.'}{name}"] = eval_reference(share)
    for key, reference in local_references.items():
        if reference is not None and (content := content_hash(reference)):
            flat[key] = content
    return json.loads(json.dumps(flat))


def describe_changes(before: object, now: Mapping[str, object]) -> list[str]:
    """Return one line for each key that differs, with the old and the new value."""
    old_settings = mapping(before)
    lines = []
    for key in sorted({*old_settings, *now}):
        old = old_settings.get(key)
        new = now.get(key)
        if old != new:
            lines.append(f"{key} has changed" if key.startswith("the ") else f"{key} was {old!r}, is {new!r}")
    return lines


def content_hash(reference: str) -> str:
    """Return a hash of a local file or of all files in a folder, or '' for other references.

    The target of a link that points outside of the folder is not read. Its size and modification time are hashed
    instead.
    """
    if (parts := parse_parts(reference)) is not None:
        return content_hash(parts.language) + content_hash(parts.vision)
    path = Path(os.path.expanduser(reference))
    if is_store_reference(reference):
        path = find_stored_model(reference).path
    if not path.is_dir():
        return file_digest(path)[:32] if path.is_file() else ""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        name = file.relative_to(path).as_posix()
        status = file.stat()
        content = file_digest(file) if is_inside(path, name) else f"{status.st_size} {status.st_mtime_ns}"
        digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()[:32]
