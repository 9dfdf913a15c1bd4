"""All that a run watches while it trains, as one object that the run tells of each step.

It evaluates when that is due, keeps the best parameters, lets the model answer, warns, and says when the run
is to end before its last step. Between two steps :meth:`Monitor.state` gives all of it as plain values, from
which a run that goes on restores it.
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
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from transformers import PreTrainedTokenizerBase

from deltaw.data.example import Example
from deltaw.errors import UserError
from deltaw.machine.choices import Choice
from deltaw.runtime.generation import Completion
from deltaw.settings import RunConfig, duration_seconds
from deltaw.training.callbacks import Callback, Sample
from deltaw.training.evaluation.base import TEXT, Evaluation, wilson_interval
from deltaw.training.evaluation.general import NoGeneralAnswers, check_size
from deltaw.training.monitoring.best import (
    BestParameters,
    BestScore,
    Costs,
    TimeBudget,
    decided,
    evaluated_parts,
    now,
    usual_eval_every,
)
from deltaw.training.monitoring.generation import choose_rows
from deltaw.training.session import Session
from deltaw.training.state import Outcome, Step, TrainState
from deltaw.training.tasks.base import RunData, Task
from deltaw.training.tasks.causal import Answer, answers
from deltaw.working import Detail, working

# Warnings from the numbers of the steps alone: gradients that jump, steps all clipped, a rising loss.
#
# Every rule compares a run with itself: with the median and the spread of its own last steps. So none depends
# on a model, a loss or a batch size. Knows steps; not who is told.

# Steps that a rule looks back on, and that it needs before it says anything.
WINDOW, FEWEST = 100, 20
# A gradient norm is a jump where its logarithm is so many standard deviations above the median of the window
# (estimated by the median absolute deviation, which the jumps themselves do not move), and where it is so
# many times the largest norm of the window.
DEVIATIONS, TIMES_LARGEST = 8.0, 2.0
# 1 / the 75 % quantile of a normal distribution: makes the median absolute deviation a standard deviation.
OF_NORMAL = 1.4826
# The share of the window's steps that were clipped.
CLIPPED = 0.95
# The loss rises where the mean of the last steps is so many standard errors above the lowest mean of as many
# steps before, for as many steps in a row. The lowest of many means is low by chance alone, by up to three
# standard errors; this is twice that.
RISE_WINDOW, RISE_ERRORS = 50, 6.0


@dataclass(frozen=True)
class StepWarning:
    """Something about a run's steps that a person should know.

    Attributes:
        kind: ``gradient_norm``, ``clipped`` or ``rising_loss``. text: it in words.
        facts: the numbers behind it.
    """

    kind: str
    text: str
    facts: dict[str, float]

    def as_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return {"kind": self.kind, **self.facts}


@dataclass
class StepWatch:
    """Looks at each step once it is done. Each kind of warning comes once in a run.

    Attributes:
        max_grad_norm: the norm that gradients are clipped to; None for never.
    """

    max_grad_norm: float | None
    _seen: int = 0
    _norms: list[float] = field(default_factory=list)
    _losses: list[float] = field(default_factory=list)
    _lowest: Sequence[float] | None = None  # mean of the losses, and the squared error of that mean
    _risen: int = 0
    _said: list[str] = field(default_factory=list)

    def see(self, step: Step) -> list[StepWarning]:
        """The warnings after this step, which are mostly none."""
        found = []
        self._seen += 1
        if math.isfinite(step.gradient_norm) and step.gradient_norm > 0:
            found += [self._jump(step), self._clipped(step)]
        if math.isfinite(step.loss) and "reward" not in step.metrics:  # the loss of rewarded completions means nothing
            found.append(self._rising(step))
        new = [warning for warning in found if warning is not None and warning.kind not in self._said]
        self._said += [warning.kind for warning in new]
        return new

    def state(self) -> dict[str, Any]:
        return {name.removeprefix("_"): value for name, value in asdict(self).items() if name.startswith("_")}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in self.state():
            setattr(self, f"_{name}", copy.copy(state[name]))

    def _jump(self, step: Step) -> StepWarning | None:
        """A norm far above those of the steps before."""
        before, norm = self._norms[-WINDOW:], step.gradient_norm
        self._norms = [*before, norm][-WINDOW:]
        if len(before) < FEWEST or norm < TIMES_LARGEST * max(before):
            return None
        logs = [math.log(other) for other in before]
        median = statistics.median(logs)
        spread = OF_NORMAL * statistics.median(abs(value - median) for value in logs)
        if math.log(norm) < median + DEVIATIONS * spread:
            return None
        usual = math.exp(median)
        text = (
            f"step {step.step}: the gradient norm is {norm:.3g}, {norm / usual:.0f} times its median of the last "
            f"{len(before)} steps. If that comes again, look at the rows of such a step, or lower train.learning_rate"
        )
        return StepWarning("gradient_norm", text, {"value": norm, "median": usual})

    def _clipped(self, step: Step) -> StepWarning | None:
        """Nearly all of the last steps were clipped, so that the limit sets the length of each."""
        limit, norms = self.max_grad_norm, self._norms
        if limit is None or self._seen < 2 * WINDOW:  # gradients are large at first in many trainings
            return None
        share = sum(norm > limit for norm in norms) / len(norms)
        if share < CLIPPED:
            return None
        median = statistics.median(norms)
        text = (
            f"step {step.step}: {share:.0%} of the last {len(norms)} gradients were clipped to train.max_grad_norm "
            f"{limit:g}; their median norm is {median:.3g}. Steps with large gradients weigh no more than others "
            f"then; a limit of {_round_up(2 * median):g} clips only outliers"
        )
        return StepWarning("clipped", text, {"share": share, "median": median, "limit": limit})

    def _rising(self, step: Step) -> StepWarning | None:
        """The mean of the last losses stays above the lowest mean before."""
        self._losses = [*self._losses, step.loss][-2 * RISE_WINDOW :]
        if len(self._losses) < 2 * RISE_WINDOW:
            return None
        earlier = _mean_and_error(self._losses[:RISE_WINDOW])
        if self._lowest is None or earlier[0] < self._lowest[0]:
            self._lowest = earlier
        now = _mean_and_error(self._losses[RISE_WINDOW:])
        error = math.sqrt(self._lowest[1] + now[1])
        rise = now[0] - self._lowest[0]
        self._risen = self._risen + 1 if rise > RISE_ERRORS * error and rise > 0 else 0
        if self._risen < RISE_WINDOW:
            return None
        text = (
            f"step {step.step}: the training loss is rising: its mean of the last {RISE_WINDOW} steps is "
            f"{now[0]:.4f}, and was {self._lowest[0]:.4f} before. Lower train.learning_rate"
        )
        return StepWarning("rising_loss", text, {"value": now[0], "lowest": self._lowest[0]})


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and the squared standard error of it."""
    return statistics.fmean(values), statistics.variance(values) / len(values)


