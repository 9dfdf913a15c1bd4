"""Best evaluation, early stopping and time budgets.

A run with a time budget measures its first steps and plans the number of steps that fit, including evaluations and the
work after the last step. The plan is revised if the speed changes.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from deltaw import platforms
from deltaw.errors import UserError
from deltaw.machine.choices import Choice
from deltaw.tensor_files import TensorFile, save_tensors
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.evaluation.general import MAX_ANSWER_TOKENS, NUM_STORED_ANSWERS, NoGeneralAnswers, check_size
from deltaw.training.evaluation.general_prompts import DRIFT_PROMPTS
from deltaw.training.monitoring.generation import max_new_tokens
from deltaw.training.session import Session
from deltaw.training.state import Step, TrainState
from deltaw.training.task import Rows

if TYPE_CHECKING:
    from torch import nn


FOLDER = "best"


class BestParameters:
    """Stores the trained parameters of the best step in ``best/`` of a folder until they are removed.

    Parameters are stored exactly. Those of an earlier step are removed after those of a later one were written. A run
    that is resumed from a checkpoint needs the best parameters of that checkpoint, so they are retained until the next
    checkpoint.

    Args:
        session: Session of the parameters.
        folder: Folder of the training.
    """

    def __init__(self, session: Session, folder: Path) -> None:
        self._session = session
        self._folder = folder / FOLDER
        self._checkpoint_step: int | None = None  # best step of the last checkpoint
        self._newest_step: int | None = None

    def save(self, step: int, state: TrainState | None = None) -> None:
        """Write the current parameters atomically, or the master weights of ``state``."""
        save_tensors(self._file(step), self._parameters(state), {"step": str(step)})
        self._newest_step = step
        self._remove_except({step, self._checkpoint_step})

    def on_checkpoint(self, best_step: int | None) -> None:
        """Remove parameters that a written checkpoint with this best step does not need."""
        self._checkpoint_step = best_step
        self._remove_except({best_step, self._newest_step})

    def has(self, step: int, state: TrainState | None = None) -> bool:
        """Return True if the parameters of this step, or the master weights of ``state``, are complete on disk."""
        try:
            with safe_open(self._file(step), framework="pt") as file:
                return set(file.keys()) == set(self._parameters(state))
        except (OSError, SafetensorError):
            return False

    @torch.no_grad()
    def restore(self, step: int, state: TrainState | None = None) -> None:
        """Load the parameters of this step into the model.

        Args:
            step: Step of :meth:`save`.
            state: State that was passed to :meth:`save`. Its master weights are loaded, too. Without it, the adapter of
                the last step has been saved.

        Raises:
            UserError: if their file is missing or damaged.
        """
        try:
            tensors = TensorFile(self._file(step))
            parameters = self._parameters(state)
            if missing := parameters.keys() - tensors.keys():
                raise ValueError(f"it lacks '{min(missing)}'")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"the parameters of the best step, {step}, cannot be read: {error}"
            saved = "the adapter of the last step is in the run's folder"
            hint = saved if state is None else "check the disk, and start the training again"
            raise UserError(message, location=str(self._file(step)), hint=hint) from error
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
        if state is not None:
            state.write_back()
        self._session.method.after_step(self._session.model)

    def remove(self) -> None:
        """Remove all stored parameters."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _parameters(self, state: TrainState | None = None) -> dict[str, nn.Parameter]:
        if state is not None:
            return dict(zip(state.names, state.trained, strict=True))
        return dict(self._session.method.parameters(self._session.model))

    def _file(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}.safetensors"

    def _remove_except(self, steps: set[int | None]) -> None:
        retained = {self._file(step) for step in steps if step is not None}
        for file in self._folder.glob("step-*.safetensors"):
            if file not in retained:
                platforms.remove_path(file)


# Maximum and minimum number of evaluations of a run if it is not configured.
MAX_EVALUATIONS = 10
MIN_EVALUATIONS = 4
# Minimum number of training rows between two evaluations per evaluated row, if MIN_EVALUATIONS allows.
ROWS_PER_HELD_OUT = 5


