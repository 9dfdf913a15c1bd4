"""The folder of an experiment: its results so far and the settings that produced them.

Each result is a JSON file that is written completely or not at all. An interrupted experiment resumes from
the results that are there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from deltaw import platforms
from deltaw.cache import file_digest
from deltaw.contained import lies_in
from deltaw.data.mixture import references
from deltaw.data.settings import eval_sets, held_out_number, held_out_reference
from deltaw.durable import write_text
from deltaw.errors import UserError
from deltaw.methods import registry
from deltaw.runs.folder import mapping, not_writable
from deltaw.settings import RunConfig, TrainSettings, duration_seconds
from deltaw.training.optimizer import count_steps

# How long a training of a comparison may take at most: in steps, in time, or both.
#
# It knows settings and numbers, and no training.


@dataclass(frozen=True)
class Budget:
    """The most that one training may take; at least one of the two is given.

    Attributes:
        steps: optimizer steps. seconds: on the clock, evaluations included.
    """

    steps: int | None = None
    seconds: float | None = None

    def times(self, share: float) -> Budget:
        """A share of it, at least one step."""
        steps = None if self.steps is None else max(1, round(share * self.steps))
        return Budget(steps, None if self.seconds is None else share * self.seconds)


def budget_of(settings: TrainSettings, rows: int) -> Budget:
    """The budget that the settings give: ``train.time``, if it is set, in place of ``train.epochs``.

    Args:
        rows: that are trained on.
    """
    if settings.time is not None:
        return Budget(settings.max_steps, duration_seconds(settings.time))
    return Budget(count_steps(rows, settings.batch_size, settings.epochs, settings.max_steps))


MARK = "study.json"  # the name is part of the file format
PIECES, LOGS, LOCK = "pieces", "logs", ".lock"
# Settings that no result depends on.
_IRRELEVANT = ("output", "force")


class ExperimentFolder:
    """The folder of one experiment, locked by this process while it is open.

    Args:
        path: the folder; created if it does not exist.
        kind: ``comparison`` or ``tuning``.

    Attributes:
        kept: whether what is in it is worth keeping; else leaving the block deletes the folder if this process
            created it, unless the user interrupted the experiment.

    Raises:
        UserError: the folder cannot be written, holds other files, or is in use by another process.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.kept = path, False
        check_folder(path, kind)
        self._made = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(path / LOCK)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            hint = "wait for it, or set 'output' to another folder"
            raise UserError(f"another process is working on this {kind}", where=str(path), hint=hint) from error
        except OSError as error:
            raise not_writable(path, error) from error
        if not (path / MARK).exists():
            write_text(path / MARK, json.dumps({"kind": kind}) + "\n")

    def log(self, name: str) -> Path:
        """The file for a worker's output."""
        return self.path / LOGS / f"{name}.log"

    def piece(self, name: str) -> dict[str, object]:
        """A stored result; empty if it does not exist or cannot be read."""
        try:
            found = json.loads((self.path / PIECES / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_piece(self, name: str, content: Mapping[str, object]) -> None:
        """Store a result; it is on the disk when this returns."""
        self.write_json(Path(PIECES) / f"{name}.json", content)

    def write_json(self, name: str | Path, content: Mapping[str, object]) -> None:
        write_text(self.path / name, json.dumps(content, ensure_ascii=False, allow_nan=False, indent=2) + "\n")

    def remove(self, run: Path) -> None:
        """Delete an incomplete run inside this folder."""
        if run.is_dir() and self.path in run.parents:
            platforms.removed(run)

    def __enter__(self) -> ExperimentFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._lock.release()
        if self._made and not self.kept and kind is not KeyboardInterrupt:
            shutil.rmtree(self.path, ignore_errors=True)


def check_folder(path: Path, kind: str) -> None:
    """Refuse a folder that holds anything but an experiment of this kind. Changes nothing.

    Raises:
        UserError: the folder holds other files or cannot be read, or Windows cannot have the name.
    """
    platforms.refuse_names(path)
    try:
        holds = sorted(p.name for p in path.iterdir() if p.name != LOCK) if path.exists() else []
        mark = json.loads((path / MARK).read_text(encoding="utf-8")) if MARK in holds else {}
    except OSError as error:
        raise not_writable(path, error) from error
    except ValueError:
        mark = {}
    if holds and mapping(mark).get("kind") != kind:
        what = f"the output folder holds files that are not a {kind}'s, such as '{holds[0]}'"
        raise UserError(what, where=str(path), hint="set 'output' to a new or empty folder")


def require_held_out(config: RunConfig) -> None:
    """Raise a UserError if the settings hold out no rows."""
    if held_out_reference(config.data.eval) is None and held_out_number(config.data.eval) == 0:
        hint = "set data.eval to a share, a number of rows or a file"
        raise UserError("no rows are held out, so methods cannot be scored", where="data.eval", hint=hint)


def settings_of(config: RunConfig, *, without: Collection[str] = ()) -> dict[str, object]:
    """Everything that a result depends on, by dotted key: settings and the content of local files.

    Args:
        without: keys to omit.
    """
    flat: dict[str, object] = {}
    sections = registry.section_names()
    for name, value in config.model_dump(mode="json").items():
        if name in _IRRELEVANT or (name in sections and name != config.method):
            continue
        entries = {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
        flat |= {key: v for key, v in entries.items() if key not in without}
    read: dict[str, str | None] = {"the model's files": config.model}
    files = references(config.data.train)
    read |= {"the file data.train" if len(files) == 1 else f"the file {file}": file for file in files}
    for name, share in eval_sets(config.data.eval).items():
        read[f"the file data.eval{name and '.'}{name}"] = held_out_reference(share)
    for key, reference in read.items():
        if reference is not None and (content := content_of(reference)):
            flat[key] = content
    return json.loads(json.dumps(flat))


def changed(before: object, now: Mapping[str, object]) -> list[str]:
    """One line for each key that differs, with the old and the new value."""
    known, lines = mapping(before), []
    for key in sorted({*known, *now}):
        old, new = known.get(key), now.get(key)
        if old != new:
            lines.append(f"{key} has changed" if key.startswith("the ") else f"{key} was {old!r}, is {new!r}")
    return lines


def content_of(reference: str) -> str:
    """A hash of the content of a local file, or of all files in a folder; empty for any other reference. What
    links outside of the folder lead to is not read: its size and its time of change count."""
    path = Path(os.path.expanduser(reference))
    if not path.is_dir():
        return file_digest(path)[:32] if path.is_file() else ""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        name, of = file.relative_to(path).as_posix(), file.stat()
        content = file_digest(file) if lies_in(path, name) else f"{of.st_size} {of.st_mtime_ns}"
        digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()[:32]
