"""Queue of jobs, which run one after the other as processes of the command line and survive the server."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from filelock import FileLock, Timeout

from deltaw import platforms
from deltaw.atomic_files import write_text
from deltaw.child_process import MAX_OUTPUT_BYTES, python_command, start_command
from deltaw.errors import UserError
from deltaw.runs.folder import is_alive, is_locked, process_identity
from deltaw.studio.workspace import Workspace, load_fields

QUEUED, RUNNING, DONE, FAILED, STOPPED = STATES = ("queued", "running", "done", "failed", "stopped")
VERBS = {"train": "Training", "eval": "Scoring", "predict": "Predicting", "merge": "Merging", "export": "Exporting"}
VERBS |= {"deploy": "Adding to the program", "plan": "Downloading the model"}
POLL_SECONDS = 0.5
RETRY_SECONDS = 30.0
# Maximum bytes that are read of a job's output, and number of lines of its log on the page.
MAX_LOG_LINES = 40
_JOB = "job.json"
_SETTINGS = "settings.yaml"
_ERROR = re.compile(r"(.*?)(?:\n  where: (.*?))?(?:\n  hint:  (.*?))?", re.DOTALL)
# A shell that starts the studio in the background disables SIGINT, and children inherit that.
_ENABLE_SIGINT = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "


def workspace_command(
    code: str, workspace: Workspace, arguments: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """Return the command line and the environment for Python code with the import path of this process.

    Modules are not imported from the current folder, because it may contain uploaded files. The process reads images of
    rows only from the studio's folder.
    """
    options = ["-I", "-u", "-X", "utf8"]
    command = python_command(_ENABLE_SIGINT + code, arguments, options=options, include_current_folder=False)
    return command, {**os.environ, "NO_COLOR": "1", **workspace.permissions.environment()}


def child_command(workspace: Workspace, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command line and the environment of a command of deltaw."""
    return workspace_command("from deltaw.cli import main; main()", workspace, arguments)


def read_error(text: str) -> UserError | None:
    """Return the error at the end of a command's messages, or None."""
    _, found, text = f"\n{text}".rpartition("\nerror: ")
    match = _ERROR.fullmatch(text.rstrip()) if found else None
    if match is None:
        return None
    message, location, hint = (part and " ".join(part.split()) for part in match.groups())
    return UserError(message or "", location=location, hint=hint)


