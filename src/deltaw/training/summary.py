"""``summary.json`` of a run's folder: the run in one small file, for whatever shows or lists runs.

Written when the training begins, with the state ``running``, and again when the run ends, however it ends. It
holds what the other files do not: the account of the rows, a few rows with their loss masks, the plan, what
was chosen and why, versions, the processor, the result, and commands to go on. It knows nothing of how any of
this is shown.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import socket
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from deltaw.durable import write_text
from deltaw.errors import UserError
from deltaw.host.processor import processor_name, usable_processors
from deltaw.training.example_rows import example_rows, length_counts
from deltaw.training.run_state import FOLDER
from deltaw.version import __version__

if TYPE_CHECKING:
    from deltaw.host.choices import Choice
    from deltaw.memory.plan import Plan
    from deltaw.training.fit import Result
    from deltaw.training.session import Session

NAME = "summary.json"
# Of the layout of the file; another number where an older reader would misread it.
VERSION = 1
# States of a run; a run that is "running" and whose process is gone was killed.
RUNNING, FINISHED, INTERRUPTED, FAILED = "running", "finished", "interrupted", "failed"
# The most entries of one dictionary or list, and characters of one text.
ENTRIES, CHARACTERS = 64, 4000
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy")

Done = TypeVar("Done", bound="Result")


class RunSummary:
    """Keeps ``summary.json`` of one run. A context manager: an error that leaves it becomes the run's end.

    Nothing is written before :meth:`begin`, so a run that is refused leaves no trace.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._session: Session | None = None
        self._values: dict[str, object] = {}

    def begin(
        self, folder: Path, session: Session, plan: Plan | None, chosen: Mapping[str, Choice], limit: int
    ) -> None:
        """Note what is known before the first step.

        Args:
            folder: of the run. plan: its memory; None where there is none. limit: bytes that the machine
                gives.
            chosen: what the run chose itself.
        """
        self._folder, self._session = folder, session
        data, config = session.data, session.config
        self._values = {
            "version": VERSION,
            "state": RUNNING,
            "started": _started(folder) or time.time(),
            "ended": None,
            "process": this_process(),
            "model": config.model,
            "task": config.task,
            "method": config.method,
            "writes_text": not session.task.has_labels,
            "total_steps": session.total_steps,
            "data": {
                "lines": data.report.lines(),
                "counts": data.report.as_dict(),
                "lengths": length_counts(data.train),
                "examples": example_rows(data.train, session.task.tokenizer, data.classes),
            },
            "chosen": _told(chosen),
            "notes": list(session.said),
            "plan": None if plan is None else {**plan.as_dict(), "limit_bytes": limit},
            "versions": versions(),
            "machine": {
                "processor": processor_name(),
                "processors": len(usable_processors()),
                "memory_bytes": psutil.virtual_memory().total,
                "system": platform.platform(terse=True),
            },
        }
        self._write()

    def finished(self, result: Done) -> Done:
        """Note how the run ended, and pass its result on."""
        state = INTERRUPTED if result.interrupted else FINISHED
        if state == FINISHED and result.stopped_early is None:  # a time budget plans the steps on the way
            self._values["total_steps"] = result.outcome.steps
        self._end(state, {"result": result.as_dict()})
        return result

    def __enter__(self) -> RunSummary:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or self._folder is None:
            return
        if isinstance(error, KeyboardInterrupt):
            self._end(INTERRUPTED, {})
        elif isinstance(error, UserError):
            self._end(FAILED, {"error": {"what": error.what, "where": error.where, "hint": error.hint}})
        else:
            self._end(FAILED, {"error": {"what": f"{type(error).__name__}: {error}"}})

    def _end(self, state: str, more: Mapping[str, object]) -> None:
        """The last writing. Where it fails, the run's own end is what counts."""
        if self._folder is None:
            return
        writes = self._values.get("writes_text") is True
        commands = next_commands(self._folder, state, str(self._values["method"]), writes)
        session, self._session = self._session, None
        if session is not None:  # with what was chosen on the way
            self._values["chosen"] = {**self._chosen(), **_told(session.chosen)}
        self._values |= {"state": state, "ended": time.time(), "commands": commands, **more}
        try:
            self._write()
        except (OSError, UserError) as error:
            warnings.warn(f"{self._folder / NAME} could not be written: {error}", stacklevel=2)

    def _chosen(self) -> dict[str, object]:
        chosen = self._values.get("chosen")
        return dict(chosen) if isinstance(chosen, Mapping) else {}

    def _write(self) -> None:
        assert self._folder is not None
        text = json.dumps(plain(self._values), ensure_ascii=False, allow_nan=False, indent=1)
        write_text(self._folder / NAME, text + "\n")


