"""Monitor of a run: it receives each step and evaluates, stores the best parameters, samples answers and warns.

It also stops the run early if required. Between two steps :meth:`Monitor.state` returns plain values for a checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from deltaw.data.example import MAX_TEXT_LENGTH
from deltaw.data.row_reader import RunData
from deltaw.errors import UserError
from deltaw.progress import Detail, track_progress
from deltaw.settings import task_registry
from deltaw.settings.config import RunConfig, duration_seconds
from deltaw.training.callbacks import Callback
from deltaw.training.evaluation.base import Evaluation, wilson_interval
from deltaw.training.monitoring.best import (
    BestParameters,
    BestScore,
    CostEstimates,
    TimeBudget,
    default_eval_every,
    evaluated_rows,
    now,
    with_deciding_metric,
)
from deltaw.training.monitoring.generation import choose_rows
from deltaw.training.monitoring.probe import Probe, WriteLine
from deltaw.training.monitoring.samples import generate_answers
from deltaw.training.session import Session
from deltaw.training.state import Outcome, Step, TrainState
from deltaw.training.task import Task

# Warnings about steps: gradient spikes, permanent clipping, and a rising loss. Each rule compares a step with recent
# steps of the same run, so it does not depend on model, loss or batch size.

# Number of recent steps that a rule considers, and the minimum number that it needs.
WINDOW = 100
MIN_STEPS = 20
# A gradient norm is a spike if its logarithm is this number of standard deviations above the median of the window, and
# if it exceeds the largest norm of the window by this factor. The standard deviation is estimated by the median
# absolute deviation, which spikes do not affect.
DEVIATIONS = 8.0
JUMP_FACTOR = 2.0
# 1 / the 75% quantile of a normal distribution. It converts a median absolute deviation to a standard deviation.
MAD_TO_STD = 1.4826
# Warn if this share of the window's steps was clipped.
CLIPPED_SHARE = 0.95
# The loss is rising if, for RISE_WINDOW steps in a row, the mean of the last RISE_WINDOW steps is RISE_ERRORS standard
# errors above the lowest previous mean. The lowest of several means is up to three standard errors low by chance. The
# threshold is twice that.
RISE_WINDOW = 50
RISE_ERRORS = 6.0
# Number of steps without any advantage after which a run with rewards warns.
STEPS_WITHOUT_ADVANTAGE = 5


@dataclass(frozen=True)
class StepWarning:
    """Warning about the steps of a run.

    Attributes:
        kind: ``gradient_norm``, ``clipped``, ``rising_loss`` or ``equal_rewards``.
        text: Message for the user.
        values: Values behind the warning.
    """

    kind: str
    text: str
    values: dict[str, float]

    def as_dict(self) -> dict[str, object]:
        """Return JSON values."""
        return {"kind": self.kind, **self.values}


@dataclass
class StepMonitor:
    """Checks each completed step. Each kind of warning is issued once per run.

    Attributes:
        max_grad_norm: Gradient clipping norm, if any.
    """

    max_grad_norm: float | None
    _seen: int = 0
    _norms: list[float] = field(default_factory=list)
    _losses: list[float] = field(default_factory=list)
    _lowest: Sequence[float] | None = None  # mean of the losses, and its squared standard error
    _risen: int = 0
    _with_advantage: int = 0  # steps in which a group of completions has different rewards
    _rewarded: int = 0  # steps with rewards
    _said: list[str] = field(default_factory=list)

    def check(self, step: Step) -> list[StepWarning]:
        """Return the warnings after this step."""
        warnings = []
        self._seen += 1
        if math.isfinite(step.gradient_norm) and step.gradient_norm > 0:
            warnings += [self._jump(step), self._clipped(step)]
        # The loss of rewarded completions is no measure of progress.
        if math.isfinite(step.loss) and "reward" not in step.metrics:
            warnings.append(self._rising(step))
        if "groups_with_advantage" in step.metrics:
            warnings.append(self._equal_rewards(step))
        new = [warning for warning in warnings if warning is not None and warning.kind not in self._said]
        self._said += [warning.kind for warning in new]
        return new

    @property
    def rewards_differed(self) -> bool | None:
        """True if a step had an advantage, so that its rewards trained the model. None if no step had rewards."""
        return self._with_advantage > 0 if self._rewarded else None

    def state(self) -> dict[str, Any]:
        return {name.removeprefix("_"): value for name, value in asdict(self).items() if name.startswith("_")}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in self.state():
            setattr(self, f"_{name}", copy.copy(state[name]))

    def _equal_rewards(self, step: Step) -> StepWarning | None:
        """Warn if the completions of each prompt have had equal rewards since the first step."""
        self._rewarded += 1
        self._with_advantage += step.metrics["groups_with_advantage"] > 0
        if self._with_advantage or self._rewarded < STEPS_WITHOUT_ADVANTAGE:
            return None
        reward = step.metrics.get("reward", math.nan)
        problem = f"all completions of a prompt had the same reward in all {self._rewarded} steps (mean {reward:.3g})"
        text = f"step {step.step}: {problem}, so the rewards have trained nothing. {EQUAL_REWARDS_ADVICE}"
        return StepWarning("equal_rewards", text, {"value": reward, "steps": self._rewarded})

    def _jump(self, step: Step) -> StepWarning | None:
        """Warn about a norm far above those of the previous steps."""
        previous_norms = self._norms[-WINDOW:]
        norm = step.gradient_norm
        self._norms = [*previous_norms, norm][-WINDOW:]
        if len(previous_norms) < MIN_STEPS or norm < JUMP_FACTOR * max(previous_norms):
            return None
        logs = [math.log(previous_norm) for previous_norm in previous_norms]
        median = statistics.median(logs)
        spread = MAD_TO_STD * statistics.median(abs(value - median) for value in logs)
        if math.log(norm) < median + DEVIATIONS * spread:
            return None
        typical_norm = math.exp(median)
        median_text = f"{norm / typical_norm:.0f} times its median of the last {len(previous_norms)} steps"
        advice = "If it happens again, check the rows of that step or lower train.learning_rate"
        text = f"step {step.step}: the gradient norm is {norm:.3g}, {median_text}. {advice}"
        return StepWarning("gradient_norm", text, {"value": norm, "median": typical_norm})

    def _clipped(self, step: Step) -> StepWarning | None:
        """Warn if nearly all recent steps were clipped, so that the limit determines the length of each step."""
        limit = self.max_grad_norm
        norms = self._norms
        if limit is None or self._seen < 2 * WINDOW:  # initial gradients are often large
            return None
        share = sum(norm > limit for norm in norms) / len(norms)
        if share < CLIPPED_SHARE:
            return None
        median = statistics.median(norms)
        clipped = f"{share:.0%} of the last {len(norms)} gradients were clipped to train.max_grad_norm {limit:g}"
        length = f"their median norm is {median:.3g}. All steps then have the same length"
        text = f"step {step.step}: {clipped}; {length}. A limit of {_round_up(2 * median):g} clips only outliers"
        return StepWarning("clipped", text, {"share": share, "median": median, "limit": limit})

    def _rising(self, step: Step) -> StepWarning | None:
        """Warn if the mean of the last losses remains above the lowest previous mean."""
        self._losses = [*self._losses, step.loss][-2 * RISE_WINDOW :]
        if len(self._losses) < 2 * RISE_WINDOW:
            return None
        earlier = _mean_and_error(self._losses[:RISE_WINDOW])
        if self._lowest is None or earlier[0] < self._lowest[0]:
            self._lowest = earlier
        current = _mean_and_error(self._losses[RISE_WINDOW:])
        error = math.sqrt(self._lowest[1] + current[1])
        rise = current[0] - self._lowest[0]
        self._risen = self._risen + 1 if rise > RISE_ERRORS * error and rise > 0 else 0
        if self._risen < RISE_WINDOW:
            return None
        means = f"{current[0]:.4f}, and was {self._lowest[0]:.4f} before. Lower train.learning_rate"
        text = f"step {step.step}: the training loss is rising: its mean of the last {RISE_WINDOW} steps is {means}"
        return StepWarning("rising_loss", text, {"value": current[0], "lowest": self._lowest[0]})


EQUAL_REWARDS_ADVICE = (
    "Check that the reward applies to the rows and can be reached, or raise reward.group or reward.temperature"
)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its squared standard error."""
    return statistics.fmean(values), statistics.variance(values) / len(values)


