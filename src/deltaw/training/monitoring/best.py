"""What is best, when to stop, and what evaluations cost: the best score with its parameters, and time budgets.

A run with a budget measures its first steps, which count, and plans the number of steps so that all ends in
time, its evaluations and what follows the last step included; it plans again where the speed changes. Knows
scores, parameters and seconds; not what a step or an evaluation does.
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
from deltaw.training.evaluation.general import ANSWER_TOKENS, SHOWN, NoGeneralAnswers, check_size
from deltaw.training.evaluation.general_prompts import MEASURED
from deltaw.training.monitoring.generation import max_new_tokens
from deltaw.training.session import Session
from deltaw.training.state import Step, TrainState
from deltaw.training.tasks.base import Rows

if TYPE_CHECKING:
    from torch import nn


# The trained parameters as they were at the best evaluation, on disk until the run ends.
#
# Every method names its trained parameters, so they are kept as these, bit for bit, and the method writes its
# adapter from them once they are back in the model. Knows no scores.

FOLDER = "best"


class BestParameters:
    """Keeps the trained parameters of a session's best step in ``best/`` of the run's folder.

    A run that goes on from a checkpoint needs those that were the best then, so they stay until a later
    checkpoint is written.

    Args:
        session: whose parameters. folder: the run's.
    """

    def __init__(self, session: Session, folder: Path) -> None:
        self._session = session
        self._folder = folder / FOLDER
        self._needed: int | None = None  # by the last checkpoint
        self._newest: int | None = None

    def keep(self, step: int) -> None:
        """Write the parameters as they are now, whole or not at all."""
        save_tensors(self._file(step), self._parameters(), {"step": str(step)})
        self._newest = step
        self._remove_but({step, self._needed})

    def checkpointed(self, best_step: int | None) -> None:
        """A checkpoint is on the disk, written when ``best_step`` was the best: earlier ones may go."""
        self._needed = best_step
        self._remove_but({best_step, self._newest})

    def has(self, step: int) -> bool:
        """Whether the parameters of this step are there and whole."""
        try:
            with safe_open(self._file(step), framework="pt") as file:
                return set(file.keys()) == set(self._parameters())
        except (OSError, SafetensorError):
            return False

    @torch.no_grad()
    def put_back(self, step: int) -> None:
        """Give the model the parameters of this step again. Not while it trains.

        Raises:
            UserError: their file is not there, or damaged.
        """
        try:
            tensors = TensorFile(self._file(step))
            if missing := self._parameters().keys() - tensors.keys():
                raise ValueError(f"it lacks '{min(missing)}'")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"the parameters of the best step, {step}, cannot be read: {error}"
            hint = "the adapter of the last step is in the run's folder"
            raise UserError(what, where=str(self._file(step)), hint=hint) from error
        for name, parameter in self._parameters().items():
            parameter.copy_(tensors[name])
        self._session.method.after_step(self._session.model)

    def remove(self) -> None:
        """Remove all of them: the run is over."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._session.method.parameters(self._session.model))

    def _file(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}.safetensors"

    def _remove_but(self, steps: set[int | None]) -> None:
        kept = {self._file(step) for step in steps if step is not None}
        for file in self._folder.glob("step-*.safetensors"):
            if file not in kept:
                platforms.removed(file)


# Which evaluation was the best so far, and whether it has been too long since.

# Evaluations over a run where nobody says how many: at most, and at least.
MOST, FEWEST = 10, 4
# So many training rows go between two evaluations for each row that is evaluated, where ``FEWEST`` allows.
ROWS_PER_HELD_OUT = 5


def deciding_metric(evaluation: Evaluation, *, writes_text: bool) -> tuple[str, bool]:
    """The metric that the best evaluation is chosen by, and whether higher is better.

    For a model that writes text it is the loss, which changes with every step; the share of exact answers
    moves in jumps of whole rows. Other tasks are decided by their main metric.
    """
    if writes_text and "loss" in evaluation.metrics:
        return "loss", False
    return evaluation.main, evaluation.higher_is_better


def decided(evaluation: Evaluation, *, writes_text: bool) -> Evaluation:
    """The evaluation with the deciding metric as its main one."""
    metric, higher = deciding_metric(evaluation, writes_text=writes_text)
    return replace(evaluation, main=metric, higher_is_better=higher)


def usual_eval_every(total_steps: int, batch_size: int, held_out: int) -> Choice[int]:
    """Steps between evaluations where the best one is asked for and ``train.eval_every`` is null."""
    often = math.ceil(total_steps / MOST)
    cheap = math.ceil(ROWS_PER_HELD_OUT * held_out / batch_size)
    every = max(1, min(max(often, cheap), math.ceil(total_steps / FEWEST)))
    return Choice(every, f"{FEWEST} to {MOST} evaluations over {total_steps} steps, for {held_out} held-out rows")