def _round_up(value: float) -> float:
    """To one digit, upwards."""
    power = 10.0 ** math.floor(math.log10(value))
    return round(math.ceil(value / power) * power, 10)


# What the model itself writes to held-out prompts while it trains: scored at evaluations, or shown.
#
# Decoding is greedy, draws no random numbers and leaves the model as it was found, so a training goes on as if
# nothing had happened. Knows no folders and shows nothing.

# A sample's answer has at most so many tokens; where the rows' own answers are short, fewer.
SAMPLE_TOKENS = 48
FEWEST_TOKENS = 16
# Of a model that is rewarded for whole answers.
REWARDED_TOKENS = 256
# Of the seed's random numbers, those that choose rows: for scores, and for samples.
_SCORED, _SHOWN = 11, 12
# The metric that answers give: the share that the model wrote exactly as the data says.
WRITTEN = "written_exact_match"


class Samples:
    """Answers to a few held-out prompts, of the base model and of the adapter as it trains
    (``train.samples``).

    Args:
        session: whose model answers; nothing where it writes no text.
        rows: held-out rows as the model sees them. count: how many of them.
    """

    def __init__(self, session: Session, rows: Sequence[Any], count: int) -> None:
        self._session = session
        wanted = session.task.tokenizer is not None and session.task.writes_text and count > 0
        self._rows = choose_rows(rows, count, seed=session.config.train.seed, stream=_SHOWN) if wanted else []
        longest = max((len(row) - row.prompt_length for row in self._rows), default=0)
        self._max_new_tokens = min(SAMPLE_TOKENS, max(FEWEST_TOKENS, 2 * longest))
        if written := session.written.tokens:
            self._max_new_tokens = min(REWARDED_TOKENS, written)

    def __len__(self) -> int:
        return len(self._rows)

    def of_base(self) -> list[Sample]:
        """The base model's answers. Where the method keeps no base model, call it before the first step."""
        method, model = self._session.method, self._session.model
        if not method.keeps_base(model):
            return self.of_adapter()
        with method.without(model):
            asked = (row.without_first(method.virtual_tokens) for row in self._rows)
            return self._written(list(asked), of_base=True)

    def of_adapter(self) -> list[Sample]:
        """The model's answers as it is now."""
        return self._written(self._rows)

    def _written(self, rows: Sequence[Example], of_base: bool = False) -> list[Sample]:
        with working("answering sample prompts"):
            given = write(self._session, rows, max_new_tokens=self._max_new_tokens, of_base=of_base)
        return [Sample(a.row, a.question, a.expected or None, a.written) for a in given]


