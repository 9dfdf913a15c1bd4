"""A run's folder as one object: settings, choices, state, metrics, results, lock and checkpoints.

Training writes it (:class:`RunFolder`); resuming, `runs`, comparisons and pages read it (:class:`Run`). People read
``run.yaml``, programs ``run.json``; what was measured is in ``metrics.jsonl``. An earlier run in the same folder is
renamed, never overwritten. A run that is resumed keeps its folder. It knows no terminal, page or checkpoint content.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import socket
import tempfile
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import yaml
from filelock import FileLock, Timeout

from deltaw import platforms
from deltaw.contained import remember_named, require_contained
from deltaw.data.report import SKIPPED_ROWS, BadRows
from deltaw.durable import replacing, write_text
from deltaw.errors import UserError, nearest
from deltaw.settings import SETTINGS, RunConfig, flat, parse_yaml

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RUN, METRICS, LEARNING_RATES = "run.json", "metrics.jsonl", "learning_rate.json"
FOLDER, LOCK = "checkpoints", ".lock"
# Of the layout of run.json; another number where an older reader would misread it.
VERSION = 1
# States of a run: in training; stopped by a signal or a callback; ended by an error; diverged; done.
RUNNING, INTERRUPTED, FAILED, DIVERGED, FINISHED = "running", "interrupted", "failed", "diverged", "finished"
STATES = (RUNNING, INTERRUPTED, FAILED, DIVERGED, FINISHED)
# States that follow from the folder: the process of a running run is gone; nothing tells.
KILLED, UNKNOWN = "killed", "unknown"
# Names of metrics that are losses.
LOSSES = ("loss", "mse")
# How names end of what is being written; deltaw.durable gives the same to its files.
PARTIAL = ".part"
# The same text as SafeDumper's, from C where PyYAML has it.
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
# Bytes of a file's or folder's name on the usual file systems.
_LONGEST_NAME = 255


class Run:
    """A run as its folder describes it. Files are read when they are first needed.

    Files of another kind, damaged or of another version lead to missing values, never to an error.

    Attributes:
        path: of the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @cached_property
    def values(self) -> Mapping[str, Any]:
        """What ``run.json`` holds; empty where there is none."""
        found = mapping(_json(self.path / RUN))
        return found if found.get("version") == VERSION else {}

    @property
    def training(self) -> Mapping[str, Any] | None:
        """What resuming needs: ``steps`` done, ``settings`` as :func:`deltaw.runs.resuming.dumped`, ``features``
        of :class:`deltaw.training.features.store.FeatureRecord` before the first step, and ``finished`` (``steps`` at
        which the run was done once, ``lines`` of its metrics then, and what
        :meth:`deltaw.runs.checkpoints.Checkpoints.beside` gave; None if it never was). None where nothing can be
        resumed."""
        found = mapping(self.values.get("training"))
        whole = isinstance(found.get("settings"), dict) and type(found.get("steps")) is int
        return {"features": {}, "finished": None, **found} if whole and self.values.get("state") in STATES else None

    @cached_property
    def state(self) -> str:
        """One of :data:`STATES`, ``killed`` or ``unknown``."""
        state = self.values.get("state")
        alive = is_alive(self.part("process")) if state == RUNNING else True
        if alive is False or (alive is None and not is_locked(self.path)):
            return KILLED
        if state in STATES:
            return str(state)
        # Trainings of a comparison write the model card last.
        card = _text(self.path / "README.md")
        if card is None:
            return UNKNOWN
        return INTERRUPTED if "interrupted before its last step" in card else FINISHED

    @property
    def reason(self) -> str | None:
        """Why it did not come to its end, in one line; None where it did, still runs, or nothing tells."""
        told = str(self.part("error").get("what") or "").strip()
        without = {
            KILLED: "its process is gone: killed, out of memory, or the machine stopped",
            INTERRUPTED: "stopped by Ctrl-C, a signal or a callback",
        }
        return told.splitlines()[0] if told else without.get(self.state)

    @cached_property
    def settings_text(self) -> str:
        """``run.yaml``; empty where there is none."""
        return _text(self.path / SETTINGS) or ""

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        try:
            return mapping(parse_yaml(self.settings_text))
        except yaml.YAMLError:
            return {}

    @cached_property
    def flat_settings(self) -> dict[str, object]:
        """The settings as they were given, by dotted key."""
        return flat(self.settings)

    @property
    def chosen(self) -> Mapping[str, Any]:
        """By name or dotted key, what the run chose itself: ``value`` and ``why``."""
        return self.part("chosen")

    def setting(self, key: str) -> object:
        """A setting by its dotted key: what the run chose where it is ``auto``."""
        chosen = mapping(self.chosen.get(key))
        return chosen["value"] if "value" in chosen else self.flat_settings.get(key)

    def part(self, key: str) -> Mapping[str, Any]:
        """A section of ``run.json``, such as ``plan``; empty where there is none."""
        return mapping(self.values.get(key))

    def named(self, key: str, otherwise: str = "") -> str:
        """``model``, ``method`` or ``task``, from the settings or from ``run.json``."""
        return str(self.settings.get(key) or self.values.get(key) or otherwise or f"unknown {key}")

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
        return self.named("task", "causal-lm")

    @property
    def result(self) -> Mapping[str, Any]:
        """What ``train --json`` prints; empty while it runs, and where it failed."""
        return self.part("result")

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps planned."""
        total = self.values.get("total_steps")
        return total if isinstance(total, int) else None

    @property
    def peak_bytes(self) -> int | None:
        return _whole(self.result.get("peak_memory_bytes"))

    @property
    def planned_bytes(self) -> int | None:
        planned = self.part("plan").get("peak_resident_bytes")
        return _whole(self.result.get("planned_memory_bytes") if planned is None else planned)

    @cached_property
    def changed(self) -> float:
        """When the run last wrote anything, in seconds since 1970."""
        files = [self.path / name for name in (SETTINGS, METRICS, RUN)]
        return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)

    @property
    def started(self) -> float:
        """When it began, in seconds since 1970; where nothing tells, when it last wrote anything."""
        return number(self.values.get("started")) or self.changed

    @cached_property
    def learning_rates(self) -> Mapping[str, Any]:
        """The search of the learning rate; empty where there was none."""
        return mapping(_json(self.path / LEARNING_RATES))

    @cached_property
    def metrics(self) -> Metrics:
        return read_metrics(self.path / METRICS)

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return int(self.metrics.columns["step"][-1]) if len(self.metrics) else 0

    @property
    def seconds(self) -> float:
        """Of training, evaluations apart."""
        return self.metrics.total("seconds")

    @property
    def rows_per_second(self) -> float | None:
        return self.metrics.total("rows") / self.seconds if self.seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.metrics.total("tokens") / self.seconds if self.seconds else None

    @property
    def score(self) -> tuple[str, float] | None:
        """The metric that counts and its last value."""
        told = mapping(self.result.get("score"))
        name, value = told.get("metric"), told.get("value")
        if isinstance(name, str) and isinstance(value, int | float):
            return name, float(value)
        names = self.metrics.metric_names()
        plain = [name for name in names if name.rpartition("/")[2] not in (*LOSSES, "perplexity")]
        return next(((name, v[-1][1]) for name in [*plain, *names] if (v := self.metrics.evaluated(name))), None)

    @property
    def base(self) -> Mapping[str, float]:
        """Metrics of the held-out rows before the first step.

        Empty if they were not evaluated then, or if that evaluation searched other passages than the last one.
        """
        found = dict(self.metrics.evaluations[:1]).get(0, {})
        searched = [{name: n for name, n in one.items() if "passages_" in name} for _, one in self.metrics.evaluations]
        return found if searched and searched[0] == searched[-1] else {}

    @property
    def loss_metric(self) -> str | None:
        """The held-out metric that is a loss, of several sets the first one's; None if there is none."""
        names = self.metrics.metric_names()
        return next((n for loss in LOSSES for n in names if n.rpartition("/")[2] == loss), None)

    @property
    def progress(self) -> str:
        """The column of the metrics that tells how the training goes: ``reward`` where completions are rewarded."""
        return "reward" if len(self.metrics.column("reward")[0]) else "loss"

    @property
    def held_out_losses(self) -> list[tuple[int, float]]:
        """Step and value of :attr:`loss_metric`."""
        return self.metrics.evaluated(self.loss_metric) if self.loss_metric else []


