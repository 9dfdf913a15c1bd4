"""A run's folder: what it was told, what it chose, what it measured, and the adapter.

An earlier run in the same folder is renamed, never overwritten. A run that goes on keeps its folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from deltaw.contained import remember_named
from deltaw.data.report import SKIPPED_ROWS, BadRows
from deltaw.durable import replacing, write_text
from deltaw.errors import UserError
from deltaw.settings import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# ---- Whether a run's folder is in use, and how far the run in it came.
#
# Both are in the run's ``checkpoints`` folder: a lock that the system releases when its process ends, however
# it ends, and a small file with the run's settings. Knows no checkpoints.


FOLDER, STATUS, LOCK = "checkpoints", "status.json", ".lock"
VERSION = 1
# What a run may be: being trained (or killed while it was), stopped by a signal or a callback, ended by an
# error that lies outside of it, diverged, or done.
STATES = ("running", "interrupted", "failed", "diverged", "finished")


@dataclass(frozen=True)
class Status:
    """How far a run came.

    Attributes:
        state: of :data:`STATES`. steps: done when this was written.
        total_steps: of the run. settings: as :func:`deltaw.training.resuming.dumped`.
        features: of :class:`deltaw.training.features.store.FeatureRecord` before the first step.
        finished: ``steps`` at which the run was done once, ``lines`` of its metrics then, and what
            :meth:`deltaw.training.checkpoints.Checkpoints.beside` gave; None where it never was.
        process: the id of the process that wrote this.
    """

    state: str
    steps: int
    total_steps: int
    settings: Mapping[str, Any]
    features: Mapping[str, Any] = field(default_factory=dict)
    finished: Mapping[str, Any] | None = None
    process: int = field(default_factory=os.getpid)

    def write(self, run: Path) -> None:
        """Write it into a run's folder.

        Raises:
            UserError, OSError: it cannot be written.
        """
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=1, ensure_ascii=False)
        write_text(run / FOLDER / STATUS, text + "\n")


def read_status(run: Path) -> Status | None:
    """How far the run in a folder came; None where no run is there, or none that says so."""
    try:
        values = json.loads((run / FOLDER / STATUS).read_text(encoding="utf-8"))
        if values.pop("version") != VERSION:
            return None
        status = Status(**values)
        fits = status.state in STATES and isinstance(status.settings, dict)
        whole = fits and type(status.steps) is int and type(status.process) is int
        return status if whole else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


class RunLock:
    """A run's folder, taken by this process until it is released or the process ends.

    Raises:
        UserError: another process has it, or the folder cannot be written.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        try:
            (run / FOLDER).mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(run / FOLDER / LOCK, timeout=0, thread_local=False)
            self._lock.acquire()
        except Timeout as error:
            raise self._in_use() from error
        except OSError as error:
            raise UserError(
                f"cannot write into the output folder: {error.strerror or error}",
                where=str(run),
                hint="set 'output' to a folder that you may write to",
            ) from error

    def release(self) -> None:
        """Let others have the folder."""
        self._lock.release()

    def _in_use(self) -> UserError:
        status = read_status(self._run)
        who = "another process" if status is None else f"process {status.process}"
        return UserError(
            f"{who} is training into this folder",
            where=str(self._run),
            hint="wait until it is done, stop it, or set 'output' to another folder",
        )


# ---- How a run ends that cannot go on: with what happened, what to do, and where it goes on from.
#
# Errors of the machine (memory, disk) become errors with a hint; anything else stays what it is. Knows errors;
# not what was being done.


_OF_THE_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would become larger than allowed",
    errno.EROFS: "the file system has become read-only",
    errno.EIO: "the disk fails to read or write",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOENT: "a file or folder has disappeared",
    errno.ENODEV: "a device has disappeared",
    errno.ESTALE: "a network folder has disappeared",
}
# How torch's allocator of main memory says that there is none, on Linux and on Windows.
_NO_MEMORY = ("DefaultCPUAllocator", "not enough memory", "Cannot allocate memory")