def write(
    session: Session, rows: Sequence[Example], *, max_new_tokens: int | None, of_base: bool = False
) -> list[Answer]:
    """Return the model's greedy answers to rows as it sees them; see :meth:`Session.complete`."""
    tokenizer = session.task.tokenizer
    if not rows or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return []

    def complete(prompts: Sequence[np.ndarray], count: int, *_: object) -> list[Completion]:
        return session.complete(prompts, count, of_base=of_base)

    return answers(session.model, tokenizer, rows, max_new_tokens=max_new_tokens, writer=complete)


# Adds a line to a run's metrics.
Write: TypeAlias = Callable[[Mapping[str, object]], None]
# Beside the best adapter: that of the last step.
LAST = "last"
SAMPLES = 8
# The held-out rows are also evaluated before the first step if that computes at most this share of the rows of all
# steps. A forward pass takes about a third of a step, so this costs about a tenth of the training time.
BASE_SHARE = 0.35


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
            hint = "set data.eval to a share, a number of rows or a file"
            raise UserError("no rows are held out to evaluate on", where=key, hint=hint)
    if train.eval_answers and (task.has_pairs or not task.writes_text):
        what = f"written answers are not scored for the task {task.name}"
        raise UserError(what, where="train.eval_answers", hint="set it to 0")