def read_run(folder: str | os.PathLike[str]) -> Run:
    """The run in a folder.

    Raises:
        UserError: the folder is not a run's, or a link in it leads out of it.
    """
    path = Path(folder)
    if not is_run(path):
        what = "this is not the folder of a run: it holds neither run.yaml nor metrics.jsonl"
        raise UserError(what, where=str(path), hint="give a run's folder; 'deltaw runs' lists those below a folder")
    require_contained(path)
    return Run(path)


def is_run(path: Path) -> bool:
    return (path / SETTINGS).is_file() or (path / METRICS).is_file()


def find_runs(folder: Path, depth: int = 3) -> list[Path]:
    """The runs below a folder, by name; folders within a run are not searched.

    Raises:
        UserError: the folder cannot be read.
    """
    if not folder.is_dir():
        hint = "name the folder that your runs are in: the one above a run's 'output'"
        raise UserError("there is no such folder", where=str(folder), hint=hint)
    found: list[Path] = []
    try:
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"the folder cannot be read: {error.strerror or error}", where=str(folder)) from error
    for path in inner:
        if is_run(path):
            found.append(path)
        elif depth > 1 and os.access(path, os.R_OK | os.X_OK):
            found += find_runs(path, depth - 1)
    return found


def runs_near(path: Path) -> str:
    """A hint for a path that is no run's: the runs in it, beside it or in the folder ``runs``, similar names first."""
    if (holder := next(filter(is_run, path.parents), None)) is not None:
        return f"give the run's folder: {holder}"
    there = [run for place in (path, path.parent) if place.is_dir() for run in find_runs(place, depth=1)]
    there += find_runs(Path("runs")) if Path("runs").is_dir() else []
    names = nearest(path.name, {run.name for run in there})
    found = list(dict.fromkeys(map(str, sorted(there, key=lambda run: run.name not in names))))
    if not found:
        return "give the folder of a run, the 'output' of its settings"
    listed = f"runs here: {', '.join(found[-8:])}"
    return f"did you mean '{found[0]}'? {listed}" if names else listed


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