@dataclass
class StudioJob:
    """Process of the command line.

    Attributes:
        verb: Command, such as ``train``.
        title: Description for the user.
        run: Folder of its run, relative to the studio's folder, or None.
        output: File or folder that it creates, relative to the studio's folder, or None.
        draft: Draft that it was started from, or None.
        process: Identity of the process as :func:`deltaw.runs.folder.process_identity`, or None.
        state: ``queued``, ``running``, ``done``, ``failed`` or ``stopped``.
        order: Position in the queue.
        stops: Number of requests to stop.
        folder: Folder with the job's files. It is the working directory of the process.
    """

    identity: str
    verb: str
    title: str
    arguments: list[str]
    run: str | None
    output: str | None
    draft: str | None
    created: float
    process: dict[str, Any] | None
    state: str
    order: float
    stops: int
    folder: Path

    @property
    def is_active(self) -> bool:
        """True if the job is running or waiting."""
        return self.state in (QUEUED, RUNNING)

    @property
    def state_text(self) -> str:
        """State in words."""
        texts = {QUEUED: "Waiting", DONE: "Finished", STOPPED: "Stopped", FAILED: "Failed"}
        return texts.get(self.state) or ("Stopping" if self.stops else VERBS.get(self.verb, "Running"))

    @property
    def result(self) -> dict[str, Any] | None:
        """JSON object that the job printed, or None."""
        try:
            value = json.loads(self._read("stdout"))
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    @property
    def log(self) -> str:
        """Last lines of the job's messages."""
        return "\n".join(self._read("stderr").splitlines()[-MAX_LOG_LINES:])

    def _read(self, name: str) -> str:
        """Return the end of an output file, or ''."""
        with contextlib.suppress(OSError), (self.folder / name).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_OUTPUT_BYTES))
            return file.read().decode("utf-8", "replace")
        return ""

    def save(self) -> None:
        """Write the job to its file."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if key != "folder"}
        write_text(self.folder / _JOB, json.dumps(values))


class JobQueue:
    """Queue of jobs. Their state is in files, so that a restarted server finds running processes.

    Args:
        workspace: Folder of the studio.

    Attributes:
        on_start: Called before a job starts.
        problem: Error that prevents the next job from starting, such as a full disk, or None.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._folder = workspace.state / "jobs"
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._file_lock = FileLock(workspace.state / "lock", timeout=0, thread_local=False)
        self._folder_lock: int | None = None
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self.on_start: list[Callable[[StudioJob], None]] = []
        self.problem: UserError | None = None
        self._jobs: dict[str, StudioJob] = {}
        for file in self._folder.glob(f"*/{_JOB}"):
            try:
                job = load_fields(StudioJob, file, folder=file.parent, identity=file.parent.name)
                if job.state not in STATES:
                    raise ValueError("unknown state")
                job.created = min(max(0.0, job.created), time.time())
                self._jobs[job.identity] = job
            except (OSError, ValueError):
                workspace.report_damage(file)

    def start(self) -> None:
        """Lock the folder, remove incomplete files and start the thread that polls.

        Raises:
            UserError: if another studio uses the folder.
        """
        try:
            self._file_lock.acquire()
            self._folder_lock = _lock_folder(self._workspace.folder)
        except (Timeout, BlockingIOError) as error:
            self._file_lock.release()
            hint = "open the address that its terminal shows, or close it first"
            raise UserError(
                "another studio uses this folder", location=str(self._workspace.folder), hint=hint
            ) from error
        self._workspace.remove_partial_files()
        self._thread.start()

    def close(self) -> None:
        """Stop the thread. Running jobs continue."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        self._file_lock.release()
        if self._folder_lock is not None:
            os.close(self._folder_lock)
            self._folder_lock = None

    def _run(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            try:
                self.poll()
            except Exception:
                traceback.print_exc()
                self._closed.wait(RETRY_SECONDS)

    def add(
        self, verb: str, arguments: Sequence[str], *, title: str, run: Path | None = None,
        settings: Mapping[str, Any] | None = None, output: Path | None = None, draft: str | None = None,
    ) -> StudioJob:  # fmt: skip
        """Add a job.

        Args:
            verb: Command, such as ``train``.
            arguments: Command line after ``deltaw``, including the verb.
            settings: Settings to write to the job's folder. The path of the file is appended to the command line.
        """
        identity = secrets.token_hex(6)
        now = time.time()
        folder = self._folder / identity
        paths = [None if path is None else self._workspace.relative(path) for path in (run, output)]
        words = [*arguments] if settings is None else [*arguments, str(folder / _SETTINGS)]
        job = StudioJob(identity, verb, title, words, paths[0], paths[1], draft, now, None, QUEUED, now, 0, folder)
        try:
            if settings is not None:
                write_text(folder / _SETTINGS, yaml.safe_dump(dict(settings), sort_keys=False))
            job.save()
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        with self._lock:
            self._jobs[identity] = job
        return job

    def jobs(self) -> list[StudioJob]:
        """Return all jobs: the running one, queued ones in order, then others, the last created first."""
        with self._lock:
            rank = {RUNNING: 0, QUEUED: 1}
            return sorted(
                self._jobs.values(),
                key=lambda job: (rank.get(job.state, 2), job.order if job.state == QUEUED else -job.created),
            )

    def active(self) -> list[StudioJob]:
        """Return the jobs that are running or waiting."""
        return [job for job in self.jobs() if job.is_active]

    def job(self, identity: str) -> StudioJob:
        """Return a job.

        Raises:
            UserError: if it does not exist.
        """
        with self._lock:
            if identity not in self._jobs:
                raise UserError("this job does not exist", hint="go to the list of jobs")
            return self._jobs[identity]

    def busy(self) -> StudioJob | None:
        """Return the running job, or None."""
        return next((job for job in self.jobs() if job.state == RUNNING), None)

    def stop(self, identity: str, *, at_once: bool = False) -> None:
        """Interrupt a running job, or take a queued one out of the queue. A training saves its state first.

        Args:
            at_once: Repeat the interruption of a job that is stopping, so that it exits without saving.
        """
        with self._lock:
            job = self.job(identity)
            if job.state == QUEUED:
                job.state = STOPPED
            elif job.state != RUNNING or (job.stops and not at_once):
                return
            else:
                job.stops += 1
                interrupt(job.process or {}, kill=job.stops > 2, arguments=job.arguments)
            job.save()

    def resume(self, identity: str) -> None:
        """Queue a job again that has ended. The same command continues a training from its last checkpoint.

        Raises:
            UserError: if another training has the same output folder.
        """
        with self._lock:
            job = self.job(identity)
            if job.is_active:
                return
            trainings = [other for other in self._jobs.values() if other.verb == job.verb == "train"]
            if any(other.run == job.run and other is not job for other in trainings):
                hint = "start it again from its settings, which gives it a folder of its own"
                raise UserError(f"another training uses the folder {job.run}", hint=hint)
            job.state = QUEUED
            job.process = None
            job.stops = 0
            job.order = time.time()
            job.save()

    def remove(self, identity: str) -> None:
        """Remove a job that is not running."""
        with self._lock:
            if self.job(identity).state == RUNNING:
                raise UserError("this job is running", hint="stop it first")
            shutil.rmtree(self._jobs.pop(identity).folder, ignore_errors=True)

    def first(self, identity: str) -> None:
        """Move a queued job to the front."""
        with self._lock:
            job = self.job(identity)
            job.order = min(other.order for other in self._jobs.values()) - 1
            job.save()

    def poll(self) -> None:
        """Record jobs that ended, and start the next one."""
        with self._lock:
            for job in [job for job in self._jobs.values() if job.state == RUNNING]:
                job.process = job.process or _find_process(job)
                if not self._is_running(job):
                    self._children.pop(job.identity, None)
                    result = job.result
                    is_done = result is not None and not result.get("interrupted")
                    job.state = DONE if is_done else STOPPED if job.stops or result is not None else FAILED
                    with contextlib.suppress(OSError, UserError):  # a restarted server computes the same state
                        job.save()
            waiting = [job for job in self.jobs() if job.state == QUEUED]
            if waiting and self.busy() is None:
                try:
                    self._start(waiting[0])
                    self.problem = None
                except (OSError, UserError) as error:
                    reason = error.message if isinstance(error, UserError) else error.strerror or str(error)
                    hint = "delete files that you do not need if the disk is full. The queue then continues"
                    self.problem = UserError(f"the next job cannot start: {reason}", hint=hint)

    def _is_running(self, job: StudioJob) -> bool:
        child = self._children.get(job.identity)
        if child is not None:
            return child.poll() is None
        alive = is_alive(job.process or {})
        # The name of the host may have changed.
        is_elsewhere = alive is None and job.process is not None and job.run is not None
        return alive is True or (is_elsewhere and is_locked(self._workspace.folder / str(job.run)))

    def _start(self, job: StudioJob) -> None:
        command, environment = child_command(self._workspace, job.arguments)
        for function in self.on_start:
            function(job)
        try:
            with (job.folder / "stdout").open("wb") as out, (job.folder / "stderr").open("wb") as errors:
                job.state = RUNNING
                job.save()  # before the process exists, so that no server starts it again
                child = start_command(command, environment=environment, folder=job.folder, stdout=out, stderr=errors)
        except ValueError as error:  # NUL in an argument
            job.state = FAILED
            job.save()
            (job.folder / "stderr").write_text(f"error: the command is invalid: {error}", "utf-8")
            return
        except (OSError, UserError):
            job.state = QUEUED
            raise
        self._children[job.identity] = child
        job.process = process_identity(child.pid)
        with contextlib.suppress(OSError, UserError):  # a restarted server finds it
            job.save()


def _lock_folder(folder: Path) -> int | None:
    """Lock a folder, which also excludes studios of other users. A lock file could be replaced by a link or a pipe.

    Returns:
        Descriptor of the lock, or None if the system has no such locks.

    Raises:
        BlockingIOError: if the folder is locked.
    """
    if platforms.WINDOWS:
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # some network file systems
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def interrupt(process: Mapping[str, Any], *, kill: bool = False, arguments: Sequence[str] = ()) -> None:
    """Send Ctrl-C to a process, or kill it, unless its id was reused by another process.

    Args:
        arguments: Last arguments that the command line of the process must have.
    """
    with contextlib.suppress(psutil.Error, KeyError, ValueError, OverflowError):
        target = psutil.Process(process["id"])  # psutil checks that the id is not reused from here on
        if is_alive(process) and _has_arguments(target.cmdline(), arguments):
            stop = getattr(signal, "CTRL_BREAK_EVENT" if platforms.WINDOWS else "SIGINT")
            target.kill() if kill else target.send_signal(stop)


def _find_process(job: StudioJob) -> dict[str, Any] | None:
    """Return the identity of the oldest process with the working directory and the arguments of a job, or None."""
    infos = [process.info for process in psutil.process_iter(["cmdline", "cwd", "pid", "create_time", "status"])]
    found = [i for i in infos if i["cwd"] == str(job.folder) and _has_arguments(i["cmdline"] or [], job.arguments)]
    return process_identity(min(found, key=lambda info: info["create_time"])["pid"]) if found else None


def _has_arguments(command: Sequence[str], arguments: Sequence[str]) -> bool:
    """Return True if these are the last arguments of a command line."""
    return [*command[len(command) - len(arguments) :]] == [*arguments]