def _told(chosen: Mapping[str, Choice]) -> dict[str, object]:
    """Choices as plain values."""
    return {key: {"value": choice.value, "why": choice.why} for key, choice in chosen.items()}


def _started(folder: Path) -> float | None:
    """When the run that goes on in a folder began; None where none was there."""
    try:
        told = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return float(told["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def next_commands(folder: Path, state: str, method: str, writes_text: bool) -> list[dict[str, str]]:
    """Commands to go on with, each with what it does."""
    run = shlex.quote(os.fspath(folder))
    commands = []
    if state == FINISHED:
        if writes_text:
            commands.append((f"deltaw chat {run}", "talk with it"))
        commands.append((f"deltaw eval {run} --base", "compare it with the base model"))
        if method == "lora":
            commands.append((f"deltaw inspect {run}", "where and how much it changed"))
        if writes_text:
            commands.append((f"deltaw serve {run}", "serve it with the OpenAI API"))
        if method == "lora":
            merged = shlex.quote(f"{os.fspath(folder)}-merged")
            commands.append((f"deltaw merge {run} --output {merged}", "make one model of base and adapter"))
    if any((folder / FOLDER).glob("step-*")):
        resume = f"deltaw train --resume {run}"
        further = (f"{resume} --train.epochs N", "train further, to N epochs in all")
        commands.append(further if state == FINISHED else (resume, "continue"))
    if folder.parent != folder:
        commands.append((f"deltaw runs {shlex.quote(os.fspath(folder.parent))}", "list this and other runs"))
    return [{"command": command, "what": what} for command, what in commands]


def versions() -> dict[str, str]:
    """Of Python, deltaw and the libraries that numbers depend on."""
    found = {"deltaw": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def this_process() -> dict[str, object]:
    """What tells later whether this process still runs: its number is used again once it has ended."""
    return {"host": socket.gethostname(), "id": os.getpid(), "begun": psutil.Process().create_time()}


def is_alive(process: Mapping[str, object]) -> bool | None:
    """Whether the process that :func:`this_process` described still runs; None where nobody here can tell."""
    if process.get("host") != socket.gethostname():
        return None
    number, begun = process.get("id"), process.get("begun")
    if not isinstance(number, int) or not isinstance(begun, float):
        return None
    try:
        found = psutil.Process(number)
        same = abs(found.create_time() - begun) < 1.0
        return same and found.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def plain(value: Any) -> Any:
    """A value for JSON, of bounded size: no nan, long texts and long collections shortened."""
    if isinstance(value, Mapping):
        kept = {str(key): plain(entry) for key, entry in list(value.items())[:ENTRIES]}
        if len(value) > ENTRIES:
            kept["…"] = f"and {len(value) - ENTRIES:,} more"
        return kept
    if isinstance(value, str):
        return value if len(value) <= CHARACTERS else value[: CHARACTERS - 1] + "…"
    if isinstance(value, Sequence):
        more = [f"… and {len(value) - ENTRIES:,} more"] if len(value) > ENTRIES else []
        return [plain(entry) for entry in value[:ENTRIES]] + more
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    return str(value)