@contextlib.contextmanager
def clear_end(run: Path, *, where: Callable[[], str], last: Callable[[], Path | None]) -> Iterator[None]:
    """While open, errors of the machine become errors that say what to do.

    Args:
        run: the folder that is written to.
        where: the place in the training, asked when something happens.
        last: the newest checkpoint; None where there is none.

    Raises:
        UserError: the machine has no memory or no room on the disk, or a file is gone.
    """
    try:
        yield
    except UserError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise UserError(
            f"the machine has no memory left: {_first_line(error)}",
            where=where(),
            hint="lower train.tokens_per_pass, set train.checkpointing: true, or train fewer parameters; "
            + _goes_on(last()),
        ) from error
    except (OSError, SafetensorError) as error:
        what = _disk_error(error)
        if what is None:
            raise
        file = getattr(error, "filename", None)
        raise UserError(
            f"{what}, and the run cannot go on",
            where=str(file or run),
            hint=f"make it writable again, with room to spare; {_goes_on(last())}",
        ) from error


def _goes_on(last: Path | None) -> str:
    if last is None:
        return "the run has no checkpoint yet, and begins again with its first step"
    return f"the same command goes on from {last.name}"


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(sign in str(error) for sign in _NO_MEMORY)


def _disk_error(error: Exception) -> str | None:
    """What an error of the disk means; None where it is none of these."""
    if isinstance(error, OSError):
        return _OF_THE_DISK.get(error.errno or 0)
    number = str(error).rpartition("os error ")[2].partition(")")[0]  # as safetensors writes it
    return _OF_THE_DISK.get(int(number)) if number.isdigit() else None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


# ---- run folder


SETTINGS = "run.yaml"
METRICS = "metrics.jsonl"
# How names end of what is being written; deltaw.durable gives the same to its files.
PARTIAL = ".part"
# Bytes of a file's or folder's name on the usual file systems.
_LONGEST_NAME = 255