@dataclass
class BestScore:
    """The best evaluation of a run so far.

    Attributes:
        patience: evaluations in a row without improvement after which a run is to stop; None for never.
        step, value: of the best one; None before the first. metric: that it was chosen by.
        waited: evaluations since without improvement.
    """

    patience: int | None = None
    step: int | None = None
    value: float | None = None
    metric: str = ""
    waited: int = 0

    def see(self, step: int, evaluation: Evaluation, *, writes_text: bool) -> bool:
        """Take note of an evaluation; whether it is the best so far.

        One that is equal to the best, or not a finite number, is no improvement.
        """
        metric, higher = deciding_metric(evaluation, writes_text=writes_text)
        value = evaluation.metrics.get(metric, math.nan)
        better = math.isfinite(value)
        if better and self.value is not None:
            better = value > self.value if higher else value < self.value
        if better:
            self.step, self.value, self.metric, self.waited = step, float(value), metric, 0
        else:
            self.waited += 1
        return better

    @property
    def exhausted(self) -> bool:
        """Whether it has been too long since the best."""
        return self.patience is not None and self.waited >= self.patience

    def why(self) -> str:
        """Why a run stops here, for a person."""
        best = "" if self.step is None else f" since step {self.step} ({self.metric} {self.value:.4f})"
        times = "evaluation" if self.waited == 1 else "evaluations"
        return f"early stopping: no improvement in {self.waited} {times}{best}"

    def as_dict(self) -> dict[str, object] | None:
        """The best one, ready for JSON; None before the first."""
        return None if self.step is None else {"step": self.step, "metric": self.metric, "value": self.value}

    def state(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "patience"}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in self.state():
            setattr(self, name, state[name])


# Steps that are measured before the first plan; more of them, until this share of the budget is spent.
FEWEST_MEASURED, MOST_MEASURED, MEASURING_SHARE = 3, 16, 0.02
# The speed is that of so many last steps.
WINDOW = 64
# A plan is made anew where it misses by this share of the steps to come, by more standard errors of the speed
# than these, and by more than ``SLACK`` steps.
TOLERANCE, ERRORS, SLACK = 0.05, 3.0, 2
# Kept back of the whole budget, for what no estimate knows.
MARGIN = 0.02


def now() -> float:
    """The clock of a run: seconds from some point on."""
    return time.monotonic()


@dataclass
class Ending:
    """What comes beside the steps, in seconds.

    Attributes:
        evaluation: of one evaluation, with the answers that it writes; estimated until one is measured.
        after: all that follows the last step but the last evaluation: drift, saving.
        measured: whether an evaluation was measured.
    """

    evaluation: float = 0.0
    after: float = 0.0
    measured: bool = False