# Columns of the metrics that are kept of a step.
COLUMNS = (
    *("step", "epoch", "loss", "learning_rate", "gradient_norm"),
    *("rows", "tokens", "label_tokens", "seconds", "general_loss"),
    # Of completions that were rewarded.
    *("reward", "reward_error", "teaching_groups", "length", "cut_share", "clip_share", "kl", "mismatch"),
)
# How columns begin that have the name of a reward function behind it, and how many of them are kept.
OF_FUNCTIONS, MOST_OF_FUNCTIONS = ("reward ", "reward_error "), 32
# Lines of other kinds that are kept, the last of them: a file that grows without bound is still shown.
KEPT = 20_000


@dataclass(frozen=True)
class SampleAnswer:
    """One held-out prompt and the model's answer to it after a number of steps."""

    step: int
    row: int | None
    prompt: str
    expected: str | None
    answer: str


@dataclass
class Metrics:
    """What a run measured. A file of 100,000 steps becomes a few megabytes of numbers.

    Attributes:
        columns: by name of :data:`COLUMNS` and of reward functions, one number a step (nan where a line has none), in
            the order of the steps.
        evaluations: step and metrics by name, those of named sets as ``set/metric``.
        samples: the sample answers. drifts: step and its numbers. warnings: step and kind.
        general: the last general answers, each with ``prompt``, ``base`` and ``adapter``.
        predictions: By evaluation set, the last recorded predictions
            (:meth:`deltaw.training.evaluation.base.Evaluation.outcomes_as_dict`).
        completions: the best and the worst of the last rollout, as :class:`deltaw.training.rollouts.scoring.Rewarded`;
            and ``completed``, its step.
        skipped: steps whose loss or gradient was not finite, and that were left out.
        damaged: lines that could not be read, such as the last one of a killed run.
    """

    columns: dict[str, np.ndarray] = field(default_factory=dict)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    samples: list[SampleAnswer] = field(default_factory=list)
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
        """The steps that have a finite value of ``name``, and these values."""
        if name not in self.columns:
            return np.zeros(0), np.zeros(0)
        values = self.columns[name]
        there = np.isfinite(values)
        return self.columns["step"][there], values[there]

    def evaluated(self, metric: str) -> list[tuple[int, float]]:
        """Step and value of a metric of the held-out rows."""
        return [(step, v[metric]) for step, v in self.evaluations if math.isfinite(v.get(metric, math.nan))]

    def rewards(self) -> list[str]:
        """The columns of single reward functions; empty where there is one."""
        return [name for name in self.columns if name.startswith(OF_FUNCTIONS[0])]

    def metric_names(self) -> list[str]:
        """Of all evaluations, in the order in which they first came."""
        return list(dict.fromkeys(name for _, values in self.evaluations for name in values))

    def total(self, name: str) -> float:
        """The sum of a column."""
        return float(np.nansum(self.columns[name])) if self.columns else 0.0