class RunFolder:
    """The folder that a run is written to.

    Args:
        path: made where it does not exist.
        lock: of the folder, where it was taken already; else it is taken now.
        lines_kept: of the metrics, for a run that goes on in its folder; None for a new run.

    Attributes:
        moved: where an earlier run in this folder went; None where there was none.
        lines: that the metrics have.

    Raises:
        UserError: the folder cannot be written, is in use, or holds something that is not a run.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, lock: RunLock | None = None, lines_kept: int | None = None
    ) -> None:
        self.path = Path(path)
        goes_on = lines_kept is not None
        self._lock = lock
        check_output(self.path, goes_on=goes_on)
        self.moved = None if goes_on else self._rename_earlier()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _not_writable(self.path, error) from error
        if self._lock is None or self.moved is not None:
            # The folder that was moved took its lock along.
            taken = RunLock(self.path)
            if self._lock is not None:
                self._lock.release()
            self._lock = taken
        try:
            self._clear_leftovers()
            self.lines = self._cut_metrics(lines_kept or 0)
            # Not buffered: a line that found no room is not tried again when the file is closed.
            self._metrics = (self.path / METRICS).open("ab", buffering=0)
        except OSError as error:
            self._lock.release()
            raise _not_writable(self.path, error) from error

    def _clear_leftovers(self) -> None:
        for file in [file for file in self.path.iterdir() if _is_leftover(file)]:
            if file.is_dir():
                shutil.rmtree(file)
            else:
                file.unlink()

    def _cut_metrics(self, kept: int) -> int:
        """Leave the first lines of the metrics; how many there are."""
        path = self.path / METRICS
        whole = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        lines = [line for line in whole.splitlines(keepends=True)[:kept] if line.endswith("\n")]
        if "".join(lines) != whole:
            write_text(path, "".join(lines))
        return len(lines)

    def _rename_earlier(self) -> Path | None:
        if not self.path.is_dir() or not _belongs_to_a_run(self.path):
            return None
        number = 1
        while (renamed := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        try:
            self.path.rename(renamed)
        except OSError as error:
            raise UserError(
                f"cannot rename the earlier run: {error.strerror or error}",
                where=str(self.path),
                hint="set 'output' to another folder",
            ) from error
        return renamed

    def write_settings(self, config: RunConfig, chosen: Mapping[str, tuple[object, str]]) -> None:
        """``run.yaml`` with every value; ``chosen`` gives, by dotted key, what ``auto`` became and why."""
        write_text(self.path / SETTINGS, settings_text(config, chosen))
        remember_settings(config)

    def write_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """The tokenizer with its chat template, so that whoever has the folder renders as the run did."""
        with tempfile.TemporaryDirectory(prefix=".tokenizer.", suffix=PARTIAL, dir=self.path) as made:
            tokenizer.save_pretrained(made)
            for file in (p for p in Path(made).rglob("*") if p.is_file()):
                with replacing(self.path / file.relative_to(made)) as temporary:
                    shutil.copyfile(file, temporary)

    def write_skipped(self, skipped: BadRows | None) -> None:
        """The rows that cannot be used, where there are any."""
        if skipped:
            skipped.write(self.path / SKIPPED_ROWS)

    def write_metrics(self, line: Mapping[str, object]) -> None:
        """One more line of ``metrics.jsonl``; it is in the file when this returns."""
        text = (json.dumps(line) + "\n").encode()
        if self._metrics.write(text) != len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(self.path / METRICS))
        self.lines += 1

    def sync_metrics(self) -> int:
        """Bring the metrics to the disk; how many lines they have."""
        os.fsync(self._metrics.fileno())
        return self.lines

    def close(self) -> None:
        """Close the metrics and let others have the folder."""
        try:
            self._metrics.close()
        finally:
            if self._lock is not None:
                self._lock.release()


def remember_settings(config: RunConfig) -> None:
    """Note what the user's settings name, so that the run's folder may name it here later."""
    for key, value in config.named().items():
        remember_named(key.partition(".")[0], value)


def is_unfinished(path: Path) -> bool:
    """Whether a folder holds a run that was not done."""
    status = read_status(path)
    return status is not None and status.state != "finished"


def check_output(path: Path, *, goes_on: bool = False) -> None:
    """Refuse, before any work is done, a folder that a run could not be written to. Leaves no trace.

    Args:
        goes_on: whether a run that is there goes on, so that the folder is not renamed.

    Raises:
        UserError: it cannot be written, or holds something that is not a run.
    """
    try:
        there = path
        while not there.exists():
            there = there.parent
        if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        if not there.stat().st_mode & 0o222:
            # The system lets its administrator write even here; who marked the folder meant that nobody does.
            raise PermissionError(errno.EACCES, "it is marked read-only")
        with tempfile.TemporaryFile(dir=there):
            holds = sorted(p.name for p in path.iterdir()) if path.exists() else []
    except OSError as error:
        raise _not_writable(path, error) from error
    if holds not in ([], [FOLDER]) and SETTINGS not in holds and METRICS not in holds:
        raise UserError(
            f"the output folder holds files that are not a run's, such as '{holds[0]}'",
            where=str(path),
            hint="set 'output' to a new or empty folder",
        )
    if holds and not goes_on and path.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UserError(
            "the output folder holds an earlier run, and cannot be renamed while you are in it",
            where=str(path),
            hint="set 'output' to a folder below this one",
        )


def _belongs_to_a_run(path: Path) -> bool:
    """Whether anything is there but what a run that was killed at its very beginning leaves."""
    if read_status(path) is not None:
        return True
    empty = {METRICS} if (path / METRICS).is_file() and (path / METRICS).stat().st_size == 0 else set()
    return any(file.name not in {FOLDER, *empty} for file in path.iterdir() if not _is_leftover(file))


def _is_leftover(file: Path) -> bool:
    """Whether a killed process left it half written."""
    return file.name.startswith(".") and file.name.endswith(PARTIAL)


def _not_writable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write into the output folder: {error.strerror or error}",
        where=str(path),
        hint="set 'output' to a folder that you may write to",
    )


def settings_text(config: RunConfig, chosen: Mapping[str, tuple[object, str]]) -> str:
    """The settings as YAML that can be read again, with a comment behind each value that the run chose; what
    it chose without a setting, such as ``kernels``, is a comment of its own."""
    lines = []
    of_settings = set()
    section = ""
    for line in yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=1000).splitlines():
        key = line.partition(":")[0]
        if not line.startswith(" "):
            section = key
        dotted = key if key == section else f"{section}.{key.strip()}"
        if dotted in chosen:
            value, why = chosen[dotted]
            of_settings.add(dotted)
            line += f"  # {value}: {why}"
        lines.append(line)
    lines += [f"# {key}: {value}: {why}" for key, (value, why) in chosen.items() if key not in of_settings]
    return "\n".join(lines) + "\n"