def deciding_metric(evaluation: Evaluation, *, generates_text: bool) -> tuple[str, bool]:
    """Return the metric that selects the best evaluation, and True if higher is better.

    For a model that generates text it is the loss, which changes with each step. The share of exact answers changes in
    coarse steps. Other tasks use their main metric.
    """
    if generates_text and "loss" in evaluation.metrics:
        return "loss", False
    return evaluation.main, evaluation.higher_is_better


def with_deciding_metric(evaluation: Evaluation, *, generates_text: bool) -> Evaluation:
    """Return the evaluation with the deciding metric as its main metric."""
    metric, higher_is_better = deciding_metric(evaluation, generates_text=generates_text)
    return replace(evaluation, main=metric, higher_is_better=higher_is_better)


def default_eval_every(total_steps: int, batch_size: int, num_eval_rows: int) -> Choice[int]:
    """Return the number of steps between evaluations if the best one is needed and ``train.eval_every`` is null."""
    min_interval = math.ceil(total_steps / MAX_EVALUATIONS)
    affordable_interval = math.ceil(ROWS_PER_HELD_OUT * num_eval_rows / batch_size)
    every = max(1, min(max(min_interval, affordable_interval), math.ceil(total_steps / MIN_EVALUATIONS)))
    reason = f"{MIN_EVALUATIONS} to {MAX_EVALUATIONS} evaluations over {total_steps} steps"
    return Choice(every, f"{reason}, for {num_eval_rows} held-out rows")


@dataclass
class BestScore:
    """Best evaluation of a run so far.

    Attributes:
        patience: Number of consecutive evaluations without improvement after which the run stops, if any.
        step: Step of the best evaluation, if any.
        value: Value of the best evaluation, if any.
        metric: Name of the deciding metric.
        waited: Number of evaluations since the last improvement.
    """

    patience: int | None = None
    step: int | None = None
    value: float | None = None
    metric: str = ""
    waited: int = 0

    def update(self, step: int, evaluation: Evaluation, *, generates_text: bool) -> bool:
        """Record an evaluation and return True if it is the best so far.

        A value that is equal to the best or not finite is no improvement.
        """
        metric, higher_is_better = deciding_metric(evaluation, generates_text=generates_text)
        value = evaluation.metrics.get(metric, math.nan)
        is_better = math.isfinite(value)
        if is_better and self.value is not None:
            is_better = value > self.value if higher_is_better else value < self.value
        if is_better:
            self.step = step
            self.value = float(value)
            self.metric = metric
            self.waited = 0
        else:
            self.waited += 1
        return is_better

    @property
    def exhausted(self) -> bool:
        """True if the patience is exhausted."""
        return self.patience is not None and self.waited >= self.patience

    def reason(self) -> str:
        """Return the reason for early stopping."""
        best = "" if self.step is None else f" since step {self.step} ({self.metric} {self.value:.4f})"
        times = "evaluation" if self.waited == 1 else "evaluations"
        return f"early stopping: no improvement in {self.waited} {times}{best}"

    def as_dict(self) -> dict[str, object] | None:
        """Return JSON values, or None before the first evaluation."""
        return None if self.step is None else {"step": self.step, "metric": self.metric, "value": self.value}

    def state(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "patience"}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in self.state():
            setattr(self, name, state[name])


# Minimum and maximum number of measured steps before the first plan, and the share of the budget to spend on them.
MIN_MEASURED_STEPS = 3
MAX_MEASURED_STEPS = 16
MEASURED_TIME_SHARE = 0.02
# Number of recent steps that determine the speed.
WINDOW = 64
# A plan is revised if it is off by more than this share of the remaining steps, by more than this number of standard
# errors of the speed, and by more than SLACK steps.
TOLERANCE = 0.05
NUM_STANDARD_ERRORS = 3.0
SLACK = 2
# Share of the budget that is reserved for unforeseen delays.
MARGIN = 0.02


def now() -> float:
    """Return the time in seconds from a fixed, arbitrary point."""
    return time.monotonic()


@dataclass
class OverheadSeconds:
    """Time outside of steps in seconds.

    Attributes:
        evaluation: Time of one evaluation with its generated answers. Estimated until one is measured.
        after: Time after the last step except for the last evaluation: drift and saving.
        measured: True if an evaluation was measured.
    """

    evaluation: float = 0.0
    after: float = 0.0
    measured: bool = False