def read_metrics(path: Path) -> Metrics:
    """The content of a ``metrics.jsonl``; empty where there is no file. Unknown keys are ignored."""
    metrics = Metrics()
    columns = {name: array("d") for name in COLUMNS}
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                _read_line(line, columns, metrics)
    except OSError:
        metrics.damaged += path.exists()
    found = {name: np.frombuffer(values, dtype=np.float64) for name, values in columns.items() if len(values)}
    metrics.columns = _in_order(found)
    metrics.evaluations = _last_of_each(metrics.evaluations[-KEPT:])
    metrics.drifts = _last_of_each(metrics.drifts[-KEPT:])
    metrics.samples = metrics.samples[-KEPT:]
    metrics.warnings = metrics.warnings[-KEPT:]
    return metrics


def _read_line(line: str, columns: dict[str, array], metrics: Metrics) -> None:
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
            if (
                name.startswith(OF_FUNCTIONS)
                and name not in columns
                and len(columns) < len(COLUMNS) + MOST_OF_FUNCTIONS
            ):
                columns[name] = array("d", [math.nan] * len(columns["step"]))
        for name, column in columns.items():
            column.append(_number(values.get(name)))
    for key, kept in (("base", metrics.evaluations), ("eval", metrics.evaluations), ("drift", metrics.drifts)):
        if isinstance(values.get(key), Mapping):
            kept.append((step, dict(_flat(values[key]))))
    warning = values.get("warning")
    if isinstance(warning, Mapping):
        metrics.warnings.append((step, str(warning.get("kind", ""))))
    metrics.skipped += "skipped" in values
    metrics.general = [mapping(one) for one in sequence(values.get("general"))] or metrics.general
    if completions := [mapping(one) for one in sequence(values.get("completions"))]:
        metrics.completions, metrics.completed = completions, step
    metrics.predictions = mapping(values.get("predictions")) or metrics.predictions
    for sample in sequence(values.get("samples")):
        if isinstance(sample, Mapping):
            row, expected = sample.get("row"), sample.get("expected")
            row, expected = row if isinstance(row, int) else None, None if expected is None else str(expected)
            prompt, answer = (str(sample.get(name, "")) for name in ("prompt", "answer"))
            metrics.samples.append(SampleAnswer(step, row, prompt, expected, answer))


def _flat(values: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, float]]:
    """Numbers by name; those of a section as ``section/name``."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, bool | int | float) or value is None:
            yield f"{prefix}{name}", _number(value)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _in_order(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The last line of each step, by step: a run that went on from a checkpoint may have steps twice."""
    if not columns or np.all(np.diff(columns["step"]) > 0):
        return columns
    _, last = np.unique(columns["step"][::-1], return_index=True)
    return {name: values[::-1][last] for name, values in columns.items()}


def _last_of_each(found: list[tuple[int, dict[str, float]]]) -> list[tuple[int, dict[str, float]]]:
    """One entry a step, later lines added to earlier ones, by step."""
    by_step: dict[int, dict[str, float]] = {}
    for step, values in found:
        by_step.setdefault(step, {}).update(values)
    return sorted(by_step.items())


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _json(path: Path) -> object:
    try:
        return json.loads(_text(path) or "null")
    except (ValueError, RecursionError):
        return None


def mapping(value: object) -> Mapping[str, Any]:
    """A mapping; empty for anything else."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: object) -> list[Any]:
    """A list; empty for anything else."""
    return value if isinstance(value, list) else []


def number(value: object) -> float | None:
    """A finite number; None for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def numbers(values: Sequence[object]) -> list[float]:
    """Those of a list that are finite numbers."""
    return [found for value in values if (found := number(value)) is not None]


def _whole(value: object) -> int | None:
    found = number(value)
    return None if found is None else int(found)


def is_locked(run: Path) -> bool:
    """Whether a process has the run's folder, of whatever host; also where that cannot be told."""
    lock = run / FOLDER / LOCK
    try:
        if lock.exists():
            FileLock(lock, timeout=0).acquire().lock.release()
        return False
    except (Timeout, OSError):
        return True


class RunLock:
    """A run's folder, taken by this process until it is released or the process ends, however it ends.

    Raises:
        UserError: another process has it, or the folder cannot be written.
    """

    def __init__(self, run: Path) -> None:
        try:
            (run / FOLDER).mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(run / FOLDER / LOCK, timeout=0, thread_local=False)
            self._lock.acquire()
        except Timeout as error:
            process = mapping(Run(run).values.get("process")).get("id")
            what = f"{'another process' if process is None else f'process {process}'} is training into this folder"
            hint = "wait until it is done, stop it, or set 'output' to another folder"
            raise UserError(what, where=str(run), hint=hint) from error
        except OSError as error:
            raise not_writable(run, error) from error

    def release(self) -> None:
        """Let others have the folder."""
        self._lock.release()


