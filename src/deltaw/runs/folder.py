"""Read and write a run's folder: settings, choices, state, metrics, results and lock.

Training writes it with :class:`RunFolder`; resuming, comparisons and reports read it with :class:`Run`. Settings are in
``run.yaml``, the state in ``run.json``, and measurements in ``metrics.jsonl``. An earlier run in the same folder is
renamed, never overwritten.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import socket
import tempfile
import time
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import yaml
from filelock import FileLock, Timeout

from deltaw import platforms
from deltaw.atomic_files import atomic_path, write_text
from deltaw.data.bad_rows import SKIPPED_ROWS, BadRows
from deltaw.errors import UserError, nearest
from deltaw.settings import method_registry, task_registry
from deltaw.settings.config import SETTINGS, RunConfig, flat, parse_yaml
from deltaw.untrusted_paths import require_contained
from deltaw.user_references import record_reference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RUN = "run.json"
METRICS = "metrics.jsonl"
LEARNING_RATES = "learning_rate.json"
CHECKPOINT_FOLDER = "checkpoints"
LOCK = ".lock"
# Version of the run.json format. Increased for changes that an older reader would misinterpret.
VERSION = 1
# States of a run: training, stopped by a signal or a callback, failed with an error, diverged, finished.
RUNNING = "running"
INTERRUPTED = "interrupted"
FAILED = "failed"
DIVERGED = "diverged"
FINISHED = "finished"
STATES = (RUNNING, INTERRUPTED, FAILED, DIVERGED, FINISHED)
# Derived states: the process of a running run has disappeared, or the state is unknown.
KILLED = "killed"
UNKNOWN = "unknown"
# Names of metrics that are losses.
LOSSES = ("loss", "mse", "relative_mse")
# Suffix of incomplete files, as in deltaw.atomic_files.
PARTIAL = ".part"
# The C implementation if it is available. Its output is identical.
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
# Maximum length of a file name in bytes on common file systems.
_MAX_NAME_BYTES = 255


class Run:
    """Read access to a run's folder. Files are read lazily.

    Missing, damaged or unknown files result in missing values, never in errors.

    Attributes:
        path: Path of the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @cached_property
    def values(self) -> Mapping[str, Any]:
        """Content of ``run.json``, or empty."""
        values = mapping(_json(self.path / RUN))
        return values if values.get("version") == VERSION else {}

    @property
    def training(self) -> Mapping[str, Any] | None:
        """State for resuming, or None if the run cannot be resumed.

        Keys: ``steps`` done, ``settings`` as :func:`deltaw.runs.resuming.dump_settings`, ``features`` of
        :class:`deltaw.training.features.feature_record.FeatureRecord` before the first step, and ``finished``. The
        latter is None if the run never finished. Otherwise it contains the ``steps`` and metrics ``lines`` at that
        time, and the result of :meth:`deltaw.runs.checkpoints.Checkpoints.extra_state`.
        """
        saved = mapping(self.values.get("training"))
        complete = isinstance(saved.get("settings"), dict) and type(saved.get("steps")) is int
        return {"features": {}, "finished": None, **saved} if complete and self.values.get("state") in STATES else None

    @cached_property
    def state(self) -> str:
        """One of :data:`STATES`, ``killed`` or ``unknown``."""
        state = self.values.get("state")
        alive = is_alive(self.part("process")) if state == RUNNING else True
        if alive is False or (alive is None and not is_locked(self.path)):
            return KILLED
        if state in STATES:
            return str(state)
        # Trainings of a comparison have no run.json and write the model card last.
        card = _text(self.path / "README.md")
        if card is None:
            return UNKNOWN
        return INTERRUPTED if "interrupted before its last step" in card else FINISHED

    @property
    def reason(self) -> str | None:
        """Reason why the run did not finish, in one line, or None."""
        message = str(self.part("error").get("what") or "").strip()
        default_reasons = {
            KILLED: "its process is gone: killed, out of memory, or the machine stopped",
            INTERRUPTED: "stopped by Ctrl-C, a signal or a callback",
        }
        return message.splitlines()[0] if message else default_reasons.get(self.state)

    @cached_property
    def settings_text(self) -> str:
        """Content of ``run.yaml``, or ''."""
        return _text(self.path / SETTINGS) or ""

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        try:
            return mapping(parse_yaml(self.settings_text))
        except yaml.YAMLError:
            return {}

    @cached_property
    def flat_settings(self) -> dict[str, object]:
        """Settings as given by the user, by dotted key."""
        return flat(self.settings)

    @property
    def chosen(self) -> Mapping[str, Any]:
        """Automatic choices by name or dotted key, with ``value`` and ``why``."""
        return self.part("chosen")

    def setting(self, key: str) -> object:
        """Return a setting by dotted key, with the automatic choice in place of ``auto``."""
        chosen = mapping(self.chosen.get(key))
        return chosen["value"] if "value" in chosen else self.flat_settings.get(key)

    def part(self, key: str) -> Mapping[str, Any]:
        """Return a section of ``run.json``, such as ``plan``, or an empty mapping."""
        return mapping(self.values.get(key))

    def named(self, key: str, default: str = "") -> str:
        """Return ``model``, ``method`` or ``task`` from the settings or from ``run.json``."""
        return str(self.settings.get(key) or self.values.get(key) or default or f"unknown {key}")

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def model(self) -> str:
        return self.named("model")

    @property
    def method(self) -> str:
        return self.named("method")

    @property
    def task(self) -> str:
        return self.named("task", task_registry.default_task())

    @property
    def generates_text(self) -> bool:
        """True if the model generates text."""
        entry = task_registry.find(self.task)
        return self.values.get("writes_text", entry is not None and entry.generates_text) is True

    @property
    def result(self) -> Mapping[str, Any]:
        """Output of ``train --json``, empty if the run has not finished."""
        return self.part("result")

    @property
    def total_steps(self) -> int | None:
        """Planned number of optimizer steps."""
        total = self.values.get("total_steps")
        return total if isinstance(total, int) else None

    @property
    def peak_bytes(self) -> int | None:
        return _as_int(self.result.get("peak_memory_bytes"))

    @property
    def planned_bytes(self) -> int | None:
        planned = self.part("plan").get("peak_resident_bytes")
        return _as_int(self.result.get("planned_memory_bytes") if planned is None else planned)

    @cached_property
    def changed(self) -> float:
        """Time of the last change of the run's files, in seconds since the epoch."""
        files = [self.path / name for name in (SETTINGS, METRICS, RUN)]
        return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)

    @property
    def started(self) -> float:
        """Start time in seconds since the epoch, or the time of the last change if it is unknown."""
        return number(self.values.get("started")) or self.changed

    @cached_property
    def learning_rates(self) -> Mapping[str, Any]:
        """Result of the learning-rate search, or empty."""
        return mapping(_json(self.path / LEARNING_RATES))

    @cached_property
    def metrics(self) -> RunMetrics:
        return read_metrics(self.path / METRICS)

    @property
    def steps(self) -> int:
        """Number of optimizer steps done."""
        return int(self.metrics.columns["step"][-1]) if len(self.metrics) else 0

    @property
    def seconds(self) -> float:
        """Training time in seconds, without evaluations."""
        return self.metrics.total("seconds")

    @property
    def rows_per_second(self) -> float | None:
        return self.metrics.total("rows") / self.seconds if self.seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.metrics.total("tokens") / self.seconds if self.seconds else None

    @property
    def score(self) -> tuple[str, float] | None:
        """Main metric and its last value."""
        score = mapping(self.result.get("score"))
        name = score.get("metric")
        value = score.get("value")
        if isinstance(name, str) and isinstance(value, int | float):
            return name, float(value)
        names = self.metrics.metric_names()
        metrics = [name for name in names if name.rpartition("/")[2] not in (*LOSSES, "perplexity")]
        return next(((name, v[-1][1]) for name in [*metrics, *names] if (v := self.metrics.evaluated(name))), None)

    @property
    def score_interval(self) -> Sequence[float]:
        """Lower and upper bound of the score, or an empty sequence."""
        bounds = numbers(sequence(mapping(self.result.get("score")).get("interval")))
        return bounds if len(bounds) == 2 else ()

    @property
    def base(self) -> Mapping[str, float]:
        """Metrics of the held-out rows before the first step.

        Empty if they were not evaluated, or if that evaluation searched different passages than the last one.
        """
        metrics = dict(self.metrics.evaluations[:1]).get(0, {})
        counts = [{key: n for key, n in values.items() if "passages_" in key} for _, values in self.metrics.evaluations]
        return metrics if counts and counts[0] == counts[-1] else {}

    @property
    def loss_metric(self) -> str | None:
        """Held-out metric that is a loss, or None. With several evaluation sets, that of the first set."""
        return next((n for loss in LOSSES for n in self.metrics.metric_names() if n.rpartition("/")[2] == loss), None)

    @property
    def progress(self) -> str:
        """Metrics column that shows the training progress: ``reward`` if completions are rewarded, else ``loss``."""
        return "reward" if len(self.metrics.column("reward")[0]) else "loss"

    @property
    def held_out_losses(self) -> list[tuple[int, float]]:
        """Step and value of :attr:`loss_metric`."""
        return self.metrics.evaluated(self.loss_metric) if self.loss_metric else []


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Return the run in a folder.

    Raises:
        UserError: If the folder is not a run, or a link in it points outside of it.
    """
    path = Path(folder)
    if not is_run(path):
        message = "this is not the folder of a run: it contains neither run.yaml nor metrics.jsonl"
        raise UserError(message, location=str(path), hint="use a run's folder; 'deltaw runs' lists runs below a folder")
    require_contained(path)
    return Run(path)


def is_run(path: Path) -> bool:
    return (path / SETTINGS).is_file() or (path / METRICS).is_file()


def find_runs(folder: Path, depth: int = 3) -> list[Path]:
    """Return the runs below a folder, sorted by name. Folders inside of a run are not searched.

    Raises:
        UserError: If the folder cannot be read.
    """
    if not folder.is_dir():
        hint = "use the folder that contains your runs: the parent of a run's 'output'"
        raise UserError("the folder does not exist", location=str(folder), hint=hint)
    runs: list[Path] = []
    try:
        subfolders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"the folder cannot be read: {error.strerror or error}", location=str(folder)) from error
    for path in subfolders:
        if is_run(path):
            runs.append(path)
        elif depth > 1 and os.access(path, os.R_OK | os.X_OK):
            runs += find_runs(path, depth - 1)
    return runs


def nearby_runs_hint(path: Path) -> str:
    """Return a hint with the runs in, next to or named like a path that is not a run."""
    if (parent := next(filter(is_run, path.parents), None)) is not None:
        return f"use the run's folder: {parent}"
    runs = [run for folder in (path, path.parent) if folder.is_dir() for run in find_runs(folder, depth=1)]
    runs += find_runs(Path("runs")) if Path("runs").is_dir() else []
    names = nearest(path.name, {run.name for run in runs})
    candidates = list(dict.fromkeys(map(str, sorted(runs, key=lambda run: run.name not in names))))
    if not candidates:
        return "use the folder of a run, the 'output' of its settings"
    listing = f"runs here: {', '.join(candidates[-8:])}"
    return f"did you mean '{candidates[0]}'? {listing}" if names else listing


def process_identity(number: int | None = None) -> dict[str, object]:
    """Return the host, id and creation time of a process (by default this one), because process ids are reused."""
    process = psutil.Process(number)
    return {"host": socket.gethostname(), "id": process.pid, "begun": process.create_time()}


def is_alive(process: Mapping[str, object]) -> bool | None:
    """Return True if the process of :func:`process_identity` is running, or None if it is on another host."""
    if process.get("host") != socket.gethostname():
        return None
    number = process.get("id")
    created = process.get("begun")
    if not isinstance(number, int) or not isinstance(created, float):
        return None
    try:
        info = psutil.Process(number)
        return abs(info.create_time() - created) < 1.0 and info.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError, OverflowError):  # such as a negative number
        return False


# Metrics columns of a step.
COLUMNS = (
    *("step", "epoch", "loss", "learning_rate", "gradient_norm"),
    *("rows", "tokens", "label_tokens", "seconds", "general_loss"),
    # Reward runs.
    *("reward", "reward_error", "groups_with_advantage", "length", "truncated_share", "clip_share", "kl", "mismatch"),
)
# Prefixes of the columns of single reward functions, and the maximum number of such columns.
REWARD_PREFIXES = ("reward ", "reward_error ")
MAX_REWARD_COLUMNS = 32
# Maximum number of entries of other kinds. The last ones are used, so that files of any size can be displayed.
MAX_LINES = 20_000
# Maximum number of images in prompts, and their format.
MAX_PICTURES = 12
_PICTURE = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/]{1,20000}={0,2}")


@dataclass(frozen=True)
class SampleAnswer:
    """Answer to a held-out prompt after a number of steps."""

    step: int
    row: int | None
    prompt: str
    expected: str | None
    answer: str


@dataclass
class RunMetrics:
    """Metrics of a run. A file with 100,000 steps takes several megabytes.

    Attributes:
        columns: Values per step by name (:data:`COLUMNS` and reward functions), NaN if missing, in the order of the
            steps.
        evaluations: Step and metrics by name. Metrics of named sets are ``set/metric``.
        samples: Sample answers.
        pictures: Data URLs of the images in the prompts of sample answers, by row.
        general: Last general answers, each with ``prompt``, ``base`` and ``adapter``.
        completions: Best and worst completions of the last rollout, as
            :class:`deltaw.tasks.reward.scoring.ScoredCompletion`.
        completed: Step of ``completions``.
        predictions: Last recorded predictions by evaluation set
            (:meth:`deltaw.training.evaluation.base.Evaluation.outcomes_as_dict`).
        drifts: Step and drift values.
        warnings: Step and kind.
        skipped: Number of steps skipped because of a non-finite loss or gradient.
        damaged: Number of unreadable lines, such as the last one of a killed run.
    """

    columns: dict[str, np.ndarray] = field(default_factory=dict)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    samples: list[SampleAnswer] = field(default_factory=list)
    pictures: dict[str, list[str]] = field(default_factory=dict)
    general: list[Mapping[str, Any]] = field(default_factory=list)
    completions: list[Mapping[str, Any]] = field(default_factory=list)
    completed: int = 0
    predictions: Mapping[str, Any] = field(default_factory=dict)
    drifts: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    warnings: list[tuple[int, str]] = field(default_factory=list)
    skipped: int = 0
    damaged: int = 0

    def __len__(self) -> int:
        return len(self.columns["step"]) if self.columns else 0

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps with a finite value of a column, and these values."""
        if name not in self.columns:
            return np.zeros(0), np.zeros(0)
        values = self.columns[name]
        finite = np.isfinite(values)
        return self.columns["step"][finite], values[finite]

    def evaluated(self, metric: str) -> list[tuple[int, float]]:
        """Return the steps and values of a metric of the held-out rows."""
        return [(step, v[metric]) for step, v in self.evaluations if math.isfinite(v.get(metric, math.nan))]

    def rewards(self) -> list[str]:
        """Return the columns of single reward functions, empty if the run has only one function."""
        return [name for name in self.columns if name.startswith(REWARD_PREFIXES[0])]

    def metric_names(self) -> list[str]:
        """Return the names of all evaluated metrics in order of appearance."""
        return list(dict.fromkeys(name for _, values in self.evaluations for name in values))

    def total(self, name: str) -> float:
        """Return the sum of a column."""
        return float(np.nansum(self.columns[name])) if self.columns else 0.0