def _round_up(value: float) -> float:
    """Round up to one significant digit."""
    power = 10.0 ** math.floor(math.log10(value))
    return round(math.ceil(value / power) * power, 10)


# Scored answers to held-out prompts during training. Decoding is greedy, uses no random numbers and does not change the
# model, so the training is not affected.

# Random stream that selects rows for scored answers.
_ANSWER_STREAM = 11
# Metric of generated answers: share of exact matches with the data.
ANSWER_METRIC = "generated_exact_match"
# Subfolder for the adapter of the last step, if the best one is saved.
LAST = "last"
# The held-out rows are also evaluated before the first step if that computes at most this share of the rows of all
# steps. A forward pass takes about a third of a step, so this costs about a tenth of the training time.
MAX_BASE_SHARE = 0.35


def check_evaluation_settings(config: RunConfig, task: Task[Any], data: RunData) -> None:
    """Reject settings for evaluations that have no rows.

    Raises:
        UserError: if an evaluation has no held-out rows, or the task does not score generated answers.
    """
    train = config.train
    requirements = {"train.early_stopping": train.early_stopping is not None}
    requirements |= {"train.saved_adapter": train.saved_adapter == "best", "train.eval_answers": train.eval_answers > 0}
    for key, is_required in requirements.items():
        if is_required and not data.held_out:
            hint = "set data.eval to a share, a number of rows or a file"
            raise UserError("no rows are held out to evaluate on", location=key, hint=hint)
    if train.eval_answers and not task.answers_rows:
        message = f"generated answers are not scored for the task {task.name}"
        raise UserError(message, location="train.eval_answers", hint="set it to 0")


