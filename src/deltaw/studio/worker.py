"""Calls that need torch, in a worker process."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaw.errors import UserError
from deltaw.studio import row_calls
from deltaw.studio.jobs import workspace_command
from deltaw.studio.workspace import Workspace
from deltaw.worker_process import PipeWorker, WorkerError, serve

# Time limits of a call and of a plan, and time until an idle worker is killed, which frees its memory.
CALL_SECONDS = 1800.0
PLAN_SECONDS = 300.0
IDLE_SECONDS = 300.0
# A call whose result is no longer needed is killed after about the time that a new worker needs to start.
RESTART_SECONDS = 8.0
# Pages request a result every second, or every minute in the background. A call is cancelled if no page has requested
# its result for ABANDONED_SECONDS, or for WAITING_SECONDS if another call waits.
ABANDONED_SECONDS = 90.0
WAITING_SECONDS = 15.0
WATCH_SECONDS = 1.0
# If a plan takes longer, no settings that fit are searched for, because the search computes several plans.
MAX_SEARCHED_SECONDS = 20.0
# Errors are forgotten after this time, so that the user can try again.
ERROR_SECONDS = 3.0
MAX_RESULTS = 100
MAX_RESULT_BYTES = 2**26
MAX_STAMPS = 500


@dataclass(frozen=True)
class Pending:
    """A call that is not finished after this number of seconds."""

    seconds: float


@dataclass
class _Call:
    """Call of a function, its result or its error, and times: the first and the last request, start and end."""

    name: str
    arguments: Mapping[str, Any]
    draft: str
    requested: float = field(default_factory=time.monotonic)
    polled: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    is_needed: bool = True
    result: dict[str, Any] | None = None
    error: UserError | None = None


class Worker:
    """Client of the worker process, which is started on first use and killed when it is idle.

    Args:
        workspace: Folder of the studio.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        command, environment = workspace_command("from deltaw.studio.worker import main; main()", workspace)
        self._process = PipeWorker(command, environment=environment, extra_start_seconds=240)
        self._changed = threading.Condition()
        self._calls: dict[str, _Call] = {}
        self._running: _Call | None = None
        self._is_closed = False
        self._has_threads = False

    def result(self, call: str, arguments: Mapping[str, Any], *, draft: str = "") -> Pending | dict[str, Any]:
        """Return the result of a call, or Pending. The call is started if it is not known.

        Args:
            call: Name in :data:`CALLS`.
            arguments: JSON-serializable arguments. Files and folders in them are watched for changes.
            draft: Draft of the call. An unfinished call of the same name for the same draft is dropped.

        Raises:
            UserError: if the call failed.
        """
        key = json.dumps([call, arguments, _stamps(arguments)], sort_keys=True)
        with self._changed:
            known = self._calls.get(key)
            now = time.monotonic()
            if known is None or (known.error and now - known.ended > ERROR_SECONDS):
                known = self._add(key, _Call(call, arguments, draft))
            known.is_needed = True
            known.polled = now
            if known.error is not None:
                raise known.error
            return Pending(max(0.0, now - known.requested)) if known.result is None else known.result

    def _add(self, key: str, new: _Call) -> _Call:
        for call in self._calls.values():
            if new.draft and (call.draft, call.name) == (new.draft, new.name):
                call.is_needed = False
        self._calls.pop(key, None)
        self._calls = {key: call for key, call in self._calls.items() if call.is_needed or call.started} | {key: new}
        ended = [key for key, call in self._calls.items() if call.ended]
        for key in ended[: max(0, len(self._calls) - MAX_RESULTS)]:
            del self._calls[key]
        if not self._has_threads:
            self._has_threads = True
            for function in (self._run, self._watch):
                threading.Thread(target=function, name="worker", daemon=True).start()
        self._changed.notify()
        return new

    def release(self) -> None:
        """Kill the process if it is idle, so that a training gets its memory."""
        with self._changed:
            if self._running is None:
                self._process.close()

    def close(self) -> None:
        """Kill the worker."""
        with self._changed:
            self._is_closed = True
            self._process.close()
            self._changed.notify()

    def _watch(self) -> None:
        """Kill the process if no page requests its result."""
        while not self._is_closed:
            time.sleep(WATCH_SECONDS)
            with self._changed:
                now = time.monotonic()
                running = self._running
                if running is None:
                    continue
                limit = ABANDONED_SECONDS if self._next() is None else WAITING_SECONDS
                is_needed = running.is_needed and now - running.polled <= limit
                if not is_needed and now - running.started > RESTART_SECONDS:
                    self._calls = {key: call for key, call in self._calls.items() if call is not running}
                    self._process.close()

    def _run(self) -> None:
        """Execute the calls one after the other."""
        while True:
            with self._changed:
                while not self._is_closed and (call := self._next()) is None:
                    if not self._changed.wait(IDLE_SECONDS):
                        self._process.close()
                if self._is_closed:
                    return
                assert call is not None
                self._running = call
                call.started = time.monotonic()
            try:
                request = json.dumps({"call": call.name, "arguments": call.arguments}).encode()
                seconds = PLAN_SECONDS if call.name == plan.__name__ else CALL_SECONDS
                (answer,) = self._process.request(request, seconds, max_bytes=MAX_RESULT_BYTES)
                values = json.loads(answer)
            except WorkerError as error:
                message = f"the calculation stopped: it {error}"
                hint = "the memory may be full. Close other programs, and try again"
                if time.monotonic() - call.started >= PLAN_SECONDS and call.name == plan.__name__:
                    message = f"memory and time were not estimated within {PLAN_SECONDS / 60:.0f} minutes"
                    hint = "choose a smaller model. You can also start the training without an estimate, or copy the"
                    hint += " command of the next step to a terminal and replace train by plan"
                values = {"error": {"message": message, "location": None, "hint": hint}}
            with self._changed:
                self._running = None
                call.ended = time.monotonic()
                call.result = values.get("result")
                call.error = UserError(**values["error"]) if "error" in values else None

    def _next(self) -> _Call | None:
        return next((call for call in self._calls.values() if call.is_needed and not call.started), None)