@dataclass
class TimeBudget:
    """Plans the number of steps of a training so that the run ends in time.

    Attributes:
        seconds: of the whole run, from ``began``.
        most_steps: the steps of the run if there were time enough.
        began: when the run began, by ``clock``.
        clock: gives the time in seconds.
        ending: what comes beside the steps.
        told: the text of the setting, for messages.
        cycle: steps after which their durations repeat: a rollout takes time in the first of ``reward.updates`` alone.
        planned: whether the number of steps was planned already.
    """

    seconds: float
    most_steps: int
    began: float
    clock: Callable[[], float] = now
    ending: Ending = field(default_factory=Ending)
    told: str = ""
    cycle: int = 1
    _spent_before: float = 0.0  # by earlier processes of the same run
    planned: bool = False
    _mark: float | None = None
    _durations: list[float] = field(default_factory=list)
    _error_planned: float = 0.0

    def spent(self) -> float:
        """Seconds since the run began, those of earlier processes included."""
        return self._spent_before + self.clock() - self.began

    def begin(self) -> None:
        """The first step of this process is about to begin.

        Raises:
            UserError: the time is over, and no step was ever done.
        """
        if self.spent() >= self.seconds and not self._spent_before:
            what = f"the time is over before the first step: reading the model and the rows took {self.spent():.0f} s"
            raise UserError(what, where="train.time", hint="give more time")

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around an evaluation, whose time tells that of the ones to come."""
        begun = self.clock()
        yield
        took = self.clock() - begun
        self.ending.evaluation = max(took, self.ending.evaluation) if self.ending.measured else took
        self.ending.measured = True

    def step_done(self) -> None:
        """Measure the step that has just ended, unless it is the process's first, which prepares what later ones
        use."""
        if self._mark is not None:
            self._durations = [*self._durations, self.clock() - self._mark][-WINDOW:]

    def plan(self, state: TrainState, every: int | None) -> str | None:
        """Plan the number of steps where that is due.

        Args:
            state: of the training, which is given the number of steps.
            every: steps between evaluations, if any.

        Returns:
            a line about a new plan.
        """
        measured = len(self._durations)
        due = self.planned or measured >= MOST_MEASURED or sum(self._durations) >= MEASURING_SHARE * self.seconds
        return self._plan(state, every) if measured >= max(FEWEST_MEASURED, self.cycle) and due else None

    def go_on(self) -> None:
        """All that follows a step is done; the next one begins."""
        self._mark = self.clock()

    def over(self, state: TrainState) -> bool:
        """Whether another step would end too late."""
        if state.step == 0 or not self._durations:
            return self.spent() >= self.seconds
        several = 1 < self.cycle <= len(self._durations)
        return self._left() < (self._durations[-self.cycle] if several else self._step_seconds()) / 2

    def state(self) -> dict[str, Any]:
        ending = {"evaluation": self.ending.evaluation, "evaluation_measured": self.ending.measured}
        return {"spent": self.spent(), "planned": self.planned, **ending}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._spent_before = float(state["spent"])
        self.planned = bool(state["planned"])
        self.ending.evaluation = float(state["evaluation"])
        self.ending.measured = bool(state["evaluation_measured"])

    def _step_seconds(self) -> float:
        times = self._durations[len(self._durations) % self.cycle :] or self._durations
        return sum(times) / len(times)

    def _left(self) -> float:
        """Seconds that are left for steps, and for evaluations between them."""
        kept = self.ending.evaluation + self.ending.after + MARGIN * self.seconds
        return self.seconds - self.spent() - kept

    def _plan(self, state: TrainState, every: int | None) -> str | None:
        each = self._step_seconds() + (self.ending.evaluation / every if every else 0.0)
        fitting = max(0, math.floor(self._left() / each)) if each > 0 else self.most_steps
        total = min(self.most_steps, state.step + fitting)
        to_come = max(1, state.total_steps - state.step)
        off = abs(total - state.total_steps)
        times = self._durations
        # The standard error of the mean step, as a share of it.
        error = statistics.stdev(times) / math.sqrt(len(times)) / max(1e-9, statistics.fmean(times))
        tolerance = max(TOLERANCE, ERRORS * math.hypot(error, self._error_planned))
        if self.planned and (off <= SLACK or off <= tolerance * to_come):
            return None
        again, self.planned, self._error_planned = self.planned, True, error
        changed = total != state.total_steps
        state.replan(total)
        if again and not changed:
            return None
        what = ("planned anew" if again else "planned") + (" (all there are)" if total == self.most_steps else "")
        kept = self.ending.evaluation + self.ending.after
        return (
            f"time {self.told or f'{self.seconds:g}s'}: {total} steps {what}, at {self._step_seconds():.3g} s a step, "
            f"with {self.spent():.0f} s spent and {kept:.0f} s kept for what follows the last step"
        )


# What a run's evaluations and its end will take, estimated from the speed of its steps.
#
# Estimates are cautious, and give way to what is measured: a run with a time budget keeps so much time back.

# A token that is only evaluated, of one that is trained on: a forward without a backward.
FORWARD = 0.5
# A token that is written, of one that is trained on: the weights are read again for each.
WRITTEN = 4.0
# Tokens of a general prompt with its template.
PROMPT_TOKENS = 60
# Writing files: seconds, and bytes per second.
SAVING_SECONDS, SAVING_RATE = 2.0, 50e6


class Costs:
    """Estimates of seconds for a session's evaluations and its end.

    Args:
        answers: that each evaluation writes (``train.eval_answers``).

    Attributes:
        samples: seconds that the answers to the sample prompts took.
    """

    def __init__(self, session: Session, answers: int) -> None:
        self.samples = 0.0
        self._tokens, self._seconds = 0, 0.0
        rows = [row for part in evaluated_parts(session) for row in part]
        longest = max((len(row) - getattr(row, "prompt_length", 0) for row in rows), default=0)
        self._evaluation = FORWARD * sum(len(row) for row in rows) + WRITTEN * (
            answers * longest + session.written.evaluation
        )
        self._drift = _drift_tokens(session) + WRITTEN * max_new_tokens(session)
        trained = sum(p.numel() * p.element_size() for _, p in session.method.parameters(session.model))
        self._saving = SAVING_SECONDS + trained / SAVING_RATE
        self._keeps_best = session.config.train.adapter == "best"

    def see(self, step: Step) -> None:
        """Take note of the speed of a step."""
        written = round(step.rows * step.metrics.get("length", 0.0))  # of which few may have been trained on
        self._tokens += max(step.computed_tokens, written)
        self._seconds += step.seconds

    def tell(self, ending: Ending) -> None:
        """Estimate what was not measured yet."""
        a_token = self._seconds / max(1, self._tokens)
        if not ending.measured:
            ending.evaluation = self._evaluation * a_token + self.samples
        ending.after = self._drift * a_token + self._saving
        if self._keeps_best:  # it is put back, saved and evaluated again
            ending.after += ending.evaluation + 2 * self._saving


def evaluated_parts(session: Session) -> list[Rows]:
    """Return all rows that one evaluation of a run computes, in parts."""
    return [part for rows in session.data.sets.values() for part in session.task.evaluated_rows(rows)]


def _drift_tokens(session: Session) -> float:
    """What measuring drift takes, in tokens that are trained on: two models' forwards over general answers,
    which the base model may have to write first."""
    if session.config.train.drift is False or not session.task.writes_text:
        return 0.0
    try:
        if session.config.train.drift == "auto":
            check_size(session.model)
    except NoGeneralAnswers:
        return 0.0
    read = len(MEASURED) * (PROMPT_TOKENS + ANSWER_TOKENS)
    return 2 * FORWARD * read + WRITTEN * (len(MEASURED) + SHOWN) * ANSWER_TOKENS