def evaluates_base(session: Session) -> bool:
    """Return True if the base model is evaluated before the first step, because it takes little time.

    It is not evaluated for pairs, which are scored relative to the base model, or with a time budget.
    """
    train = session.config.train
    max_rows = MAX_BASE_SHARE * session.total_steps * train.batch_size
    max_rows *= session.generation_limits.completions_per_row
    may_check = train.time is None and not task_registry.entry_of(session.task.name).scores_against_base
    return may_check and 0 < sum(map(len, evaluated_rows(session))) <= max_rows


class Monitor:
    """Monitors one run.

    Args:
        session: Session that is ready for training.
        folder: Folder of the run.
        callback: Receives messages and results.
        write: Appends a line to the run's metrics.
        probes: Probes that measure at each evaluation.
        start: Start of the run, measured by :func:`deltaw.training.monitoring.best.now`.

    Attributes:
        best: Best evaluation so far.
        stopped: Reason for stopping before the last step, if any.
        budget: Time budget, if any.
    """

    def __init__(
        self,
        session: Session,
        folder: Path,
        callback: Callback,
        write: WriteLine,
        *,
        probes: Sequence[Probe],
        start: float,
    ) -> None:
        train = session.config.train
        self._session = session
        self._folder = folder
        self._callback = callback
        self._write = write
        self.best = BestScore(train.early_stopping)
        self.stopped: str | None = None
        self._best_parameters = BestParameters(session, folder) if train.saved_adapter == "best" else None
        # rows with scored answers, by set
        sets = session.data.sets.items() if train.eval_answers else ()
        count = train.eval_answers
        seed = (train.seed, _ANSWER_STREAM)
        self._answer_rows = {name: choose_rows(rows, count, seed) for name, rows in sets}
        self._probes = probes
        self._step_monitor = StepMonitor(train.max_grad_norm)
        self._eval_every = train.eval_every
        self._restored = False
        self._evaluated_step: int | None = None
        self._evaluation: Evaluation | None = None
        self._state: TrainState | None = None
        self._saved_best_step: int | None = None
        self._costs = CostEstimates(session, answers=sum(map(len, self._answer_rows.values())))
        self.budget: TimeBudget | None = None
        if train.time is not None:
            seconds = duration_seconds(train.time)
            cycle = session.feed.steps_per_round
            self.budget = TimeBudget(seconds, session.total_steps, start, now, label=train.time, cycle=cycle)
        else:
            self._choose_eval_interval(session.total_steps)

    def prepare(self) -> None:
        """Evaluate the base model and call the probes for step 0, unless an earlier process did.

        Call it before the first step, outside of ``session.running()``.
        """
        if not self._restored and evaluates_base(self._session):
            # A model whose loss is not finite fails in its first step with a diagnosis.
            with self._session.running(), contextlib.suppress(UserError):
                before = self._evaluate_sets(scores_answers=False)
                self._write({"step": 0, "base": before.as_dict()})
                self._evaluate_base_of_start(before)
        start = time.perf_counter()
        self._record_probes(0)
        self._costs.probes = time.perf_counter() - start

    def _evaluate_base_of_start(self, start: Evaluation) -> None:
        """Evaluate the base model of a run that starts from an adapter, on the first set of held-out rows.

        Args:
            start: Evaluation of that adapter.
        """
        session = self._session
        method = self._session.method
        task = self._session.task
        if method.start_values is None or method.virtual_tokens or task.trains_head or task.needs_session:
            return
        with method.evaluating(session.model), method.base_model_active(session.model):
            objective = task.objective(session.model)  # with the base model's head
            base = task.evaluate(objective, session.data.held_out, session.batcher, session.data.classes)
        self._write({"step": 0, "base_model": base.as_dict()})
        scores = (evaluation.metrics.get(start.main, math.nan) for evaluation in (base, start))
        self._callback.on_line("before training: {} {:.4f} base model, {:.4f} start_from".format(start.main, *scores))

    def start(self, state: TrainState) -> None:
        """Record the training state and check the time budget before the first step of this process."""
        self._state = state
        if self.budget is not None:
            self.budget.start()

    def on_step(self, step: Step) -> Evaluation | None:
        """Process a completed step. Call it inside ``session.running()``.

        Returns:
            The evaluation after the step with the deciding metric as its main metric, or None if none was due.
        """
        if self.budget is not None:
            self.budget.step_done()
        self._costs.add_step(step)
        for warning in self._step_monitor.check(step):
            self._write({"step": step.step, "warning": warning.as_dict()})
            self._callback.on_line(warning.text)
        if extremes := self._session.feed.extremes:
            self._write({"step": step.step, "completions": [completion.as_dict() for completion in extremes]})
        return self._after(step.step)

    def on_skip(self, step: int) -> Evaluation | None:
        """Process a skipped step. See :meth:`on_step`."""
        return self._after(step)

    def _after(self, step: int) -> Evaluation | None:
        """Evaluate and revise the time budget after a step."""
        budget = self.budget
        state = self._state
        evaluation = None
        assert state is not None
        if self._eval_every and step % self._eval_every == 0 and step < state.total_steps:
            evaluation = self._evaluate(step)
        if budget is not None:
            self._costs.update(budget.overhead)
            line = budget.plan(state, self._eval_every)
            if line is not None:
                self._callback.on_line(line)
                self._choose_eval_interval(state.total_steps)
            budget.start_step()
        return evaluation

    def should_finish(self) -> bool:
        """Return True if the run stops here, before its last step."""
        if self.stopped is None and self._state is not None:
            if self.best.exhausted:
                self.stopped = self.best.reason()
            elif self.budget is not None and self.budget.is_over(self._state):
                done = self._state.step
                planned = self._state.total_steps
                self.stopped = f"time {self.budget.label}: stopped after {done} of {planned} planned steps"
            if self.stopped is not None:
                self._callback.on_line(self.stopped)
        return self.stopped is not None

    def finish(self, step: int) -> Evaluation:
        """Return the evaluation after the last step, with the deciding metric as its main metric.

        Call it inside ``session.running()``, after the training.
        """
        if self._evaluated_step != step:
            self._evaluate(step)
        elif self._evaluation is None:  # it was evaluated and reported by an earlier process
            self._evaluation = self._evaluate_sets()
        self._write_outcomes(step)
        for probe in self._probes:
            for result in probe.verify(self.evaluation):
                result.record(step, self._write, self._callback.on_line)
        return with_deciding_metric(self.evaluation, generates_text=self._session.task.generates_text)

    def save_best(self, step: int, save: Callable[[Path], None], *, evaluate: bool) -> None:
        """Save the best adapter as the run's adapter and the last one in ``last/``.

        Does nothing if the run is configured to save the last adapter. Call it inside ``session.running()``, after the
        training.

        Args:
            step: Last step.
            save: Writes the adapter to a folder.
            evaluate: Evaluate the best adapter for :attr:`evaluation`.
        """
        best = self.best.step
        if self._best_parameters is None or best is None:
            return
        save(self._folder / LAST)
        if best != step:
            self._best_parameters.restore(best)
            save(self._folder)
            best_step = f"step {best}, which was the best ({self.best.metric} {self.best.value:.4f})"
            last_step = f"step {step} is in {self._folder / LAST}"
            self._callback.on_line(f"the adapter is that of {best_step}; that of {last_step}")
            if evaluate:
                self._evaluation = self._evaluate_sets()
                self._write_outcomes(best)

    def close(self, outcome: Outcome, *, can_resume: bool) -> None:
        """Remove temporary files after the run, unless it can be resumed."""
        if self._best_parameters is not None and not can_resume and not outcome.interrupted:
            self._best_parameters.remove()

    @property
    def evaluation(self) -> Evaluation:
        """Evaluation of the saved adapter."""
        return self._evaluation or Evaluation()

    @property
    def rewards_differed(self) -> bool | None:
        """See :attr:`StepMonitor.rewards_differed`."""
        return self._step_monitor.rewards_differed

    def on_checkpoint(self) -> None:
        """The checkpoint with the last result of :meth:`state` is on disk."""
        if self._best_parameters is not None:
            self._best_parameters.on_checkpoint(self._saved_best_step)

    def state(self) -> dict[str, Any]:
        """Return JSON values for a checkpoint, between two steps."""
        self._saved_best_step = self.best.step
        return {
            "best": self.best.state(),
            "watch": self._step_monitor.state(),
            **{name: value for probe in self._probes for name, value in probe.state().items()},
            "evaluated": self._evaluated_step,
            "every": self._eval_every,
            "budget": None if self.budget is None else self.budget.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state`, before :meth:`prepare`."""
        self._restored = True
        self.best.restore(state["best"])
        self._step_monitor.restore(state["watch"])
        for probe in self._probes:
            probe.restore(state)
        self._evaluated_step = state["evaluated"]
        if self._session.config.train.eval_every is None:
            self._eval_every = state["every"]
        if self.budget is not None and state["budget"] is not None:
            self.budget.restore(state["budget"])
        step = self.best.step
        if self._best_parameters is not None and step is not None and not self._best_parameters.has(step):
            self._callback.on_line(f"the parameters of the best step, {step}, are missing: looking for a new one")
            self.best = BestScore(self.best.patience)

    def _choose_eval_interval(self, total_steps: int) -> None:
        """Choose the evaluation interval if the best evaluation is needed and the interval is not configured."""
        train = self._session.config.train
        if self._eval_every is not None or (train.early_stopping is None and train.saved_adapter != "best"):
            return
        chosen = default_eval_every(total_steps, train.batch_size, sum(map(len, evaluated_rows(self._session))))
        self._eval_every = chosen.value
        self._session.chosen["train.eval_every"] = chosen
        self._callback.on_line(Detail(f"evaluating every {chosen.value} steps: {chosen.why}"))

    def _evaluate_sets(self, *, scores_answers: bool = True) -> Evaluation:
        """Evaluate all sets, by default including scored answers. The first set decides."""
        scored = self._answer_rows if scores_answers else {}
        session = self._session
        evaluations = {}
        for name, rows in session.data.sets.items():
            evaluations[name] = session.evaluate(rows)
            if answer_rows := scored.get(name):
                with track_progress("answering held-out prompts"):
                    answers = generate_answers(session, answer_rows, max_new_tokens=None)
                share = statistics.fmean(answer.exact for answer in answers)
                metrics = {**evaluations[name].metrics, ANSWER_METRIC: share}
                intervals = {ANSWER_METRIC: wilson_interval(share, len(answer_rows))}
                evaluations[name] = replace(evaluations[name], metrics=metrics, intervals=intervals)
        if not session.data.eval_sets:
            return next(iter(evaluations.values()), Evaluation())
        name, *other_names = evaluations
        return replace(evaluations[name], name=name, other_sets={other: evaluations[other] for other in other_names})

    def _evaluate(self, step: int) -> Evaluation | None:
        """Evaluate, report the result, and update the best score."""
        with contextlib.nullcontext() if self.budget is None else self.budget.evaluating():
            measured = self._evaluate_sets()
            self._evaluated_step = step
            self._evaluation = measured
            if not measured.metrics:
                return None
            self._write({"step": step, "eval": measured.as_dict()})
            self._callback.on_evaluation(step, measured)
            self._record_probes(step)
            generates_text = self._session.task.generates_text
            if self.best.update(step, measured, generates_text=generates_text) and self._best_parameters:
                self._best_parameters.save(step)
            return with_deciding_metric(measured, generates_text=generates_text)

    def _write_outcomes(self, step: int) -> None:
        """Record the predictions of the last evaluation for the report."""
        sets = {self.evaluation.name: self.evaluation, **self.evaluation.other_sets}
        outcomes = {name: evaluation.outcomes_as_dict(self._text_of) for name, evaluation in sets.items()}
        if any(outcomes.values()):
            self._write({"step": step, "predictions": outcomes})

    def _text_of(self, value: Any) -> str:
        """Return an example's text as written or else as the model reads it, or the name of its image file."""
        if text := getattr(value, "text", ""):
            return str(text)
        tokenizer = self._session.task.tokenizer
        image = getattr(value, "image", value)
        if tokenizer is None or not hasattr(value, "tokens"):
            return image.name if isinstance(image, Path) else image if isinstance(image, str) else ""
        return str(tokenizer.decode(value.tokens[:MAX_TEXT_LENGTH], skip_special_tokens=True))[:MAX_TEXT_LENGTH]

    def _record_probes(self, step: int) -> None:
        for probe in self._probes:
            for result in probe.evaluate(step):
                result.record(step, self._write, self._callback.on_line)