class RunFolder(Run):
    """The folder that a run is written to.

    Args:
        path: made where it does not exist.
        lock: of the folder, where it was taken already; else it is taken now.
        lines_kept: of the metrics, for a run that is resumed in its folder; None for a new run.

    Attributes:
        moved: where an earlier run in this folder went; None where there was none.
        lines: that the metrics have.

    Raises:
        UserError: the folder cannot be written, is in use, or holds something that is not a run.
    """

    def __init__(self, path: Path, *, lock: RunLock | None = None, lines_kept: int | None = None) -> None:
        super().__init__(path)
        goes_on = lines_kept is not None
        self._lock = lock
        check_output(self.path, goes_on=goes_on)
        self.values = {"version": VERSION, "started": self.started if goes_on else time.time()}
        self.moved = None if goes_on else self._rename_earlier()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise not_writable(self.path, error) from error
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
            raise not_writable(self.path, error) from error

    def _clear_leftovers(self) -> None:
        for file in [file for file in self.path.iterdir() if _is_leftover(file)]:
            platforms.removed(file)

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
        if platforms.WINDOWS and self._lock is not None:
            self._lock.release()  # a folder with an open file in it cannot be renamed there
        number = 1
        while (renamed := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        try:
            platforms.renamed(self.path, renamed)
        except OSError as error:
            what = f"cannot rename the earlier run: {error.strerror or error}"
            raise UserError(what, where=str(self.path), hint="set 'output' to another folder") from error
        return renamed

    def note(self, **values: Any) -> None:
        """Add values to ``run.json``; it is on the disk when this returns.

        Raises:
            UserError, OSError: it cannot be written.
        """
        self.values = {**self.values, **values}
        parts = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in self.values.items())
        write_text(self.path / RUN, "{\n" + ",\n".join(parts) + "\n}\n")

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


def check_output(path: Path, *, goes_on: bool = False) -> None:
    """Refuse, before any work is done, a folder that a run could not be written to. Leaves no trace.

    Args:
        goes_on: whether a run that is there is resumed, so that the folder is not renamed.

    Raises:
        UserError: it cannot be written, or holds something that is not a run; or Windows cannot have the name.
    """
    platforms.refuse_names(path)
    try:
        there = path
        while not there.exists() and there != there.parent:  # a drive may be missing
            there = there.parent
        if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        if not there.stat().st_mode & 0o222:
            # The system lets its administrator write even here; who marked the folder meant that nobody does.
            raise PermissionError(errno.EACCES, "it is marked read-only")
        with tempfile.TemporaryFile(dir=there):
            holds = sorted(p.name for p in path.iterdir()) if path.exists() else []
    except OSError as error:
        raise not_writable(path, error) from error
    if holds not in ([], [FOLDER]) and SETTINGS not in holds and METRICS not in holds:
        what = f"the output folder holds files that are not a run's, such as '{holds[0]}'"
        raise UserError(what, where=str(path), hint="set 'output' to a new or empty folder")
    if holds and not goes_on and path.resolve() in (Path.cwd(), *Path.cwd().parents):
        what = "the output folder holds an earlier run, and cannot be renamed while you are in it"
        raise UserError(what, where=str(path), hint="set 'output' to a folder below this one")


def _belongs_to_a_run(path: Path) -> bool:
    """Whether anything is there but what a run that was killed at its very beginning leaves."""
    if Run(path).training is not None:
        return True
    empty = {METRICS} if (path / METRICS).is_file() and (path / METRICS).stat().st_size == 0 else set()
    return any(file.name not in {FOLDER, *empty} for file in path.iterdir() if not _is_leftover(file))


def _is_leftover(file: Path) -> bool:
    """Whether a killed process left it half written."""
    return file.name.startswith(".") and file.name.endswith(PARTIAL)


def not_writable(path: Path, error: OSError) -> UserError:
    """The refusal of an output folder."""
    hint = "set 'output' to a folder that you can write to"
    return UserError(f"cannot write into the output folder: {error.strerror or error}", where=str(path), hint=hint)


def settings_text(config: RunConfig, chosen: Mapping[str, tuple[object, str]]) -> str:
    """The settings as YAML that can be read again, with a comment behind each value that the run chose; what
    it chose without a setting, such as ``kernels``, is a comment of its own."""
    lines = []
    of_settings = set()
    section = ""
    for line in yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=1000).splitlines():
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