class Monitor:
    """Watches one run.

    Args:
        session: ready to train. folder: the run's.
        callback: told of what a person should see. write: adds a line to the run's metrics.
        began: when the run began, by :func:`deltaw.training.monitoring.best.now`.

    Attributes:
        best: the best evaluation so far.
        stopped: why the run ends before its last step; None where it does not.
    """

    def __init__(self, session: Session, folder: Path, callback: Callback, write: Write, *, began: float) -> None:
        train = session.config.train
        self._session, self._folder, self._callback, self._write = session, folder, callback, write
        self.best = BestScore(train.early_stopping)
        self.stopped: str | None = None
        self._kept = BestParameters(session, folder) if train.adapter == "best" else None
        # By set, the rows whose answers are scored.
        self._scored = {
            name: choose_rows(rows, train.eval_answers, seed=train.seed, stream=_SCORED)
            for name, rows in session.data.sets.items()
            if train.eval_answers
        }
        self._samples = Samples(session, session.data.held_out, self._sample_count())
        self._base: list[Sample] | None = None
        self._watch = StepWatch(train.max_grad_norm)
        self._every = train.eval_every
        self._restored = False
        self._evaluated: int | None = None
        self._evaluation: Evaluation | None = None
        self._state: TrainState | None = None
        self._written_best: int | None = None
        self._costs = Costs(session, answers=sum(map(len, self._scored.values())))
        self.budget: TimeBudget | None = None
        if train.time is not None:
            cycle = session.config.reward.updates if session.task.rolls_out else 1
            how: dict[str, Any] = {"told": train.time, "cycle": cycle}
            self.budget = TimeBudget(duration_seconds(train.time), session.total_steps, began, now, **how)
        else:
            self._settle_every(session.total_steps)

    def before(self) -> None:
        """Evaluate the held-out rows and let the base model answer the samples, unless that was done in an earlier
        process. Call it before the first step, outside of ``session.running()``."""
        if not self._restored and self._base_is_cheap():
            # A model whose loss is not finite fails in its first step, which is diagnosed.
            with self._session.running(), contextlib.suppress(UserError):
                self._write({"step": 0, "base": self._scores().as_dict()})
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
        if extremes := getattr(self._session.feed, "extremes", None):
            self._write({"step": step.step, "completions": [one.as_dict() for one in extremes]})
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
        self._write_outcomes(step)
        return decided(self.evaluation, writes_text=self._session.task.writes_text)

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
                self._write_outcomes(best)

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
        self._restored = True
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
            self._callback.on_line(f"the parameters of the best step, {step}, are gone: the best is sought anew")
            self.best = BestScore(self.best.patience)

    def _sample_count(self) -> int:
        """How many samples, and why where the run chose it."""
        session, asked = self._session, self._session.config.train.samples
        if asked != "auto":
            return int(asked)
        chosen = Choice(SAMPLES, "a language model")
        try:
            if not session.task.writes_text:
                raise NoGeneralAnswers(f"a model for {session.task.name} writes no text")
            check_size(session.model)
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
        evaluated = sum(map(len, evaluated_parts(self._session)))
        chosen = usual_eval_every(total_steps, train.batch_size, evaluated)
        self._every = chosen.value
        self._session.chosen["train.eval_every"] = chosen
        self._callback.on_line(Detail(f"evaluating every {chosen.value} steps: {chosen.why}"))

    def _base_is_cheap(self) -> bool:
        """Whether to evaluate before the first step. Pairs are scored in relation to the base model itself, and a
        budget's time is for its steps."""
        session = self._session
        most = BASE_SHARE * session.total_steps * session.config.train.batch_size
        most *= session.written.each
        return (
            self.budget is None and not session.task.has_pairs and 0 < sum(map(len, evaluated_parts(session))) <= most
        )

    def _measured(self) -> Evaluation:
        """The evaluations of all sets, with the answers that are scored; the first one decides."""
        return self._scores(self._scored)

    def _scores(self, scored: Mapping[str, Sequence[Example]] = MappingProxyType({})) -> Evaluation:
        session, found = self._session, {}
        for name, rows in session.data.sets.items():
            found[name] = session.evaluate(rows)
            if asked := scored.get(name):
                with working("answering held-out prompts"):
                    share = statistics.fmean(one.exact for one in write(session, asked, max_new_tokens=None))
                metrics, intervals = (
                    {**found[name].metrics, WRITTEN: share},
                    {WRITTEN: wilson_interval(share, len(asked))},
                )
                found[name] = replace(found[name], metrics=metrics, intervals=intervals)
        if not session.data.eval_sets:
            return next(iter(found.values()), Evaluation())
        name, *others = found
        return replace(found[name], name=name, others={other: found[other] for other in others})

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
            writes_text = self._session.task.writes_text
            if self.best.see(step, measured, writes_text=writes_text) and self._kept:
                self._kept.keep(step)
            return decided(measured, writes_text=writes_text)

    def _write_outcomes(self, step: int) -> None:
        """Record the predictions of the last evaluation for the report."""
        sets = {self.evaluation.name: self.evaluation, **self.evaluation.others}
        kept = {name: one.outcomes_as_dict(self._text_of) for name, one in sets.items()}
        if any(kept.values()):
            self._write({"step": step, "predictions": kept})

    def _text_of(self, value: Any) -> str:
        """Return an example's text as the model reads it, or the name of its image file."""
        tokenizer, image = self._session.task.tokenizer, getattr(value, "image", value)
        if tokenizer is None or not hasattr(value, "tokens"):
            return image.name if isinstance(image, Path) else image if isinstance(image, str) else ""
        return str(tokenizer.decode(value.tokens[:TEXT], skip_special_tokens=True))[:TEXT]

    def _tell_samples(self, step: int, samples: list[Sample]) -> None:
        self._write({"step": step, "samples": [sample.as_dict() for sample in samples]})
        self._callback.on_samples(step, samples)