@dataclass
class TimeBudget:
    """Plans the number of training steps so that the run finishes in time.

    Attributes:
        seconds: Time of the entire run from ``started``.
        max_steps: Number of steps without a time limit.
        started: Start of the run, measured by ``clock``.
        clock: Returns the time in seconds.
        overhead: Time outside of steps.
        label: Text of the setting, for messages.
        cycle: Number of steps after which durations repeat. A rollout takes time only in the first of
            ``reward.updates`` steps.
        planned: True if the number of steps was planned.
    """

    seconds: float
    max_steps: int
    started: float
    clock: Callable[[], float] = now
    overhead: OverheadSeconds = field(default_factory=OverheadSeconds)
    label: str = ""
    cycle: int = 1
    _spent_before: float = 0.0  # time of earlier processes of the same run
    planned: bool = False
    _step_start: float | None = None
    _durations: list[float] = field(default_factory=list)
    _error_planned: float = 0.0

    def spent(self) -> float:
        """Return the seconds since the start of the run, including earlier processes."""
        return self._spent_before + self.clock() - self.started

    def start(self) -> None:
        """Check the budget before the first step of this process.

        Raises:
            UserError: if the time is over and no step was ever completed.
        """
        if self.spent() >= self.seconds and not self._spent_before:
            message = f"the time is over before the first step: reading model and rows took {self.spent():.0f} s"
            raise UserError(message, location="train.time", hint="give more time")

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Measure an evaluation to estimate later ones."""
        start = self.clock()
        yield
        elapsed = self.clock() - start
        self.overhead.evaluation = max(elapsed, self.overhead.evaluation) if self.overhead.measured else elapsed
        self.overhead.measured = True

    def step_done(self) -> None:
        """Measure the completed step. The first step of a process is skipped, because it includes initialization."""
        if self._step_start is not None:
            self._durations = [*self._durations, self.clock() - self._step_start][-WINDOW:]

    def plan(self, state: TrainState, every: int | None) -> str | None:
        """Plan the number of steps if it is due.

        Args:
            state: State of the training. Its number of steps is updated.
            every: Number of steps between evaluations, if any.

        Returns:
            A message about a new plan, or None.
        """
        num_measured = len(self._durations)
        is_over = sum(self._durations) >= MEASURED_TIME_SHARE * self.seconds
        is_due = self.planned or num_measured >= MAX_MEASURED_STEPS or is_over
        return self._plan(state, every) if num_measured >= max(MIN_MEASURED_STEPS, self.cycle) and is_due else None

    def start_step(self) -> None:
        """Start measuring the next step."""
        self._step_start = self.clock()

    def is_over(self, state: TrainState) -> bool:
        """Return True if another step would end too late."""
        if state.step == 0 or not self._durations:
            return self.spent() >= self.seconds
        has_full_cycle = 1 < self.cycle <= len(self._durations)
        return self._remaining() < (self._durations[-self.cycle] if has_full_cycle else self._step_seconds()) / 2

    def state(self) -> dict[str, Any]:
        ending = {"evaluation": self.overhead.evaluation, "evaluation_measured": self.overhead.measured}
        return {"spent": self.spent(), "planned": self.planned, **ending}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._spent_before = float(state["spent"])
        self.planned = bool(state["planned"])
        self.overhead.evaluation = float(state["evaluation"])
        self.overhead.measured = bool(state["evaluation_measured"])

    def _step_seconds(self) -> float:
        times = self._durations[len(self._durations) % self.cycle :] or self._durations
        return sum(times) / len(times)

    def _remaining(self) -> float:
        """Return the seconds that remain for steps and the evaluations between them."""
        reserved = self.overhead.evaluation + self.overhead.after + MARGIN * self.seconds
        return self.seconds - self.spent() - reserved

    def _plan(self, state: TrainState, every: int | None) -> str | None:
        step_seconds = self._step_seconds() + (self.overhead.evaluation / every if every else 0.0)
        num_fitting = max(0, math.floor(self._remaining() / step_seconds)) if step_seconds > 0 else self.max_steps
        total = min(self.max_steps, state.step + num_fitting)
        remaining_steps = max(1, state.total_steps - state.step)
        difference = abs(total - state.total_steps)
        times = self._durations
        # standard error of the mean step duration, relative to the mean
        error = statistics.stdev(times) / math.sqrt(len(times)) / max(1e-9, statistics.fmean(times))
        tolerance = max(TOLERANCE, NUM_STANDARD_ERRORS * math.hypot(error, self._error_planned))
        if self.planned and (difference <= SLACK or difference <= tolerance * remaining_steps):
            return None
        is_revision = self.planned
        self.planned = True
        self._error_planned = error
        changed = total != state.total_steps
        state.replan(total)
        if is_revision and not changed:
            return None
        status = ("planned again" if is_revision else "planned") + (" (all steps)" if total == self.max_steps else "")
        reserved = self.overhead.evaluation + self.overhead.after
        label = self.label or f"{self.seconds:g}s"
        speed = f"{self._step_seconds():.3g} s a step"
        spent = f"{self.spent():.0f} s spent and {reserved:.0f} s reserved for the work after the last step"
        return f"time {label}: {total} steps {status}, at {speed}, with {spent}"


# Estimates of the time for evaluations and the end of a run, from the speed of its steps. They are conservative and are
# replaced by measurements.

# Cost of an evaluated token relative to a trained token: a forward pass without a backward pass.
EVALUATED_COST = 0.5
# Cost of a generated token relative to a trained token: the weights are read again for each.
GENERATED_COST = 4.0
# Number of tokens in a general prompt with its template.
PROMPT_TOKENS = 60
# Time to write files: fixed seconds, and bytes per second.
SAVING_SECONDS = 2.0
SAVING_RATE = 50e6


class CostEstimates:
    """Estimates the seconds for a session's evaluations and its end.

    Args:
        session: Session of the run.
        answers: Number of answers that each evaluation generates (``train.eval_answers``).

    Attributes:
        probes: Seconds that the probes of an evaluation take.
    """

    def __init__(self, session: Session, answers: int) -> None:
        self.probes = 0.0
        self._tokens = 0
        self._seconds = 0.0
        rows = [row for part in evaluated_rows(session) for row in part]
        max_answer_length = max((len(row) - getattr(row, "prompt_length", 0) for row in rows), default=0)
        max_answer_tokens = answers * max_answer_length + session.generation_limits.evaluation_tokens
        self._evaluation = EVALUATED_COST * sum(len(row) for row in rows) + GENERATED_COST * max_answer_tokens
        self._drift = _drift_tokens(session) + GENERATED_COST * max_new_tokens(session)
        parameter_bytes = sum(p.numel() * p.element_size() for _, p in session.method.parameters(session.model))
        self._saving = SAVING_SECONDS + parameter_bytes / SAVING_RATE
        self._keeps_best = session.config.train.saved_adapter == "best"

    def add_step(self, step: Step) -> None:
        """Record the speed of a step."""
        # Possibly more tokens were generated than trained on.
        self._tokens += max(step.computed_tokens, round(step.rows * step.metrics.get("length", 0.0)))
        self._seconds += step.seconds

    def update(self, ending: OverheadSeconds) -> None:
        """Update the estimates of values that were not measured yet."""
        token_seconds = self._seconds / max(1, self._tokens)
        if not ending.measured:
            ending.evaluation = self._evaluation * token_seconds + self.probes
        ending.after = self._drift * token_seconds + self._saving
        if self._keeps_best:  # it is restored, saved and evaluated again
            ending.after += ending.evaluation + 2 * self._saving


def evaluated_rows(session: Session) -> list[Rows]:
    """Return all rows of one evaluation, in parts."""
    return [part for rows in session.data.sets.values() for part in session.task.evaluated_rows(rows)]


def _drift_tokens(session: Session) -> float:
    """Return the cost of a drift measurement in trained tokens.

    It consists of forward passes of two models over general answers, which the base model may have to generate first.
    """
    if session.config.train.drift is False or not session.task.generates_text:
        return 0.0
    try:
        if session.config.train.drift == "auto":
            check_size(session.model)
    except NoGeneralAnswers:
        return 0.0
    num_read = len(DRIFT_PROMPTS) * (PROMPT_TOKENS + MAX_ANSWER_TOKENS)
    num_generated = (len(DRIFT_PROMPTS) + NUM_STORED_ANSWERS) * MAX_ANSWER_TOKENS
    return 2 * EVALUATED_COST * num_read + GENERATED_COST * num_generated
