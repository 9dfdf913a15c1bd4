"""All that a run watches while it trains, as one object that the run tells of each step.

It evaluates when that is due, keeps the best parameters, lets the model answer, warns, and says when the run
is to end before its last step. Between two steps :meth:`Monitor.state` gives all of it as plain values, from
which a run that goes on restores it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltaw.config import RunConfig
from deltaw.errors import UserError
from deltaw.host.choices import Choice
from deltaw.train_settings import duration_seconds
from deltaw.training.callbacks import Callback
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.evaluation.general import NoGeneralAnswers, check_size
from deltaw.training.monitoring.best_parameters import BestParameters
from deltaw.training.monitoring.best_score import BestScore, decided, usual_eval_every
from deltaw.training.monitoring.ending import Costs
from deltaw.training.monitoring.step_watch import StepWatch
from deltaw.training.monitoring.time_budget import TimeBudget, now
from deltaw.training.monitoring.written_answers import Sample, Samples, WrittenAnswers
from deltaw.training.session import Session
from deltaw.training.state import Outcome, Step, TrainState
from deltaw.training.tasks.base import RunData, Task

# Beside the best adapter: that of the last step.
LAST = "last"
SAMPLES = 2


def check_monitored(config: RunConfig, task: Task, data: RunData) -> None:
    """Refuse settings that ask for evaluations which there are no rows for.

    Raises:
        UserError: they do.
    """
    train = config.train
    asked = {
        "train.early_stopping": train.early_stopping is not None,
        "train.adapter": train.adapter == "best",
        "train.eval_answers": train.eval_answers > 0,
    }
    for key, is_asked in asked.items():
        if is_asked and not data.held_out:
            raise UserError(
                "no rows are held out to evaluate on",
                where=key,
                hint="set data.eval to a share, a number of rows or a file",
            )
    if train.eval_answers and (task.has_pairs or not task.writes_text):
        raise UserError(
            f"written answers are not scored for the task {task.name}",
            where="train.eval_answers",
            hint="set it to 0",
        )


class Monitor:
    """Watches one run.

    Args:
        session: ready to train. folder: the run's.
        callback: told of what a person should see. write: adds a line to the run's metrics.
        began: when the run began, by ``clock``. clock: gives the time in seconds; None: the run's own.

    Attributes:
        best: the best evaluation so far.
        stopped: why the run ends before its last step; None where it does not.
    """

    def __init__(
        self,
        session: Session,
        folder: Path,
        callback: Callback,
        write: Callable[[Mapping[str, object]], None],
        *,
        began: float | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        train = session.config.train
        self._session = session
        self._folder = folder
        self._callback = callback
        self._write = write
        self.best = BestScore(train.early_stopping)
        self.stopped: str | None = None
        self._kept = BestParameters(session, folder) if train.adapter == "best" else None
        self._answers = WrittenAnswers(session, session.data.sets)
        self._samples = Samples(session, session.data.held_out, self._sample_count())
        self._base: list[Sample] | None = None
        self._watch = StepWatch(train.max_grad_norm)
        self._every = train.eval_every
        self._evaluated: int | None = None
        self._evaluation: Evaluation | None = None
        self._state: TrainState | None = None
        self._written_best: int | None = None
        self._costs = Costs(session, self._answers.count)
        self.budget: TimeBudget | None = None
        if train.time is not None:
            clock = clock or now
            began = clock() if began is None else began
            seconds = duration_seconds(train.time)
            self.budget = TimeBudget(seconds, session.total_steps, began, clock, told=train.time)
        else:
            self._settle_every(session.total_steps)

    def before(self) -> None:
        """Let the base model answer the samples, unless it did in an earlier process. Call it before the
        first step, outside of ``session.running()``."""
        if not len(self._samples) or self._base is not None:
            return
        begun = time.perf_counter()
        self._base = self._samples.of_base()
        self._costs.samples = time.perf_counter() - begun
        self._tell_samples(0, self._base)

    def begin(self, state: TrainState) -> None:
        """The first step of this process is about to begin."""
        self._state = state
        if self.budget is not None:
            self.budget.begin()

    def on_step(self, step: Step) -> Evaluation | None:
        """A step is done. Call within ``session.running()``.

        Returns:
            the evaluation that followed, with the deciding metric as its main one; None where none was due.
        """
        if self.budget is not None:
            self.budget.step_done()
        self._costs.see(step)
        for warning in self._watch.see(step):
            self._write({"step": step.step, "warning": warning.as_dict()})
            self._callback.on_line(warning.text)
        return self._after(step.step)

    def on_skip(self, step: int) -> Evaluation | None:
        """A step was left out. Else as :meth:`on_step`."""
        return self._after(step)

    def _after(self, step: int) -> Evaluation | None:
        """What follows a step: an evaluation, and the plan of the steps to come."""
        budget, state, found = self.budget, self._state, None
        assert state is not None
        if self._every and step % self._every == 0 and step < state.total_steps:
            found = self._evaluate(step)
        if budget is not None:
            self._costs.tell(budget.ending)
            line = budget.plan(state, self._every)
            if line is not None:
                self._callback.on_line(line)
                self._settle_every(state.total_steps)
            budget.go_on()
        return found

    def ended(self) -> bool:
        """Whether the run is to end here, before its last step."""
        if self.stopped is None and self._state is not None:
            if self.best.exhausted:
                self.stopped = self.best.why()
            elif self.budget is not None and self.budget.over(self._state):
                done, planned = self._state.step, self._state.total_steps
                self.stopped = f"time {self.budget.told}: stopped after {done} of {planned} planned steps"
            if self.stopped is not None:
                self._callback.on_line(self.stopped)
        return self.stopped is not None

    def finish(self, step: int) -> Evaluation:
        """The evaluation after the last step, with the deciding metric as its main one. Call within
        ``session.running()``, after the training."""
        if self._evaluated != step:
            self._evaluate(step)
        elif self._evaluation is None:  # it was evaluated by an earlier process, and told then
            self._evaluation = self._measured()
        return self._decided(self._evaluation or Evaluation())

    def put_best(self, step: int, save: Callable[[Path], None], *, evaluate: bool) -> None:
        """Make the run's adapter the best one, with the last beside it; nothing where the last is asked for.

        Call within ``session.running()``, after the training.

        Args:
            step: the last one. save: writes the adapter into a folder.
            evaluate: whether the best one is to be evaluated for :attr:`evaluation`.
        """
        best = self.best.step
        if self._kept is None or best is None:
            return
        save(self._folder / LAST)
        if best != step:
            self._kept.put_back(best)
            save(self._folder)
            self._callback.on_line(
                f"the adapter is that of step {best}, which was the best ({self.best.metric} "
                f"{self.best.value:.4f}); that of step {step} is in {self._folder / LAST}"
            )
            if evaluate:
                self._evaluation = self._measured()

    def done(self, outcome: Outcome, *, goes_on: bool) -> None:
        """The run is over, and all is written; what it kept goes, unless a later run can go on from here."""
        if self._kept is not None and not goes_on and not outcome.interrupted:
            self._kept.remove()

    @property
    def evaluation(self) -> Evaluation:
        """Of the adapter that the run keeps."""
        return self._evaluation or Evaluation()

    def checkpointed(self) -> None:
        """The checkpoint with what :meth:`state` gave last is on the disk."""
        if self._kept is not None:
            self._kept.checkpointed(self._written_best)

    def state(self) -> dict[str, Any]:
        """All of it as plain values, ready for JSON; between two steps."""
        self._written_best = self.best.step
        return {
            "best": self.best.state(),
            "watch": self._watch.state(),
            "samples": None if self._base is None else [sample.as_dict() for sample in self._base],
            "evaluated": self._evaluated,
            "every": self._every,
            "budget": None if self.budget is None else self.budget.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave, before :meth:`before`."""
        self.best.restore(state["best"])
        self._watch.restore(state["watch"])
        if state["samples"] is not None:
            self._base = [Sample(**sample) for sample in state["samples"]]
        self._evaluated = state["evaluated"]
        if self._session.config.train.eval_every is None:
            self._every = state["every"]
        if self.budget is not None and state["budget"] is not None:
            self.budget.restore(state["budget"])
        step = self.best.step
        if self._kept is not None and step is not None and not self._kept.has(step):
            self._callback.on_line(
                f"the parameters of the best step, {step}, are gone: the best is sought anew"
            )
            self.best = BestScore(self.best.patience)

    def _sample_count(self) -> int:
        """How many samples, and why where the run chose it."""
        session, asked = self._session, self._session.config.train.samples
        if asked != "auto":
            return int(asked)
        count = SAMPLES
        try:
            if not session.task.writes_text:
                raise NoGeneralAnswers(f"a model for {session.task.name} writes no text")
            check_size(session.model)
            chosen = Choice(count, "a language model")
        except NoGeneralAnswers as reason:
            chosen = Choice(0, str(reason))
        session.chosen["train.samples"] = chosen
        return chosen.value

    def _settle_every(self, total_steps: int) -> None:
        """Choose how often to evaluate, where something asks for the best evaluation and nothing says how
        often."""
        train = self._session.config.train
        if self._every is not None or (train.early_stopping is None and train.adapter != "best"):
            return
        held_out = sum(len(rows) for rows in self._session.data.sets.values())
        chosen = usual_eval_every(total_steps, train.batch_size, held_out)
        self._every = chosen.value
        self._session.chosen["train.eval_every"] = chosen
        self._callback.on_line(f"evaluating every {chosen.value} steps: {chosen.why}")

    def _measured(self) -> Evaluation:
        """The evaluations of all sets; the first one decides."""
        session = self._session
        found = {
            name: self._answers.scored(name, session.evaluate(rows))
            for name, rows in session.data.sets.items()
        }
        if not session.data.eval_sets:
            return next(iter(found.values()), Evaluation())
        name, *others = found
        return replace(found[name], name=name, others={other: found[other] for other in others})

    def _decided(self, evaluation: Evaluation) -> Evaluation:
        return decided(evaluation, writes_text=self._session.task.writes_text)

    def _evaluate(self, step: int) -> Evaluation | None:
        """Evaluate, tell it, and note whether it is the best so far."""
        timed = contextlib.nullcontext() if self.budget is None else self.budget.evaluating()
        with timed:
            measured = self._measured()
            self._evaluated, self._evaluation = step, measured
            if not measured.metrics:
                return None
            self._write({"step": step, "eval": measured.as_dict()})
            self._callback.on_evaluation(step, measured)
            if len(self._samples):
                self._tell_samples(step, self._samples.of_adapter())
            if self.best.see(step, measured, writes_text=self._session.task.writes_text) and self._kept:
                self._kept.keep(step)
            return self._decided(measured)

    def _tell_samples(self, step: int, samples: list[Sample]) -> None:
        self._write({"step": step, "samples": [sample.as_dict() for sample in samples]})
        self._callback.on_samples(step, samples)
