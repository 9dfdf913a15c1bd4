"""What a caller wants to see of a run, or do while it goes on: one class whose methods all do nothing.

A run never prints. It tells its callback, and a caller overrides the methods that it needs. The command line
has one that draws on a terminal (:mod:`deltaw.reports.progress`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from deltaw.working import Detail

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltaw.machine.choices import Choice
    from deltaw.memory.plan import Plan
    from deltaw.settings import RunConfig
    from deltaw.training.evaluation.base import Evaluation
    from deltaw.training.state import NotFinite, Outcome, Step, TrainState

# Told one line of text that a person may want to read.
Say: TypeAlias = Callable[[str], None]


def silent(line: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class RateSearch:
    """What a range test came to.

    Attributes:
        rates, losses: of each step, until the loss ran away.
        smoothed: the losses, smoothed over steps; those that run away count as much as they may fall.
        lowest: the rate of the lowest smoothed loss. steepest: that where it falls fastest before. end: the
            highest one at which it is still about as low.
        chosen, why: the rate for the training.
        usual: the method's usual rate, for comparison.
        diverged: whether the loss ran away before the highest rate.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    lowest: float | None
    steepest: float | None
    end: float | None
    chosen: float
    why: str
    usual: float
    diverged: bool

    def as_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Sample:
    """One held-out prompt with its answer.

    Attributes:
        row: its number in the file. prompt: its last turn. expected: the answer that the data has, if it has one.
        answer: what the model wrote.
    """

    row: int
    prompt: str
    expected: str | None
    answer: str

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class RunStart:
    """A run whose folder is there and of which everything is chosen.

    Attributes:
        folder: of the run.
        config: the settings.
        chosen: by name or dotted key, what the run chose itself and why.
        total_parameters, trained_parameters: N and M.
        total_steps: optimizer steps that are planned.
    """

    folder: Path
    config: RunConfig
    chosen: Mapping[str, Choice]
    total_parameters: int
    trained_parameters: int
    total_steps: int


class Callback:
    """Told of what a run does, in the order of the methods below. An exception ends the run.

    A training alone (:func:`deltaw.training.loop.train`) calls ``on_begin``, ``on_step``, ``on_skip``,
    ``should_stop``, ``ended`` and ``diagnose``.
    """

    def on_line(self, line: str) -> None:
        """A choice, a note or an account of the rows, in words; a :class:`deltaw.working.Detail` only for whoever
        wants to know more."""

    def on_choice(self, name: str, choice: Choice) -> None:
        """The run chose a value itself. A line, unless overridden; ``on_start`` has them all."""
        self.on_line(Detail(f"{name}: {choice}"))

    def on_plan(self, plan: Plan, limit_bytes: int) -> None:
        """The memory that the run will need, and the bytes that the machine gives; not where no plan can be
        made."""

    def on_start(self, start: RunStart) -> None:
        """The run's folder is there, and everything is chosen; nothing is trained yet."""

    def on_rate_search(self, search: RateSearch, folder: Path) -> None:
        """A learning rate was found by a range test; ``folder`` is the run's, which holds the numbers."""

    def on_begin(self, state: TrainState) -> None:
        """The first step is about to begin. ``state`` stays current: ``state.state()`` is what a later run
        continues from."""

    def on_step(self, step: Step) -> None:
        """An optimizer step is done. The time that this takes is not counted as training."""

    def on_skip(self, found: NotFinite) -> None:
        """A step was left out, since its loss or gradient is not finite (``train.not_finite: skip``)."""

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """The held-out rows were evaluated after so many steps."""

    def on_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """The model's answers to a few held-out prompts after so many steps; at step 0 the base model's."""

    def should_stop(self) -> bool:
        """Asked after each microbatch. True ends the run as Ctrl-C does: the adapter as of the last whole
        step is saved."""
        return False

    def ended(self) -> bool:
        """Asked before each step. True ends the training as its last step does."""
        return False

    def diagnose(self, found: NotFinite) -> Sequence[str]:
        """Asked, in lines, what is wrong with a step that ends the training, since its loss or gradient is not
        finite. The model is as it was before the step."""
        return ()

    def on_end(self, outcome: Outcome | None) -> None:
        """No further step comes; ``outcome`` is None where an error ended the training."""


class Lines(Callback):
    """Hands a run's lines to a function, such as ``print``; the plan is not among them."""

    def __init__(self, say: Say) -> None:
        self._say = say

    def on_line(self, line: str) -> None:
        self._say(line)


class Calling(Callback):
    """A callback made of functions, by the names of the methods that they stand for."""

    def __init__(self, **functions: Callable[..., Any] | None) -> None:
        for name, function in functions.items():
            if function is not None:
                setattr(self, name, function)


class Callbacks(Callback):
    """Several callbacks as one: each is told everything, in this order; any of them may stop the run."""

    def __init__(self, *callbacks: Callback) -> None:
        self._callbacks = callbacks

    def should_stop(self) -> bool:
        return any(callback.should_stop() for callback in self._callbacks)

    def ended(self) -> bool:
        return any(callback.ended() for callback in self._callbacks)

    def diagnose(self, found: NotFinite) -> Sequence[str]:
        return [line for callback in self._callbacks for line in callback.diagnose(found)]


def _to_each(name: str) -> Callable[..., None]:
    def tell(self: Callbacks, *arguments: Any, **named: Any) -> None:
        for callback in self._callbacks:
            getattr(callback, name)(*arguments, **named)

    tell.__name__, tell.__doc__ = name, getattr(Callback, name).__doc__
    return tell


# Whatever a callback is told, so that one that is added later is not forgotten here.
for _name in vars(Callback):
    if _name.startswith("on_"):
        setattr(Callbacks, _name, _to_each(_name))