def _stamps(value: object) -> list[list[object]]:
    """Return size and time of the files, and of files in the folders, whose absolute paths are in a value."""
    if isinstance(value, Mapping | list | tuple):
        return [stamp for item in (value.values() if isinstance(value, Mapping) else value) for stamp in _stamps(item)]
    stamps: list[list[object]] = []
    with contextlib.suppress(OSError, ValueError):
        if isinstance(value, str) and (path := Path(value)).is_absolute() and path.exists():
            for file in [path, *(sorted(path.iterdir())[:MAX_STAMPS] if path.is_dir() else ())]:
                stamps.append([str(file), file.stat().st_size, file.stat().st_mtime_ns])
    return stamps


# Functions that run in the worker process.


def plan(config: dict[str, Any]) -> dict[str, Any]:
    """Return the plan of a run, messages about its rows, and settings that fit if it does not fit."""
    from deltaw.machine.memory import free_memory_bytes, resident_bytes
    from deltaw.methods.start import resolve_start
    from deltaw.progress import ignore_line
    from deltaw.runs.checks import read_and_check_data
    from deltaw.settings.config import RunConfig
    from deltaw.training.planning.budget import fitting_settings
    from deltaw.training.planning.plan_run import plan_methods

    settings = RunConfig.read(config)
    lines = list[str]()
    fitting = []
    if settings.start_from is not None:
        settings = resolve_start(settings, lines.append)
    task, data = read_and_check_data(settings, lines.append)
    started = time.monotonic()
    found = plan_methods(settings, task, data, [settings.method], on_error=lambda *_: None)[settings.method]
    free = free_memory_bytes() + resident_bytes()  # the worker exits before the training starts
    is_large = found.parts["weights"] > free or time.monotonic() - started > MAX_SEARCHED_SECONDS
    if found.peak_resident_bytes > free and not is_large:
        with contextlib.suppress(UserError):  # nothing fits
            plans = fitting_settings(settings, task, data, free, [settings.method], log=ignore_line)
            fitting = [option.as_dict() for option in plans]
    return {"plan": found.to_fields(), "fitting": fitting, "lines": lines, "free": free}


def run_page(folder: str) -> dict[str, Any]:
    """Return the report page of a run."""
    from deltaw.reports.page import write
    from deltaw.runs.folder import read_run

    return {"html": write.run_page(read_run(folder))}


def comparison_page(folders: Sequence[str]) -> dict[str, Any]:
    """Return the page that compares runs."""
    from deltaw.reports.page import write
    from deltaw.runs.folder import read_run

    return {"html": write.comparison_page([read_run(folder) for folder in folders])}


# Functions by name.
CALLS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function for function in (plan, run_page, comparison_page)
} | row_calls.CALLS


def main() -> None:
    """Answer calls from standard input."""
    from deltaw.progress import use_listener

    with use_listener(None):
        serve(lambda: _answer)


def _answer(request: bytes) -> Iterator[bytes]:
    values = json.loads(request)
    try:
        answer: dict[str, Any] = {"result": CALLS[values["call"]](**values["arguments"])}
    except UserError as error:
        answer = {"error": {"message": error.message, "location": error.location, "hint": error.hint}}
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        hint = "the terminal shows the details"
        answer = {
            "error": {"message": f"something went wrong ({type(error).__name__})", "location": None, "hint": hint}
        }
    yield json.dumps(answer).encode()