def read_metrics(path: Path) -> RunMetrics:
    """Read a ``metrics.jsonl`` file. A missing file results in empty metrics, and unknown keys are ignored."""
    metrics = RunMetrics()
    columns = {name: array("d") for name in COLUMNS}
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a regular file")
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                _read_line(line, columns, metrics)
    except OSError:
        metrics.damaged += path.exists()
    arrays = {name: np.frombuffer(values, dtype=np.float64) for name, values in columns.items() if len(values)}
    metrics.columns = _last_per_step(arrays)
    metrics.evaluations = _merge_by_step(metrics.evaluations[-MAX_LINES:])
    metrics.drifts = _merge_by_step(metrics.drifts[-MAX_LINES:])
    metrics.samples = metrics.samples[-MAX_LINES:]
    metrics.warnings = metrics.warnings[-MAX_LINES:]
    return metrics


def _read_line(line: str, columns: dict[str, array[float]], metrics: RunMetrics) -> None:
    if not line.strip():
        return
    try:
        values = json.loads(line)
        step = int(values["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        metrics.damaged += 1
        return
    if "loss" in values:
        for name in values:
            is_new = name.startswith(REWARD_PREFIXES) and name not in columns
            if is_new and len(columns) < len(COLUMNS) + MAX_REWARD_COLUMNS:
                columns[name] = array("d", [math.nan] * len(columns["step"]))
        for name, column in columns.items():
            column.append(_number(values.get(name)))
    for key, entries in (("base", metrics.evaluations), ("eval", metrics.evaluations), ("drift", metrics.drifts)):
        if isinstance(values.get(key), Mapping):
            entries.append((step, dict(_flat(values[key]))))
    warning = values.get("warning")
    if isinstance(warning, Mapping):
        metrics.warnings.append((step, str(warning.get("kind", ""))))
    metrics.skipped += "skipped" in values
    metrics.general = [mapping(entry) for entry in sequence(values.get("general"))] or metrics.general
    if completions := [mapping(entry) for entry in sequence(values.get("completions"))]:
        metrics.completions = completions
        metrics.completed = step
    metrics.predictions = mapping(values.get("predictions")) or metrics.predictions
    for sample in sequence(values.get("samples")):
        if isinstance(sample, Mapping):
            row = sample.get("row")
            expected = sample.get("expected")
            row = row if isinstance(row, int) else None
            expected = None if expected is None else str(expected)
            prompt, answer = (str(sample.get(name, "")) for name in ("prompt", "answer"))
            metrics.samples.append(SampleAnswer(step, row, prompt, expected, answer))

    for row, urls in mapping(values.get("pictures")).items():
        valid = [url for url in sequence(urls) if isinstance(url, str) and _PICTURE.fullmatch(url)]
        metrics.pictures[row] = valid[: MAX_PICTURES - sum(map(len, metrics.pictures.values()))]


def _flat(values: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, float]]:
    """Yield numbers by name. Those in a section are named ``section/name``."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, bool | int | float) or value is None:
            yield f"{prefix}{name}", _number(value)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _last_per_step(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sort by step and use the last line of each step. A resumed run may have recorded steps twice."""
    if not columns or np.all(np.diff(columns["step"]) > 0):
        return columns
    _, last = np.unique(columns["step"][::-1], return_index=True)
    return {name: values[::-1][last] for name, values in columns.items()}


def _merge_by_step(entries: list[tuple[int, dict[str, float]]]) -> list[tuple[int, dict[str, float]]]:
    """Merge the entries of each step, sorted by step. Later values take precedence."""
    by_step: dict[int, dict[str, float]] = {}
    for step, values in entries:
        by_step.setdefault(step, {}).update(values)
    return sorted(by_step.items())


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None  # no pipes and devices
    except OSError:
        return None


def _json(path: Path) -> object:
    try:
        return json.loads(_text(path) or "null")
    except (ValueError, RecursionError):
        return None


def mapping(value: object) -> Mapping[str, Any]:
    """Return the value if it is a mapping, else an empty mapping."""
    return value if isinstance(value, Mapping) else {}


def or_empty(value: Any, formatter: Callable[[Any], str]) -> str:
    """Return ``formatter(value)``, or '' if the value is missing."""
    return "" if value is None else formatter(value)


def sequence(value: object) -> list[Any]:
    """Return the value if it is a list, else an empty list."""
    return value if isinstance(value, list) else []


def number(value: object) -> float | None:
    """Return the value as float if it is a finite number, else None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def numbers(values: Sequence[object]) -> list[float]:
    """Return the finite numbers of a list."""
    return [result for value in values if (result := number(value)) is not None]


def _as_int(value: object) -> int | None:
    finite = number(value)
    return None if finite is None else int(finite)


def is_locked(run: Path) -> bool:
    """Return True if a process on any host has locked the run's folder, or if this is unknown."""
    lock = run / CHECKPOINT_FOLDER / LOCK
    try:
        if lock.exists():
            FileLock(lock, timeout=0).acquire().lock.release()
        return False
    except (Timeout, OSError):
        return True


class RunLock:
    """Exclusive lock of a run's folder, released explicitly or on exit of the process.

    Raises:
        UserError: If another process has the lock, or the folder is not writable.
    """

    def __init__(self, run: Path) -> None:
        try:
            (run / CHECKPOINT_FOLDER).mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(run / CHECKPOINT_FOLDER / LOCK, timeout=0, thread_local=False)
            self._lock.acquire()
        except Timeout as error:
            process = mapping(Run(run).values.get("process")).get("id")
            message = f"{'another process' if process is None else f'process {process}'} is training into this folder"
            hint = "wait for it, stop it, or set 'output' to another folder"
            raise UserError(message, location=str(run), hint=hint) from error
        except OSError as error:
            raise not_writable_error(run, error) from error

    def release(self) -> None:
        """Release the lock."""
        self._lock.release()


class RunFolder(Run):
    """Write access to the folder of a run.

    Args:
        path: Folder, created if it does not exist.
        lock: Existing lock of the folder. Otherwise the folder is locked.
        num_metrics_lines: Number of metrics lines to keep for a resumed run, or None for a new run.

    Attributes:
        moved: New path of an earlier run in this folder, or None.
        lines: Number of metrics lines.

    Raises:
        UserError: If the folder is not writable, is in use, or contains files that are not a run.
    """

    def __init__(self, path: Path, *, lock: RunLock | None = None, num_metrics_lines: int | None = None) -> None:
        super().__init__(path)
        is_resumed = num_metrics_lines is not None
        self._lock = lock
        check_output(self.path, is_resumed=is_resumed)
        self.values = {"version": VERSION, "started": self.started if is_resumed else time.time()}
        self.moved = None if is_resumed else self._rename_earlier()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise not_writable_error(self.path, error) from error
        if self._lock is None or self.moved is not None:
            # The lock file was moved together with the earlier run.
            new_lock = RunLock(self.path)
            if self._lock is not None:
                self._lock.release()
            self._lock = new_lock
        try:
            for file in [file for file in self.path.iterdir() if _is_leftover(file)]:
                platforms.remove_path(file)
            self.lines = self._cut_metrics(num_metrics_lines or 0)
            # Unbuffered, so that a failed write to a full disk is not repeated when the file is closed.
            self._metrics = (self.path / METRICS).open("ab", buffering=0)
        except OSError as error:
            self._lock.release()
            raise not_writable_error(self.path, error) from error

    def _cut_metrics(self, num_lines: int) -> int:
        """Truncate the metrics to the first ``num_lines`` complete lines and return their number."""
        path = self.path / METRICS
        content = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        lines = [line for line in content.splitlines(keepends=True)[:num_lines] if line.endswith("\n")]
        if "".join(lines) != content:
            write_text(path, "".join(lines))
        return len(lines)

    def _rename_earlier(self) -> Path | None:
        if not self.path.is_dir() or not _contains_run(self.path):
            return None
        if platforms.WINDOWS and self._lock is not None:
            self._lock.release()  # Windows cannot rename a folder with an open file
        number = 1
        while (renamed := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        try:
            platforms.rename_path(self.path, renamed)
        except OSError as error:
            message = f"cannot rename the earlier run: {error.strerror or error}"
            raise UserError(message, location=str(self.path), hint="set 'output' to another folder") from error
        return renamed

    def note(self, values: Mapping[str, object]) -> None:
        """Add values to ``run.json`` and flush it to disk.

        Raises:
            UserError, OSError: If it cannot be written.
        """
        self.values = {**self.values, **values}
        parts = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in self.values.items())
        write_text(self.path / RUN, "{\n" + ",\n".join(parts) + "\n}\n")

    def write_settings(self, config: RunConfig, chosen: Mapping[str, tuple[object, str]]) -> None:
        """Write ``run.yaml`` with all values. ``chosen`` contains the choices for ``auto`` and their reasons by dotted
        key.
        """
        write_text(self.path / SETTINGS, settings_text(config, chosen))
        remember_settings(config)

    def write_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Save the tokenizer with its chat template, so that the folder can be used for inference."""
        with tempfile.TemporaryDirectory(prefix=".tokenizer.", suffix=PARTIAL, dir=self.path) as staging:
            tokenizer.save_pretrained(staging)
            for file in (p for p in Path(staging).rglob("*") if p.is_file()):
                with atomic_path(self.path / file.relative_to(staging)) as temporary:
                    shutil.copyfile(file, temporary)

    def write_skipped(self, skipped: BadRows | None) -> None:
        """Write the unusable rows, if there are any."""
        if skipped:
            skipped.write(self.path / SKIPPED_ROWS)

    def write_metrics(self, line: Mapping[str, object]) -> None:
        """Append a line to ``metrics.jsonl``, unbuffered."""
        text = (json.dumps(line) + "\n").encode()
        if self._metrics.write(text) != len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(self.path / METRICS))
        self.lines += 1

    def sync_metrics(self) -> int:
        """Flush the metrics to disk and return the number of lines."""
        os.fsync(self._metrics.fileno())
        return self.lines

    def close(self) -> None:
        """Close the metrics and release the lock."""
        try:
            self._metrics.close()
        finally:
            if self._lock is not None:
                self._lock.release()


def remember_settings(config: RunConfig) -> None:
    """Record the references in the user's settings as trusted, so that the run's folder may use them later."""
    for key, value in config.external_references().items():
        record_reference(key.partition(".")[0], value)


def check_output(path: Path, *, is_resumed: bool = False) -> None:
    """Check that a run can be written to a folder, without side effects.

    Args:
        is_resumed: An existing run is resumed, so the folder is not renamed.

    Raises:
        UserError: If the folder is not writable, contains files that are not a run, or has a name reserved by Windows.
    """
    platforms.reject_reserved_names(path)
    try:
        existing = path
        while not existing.exists() and existing != existing.parent:  # a drive may be missing
            existing = existing.parent
        if any(len(os.fsencode(part)) > _MAX_NAME_BYTES for part in path.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        if not existing.stat().st_mode & 0o222:
            # Root could write anyway, but the folder is deliberately read-only.
            raise PermissionError(errno.EACCES, "it is marked read-only")
        with tempfile.TemporaryFile(dir=existing):
            names = sorted(p.name for p in path.iterdir()) if path.exists() else []
    except OSError as error:
        raise not_writable_error(path, error) from error
    if names not in ([], [CHECKPOINT_FOLDER]) and SETTINGS not in names and METRICS not in names:
        message = f"the output folder contains files that are not a run's, such as '{names[0]}'"
        raise UserError(message, location=str(path), hint="set 'output' to a new or empty folder")
    if names and not is_resumed and path.resolve() in (Path.cwd(), *Path.cwd().parents):
        message = "the output folder contains an earlier run and cannot be renamed because it is the current folder"
        raise UserError(message, location=str(path), hint="set 'output' to a folder below this one")


def _contains_run(path: Path) -> bool:
    """Return True if the folder contains more than a run that was killed at its start leaves behind."""
    if Run(path).training is not None:
        return True
    empty = {METRICS} if (path / METRICS).is_file() and (path / METRICS).stat().st_size == 0 else set()
    return any(file.name not in {CHECKPOINT_FOLDER, *empty} for file in path.iterdir() if not _is_leftover(file))


def _is_leftover(file: Path) -> bool:
    """Return True for an incomplete file of a killed process."""
    return file.name.startswith(".") and file.name.endswith(PARTIAL)


def not_writable_error(path: Path, error: OSError) -> UserError:
    """Return the error for an output folder that is not writable."""
    hint = "set 'output' to a folder that you can write to"
    return UserError(f"cannot write into the output folder: {error.strerror or error}", location=str(path), hint=hint)


def _saved_values(config: RunConfig) -> dict[str, Any]:
    """Return the settings without sections of other packages that the run does not use.

    Such a run can be opened without these packages.
    """
    methods = [(method.name, method.name) for method in method_registry.registered()]
    tasks = [(task.name, task.section_name) for task in task_registry.registered()]
    used = {config.method, task_registry.entry_of(config.task).section_name}
    used |= {section for name, section in methods if method_registry.is_built_in(name)}
    used |= {section for name, section in tasks if task_registry.is_built_in(name)}
    unused = {section for _, section in [*methods, *tasks]} - used
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in unused}


def settings_text(config: RunConfig, chosen: Mapping[str, tuple[object, str]]) -> str:
    """Return the settings as YAML, with comments for automatic choices.

    Choices without a setting, such as ``kernels``, are separate comment lines.
    """
    lines = []
    commented = set()
    section = ""
    for line in yaml.dump(_saved_values(config), Dumper=_Dumper, sort_keys=False, width=1000).splitlines():
        key = line.partition(":")[0]
        if not line.startswith(" "):
            section = key
        dotted = key if key == section else f"{section}.{key.strip()}"
        if dotted in chosen:
            value, reason = chosen[dotted]
            commented.add(dotted)
            line += f"  # {value}: {reason}"
        lines.append(line)
    lines += [f"# {key}: {value}: {reason}" for key, (value, reason) in chosen.items() if key not in commented]
    return "\n".join(lines) + "\n"
