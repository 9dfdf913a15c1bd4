"""Callbacks: receive the events of a run and control it.

A run does not print. It calls the methods of :class:`Callback`, which are empty by default. The command line uses
:mod:`deltaw.reports.progress`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaw.progress import Detail, LogFunction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltaw.machine.choices import Choice
    from deltaw.memory.plan import Plan
    from deltaw.settings.config import RunConfig
    from deltaw.training.evaluation.base import Evaluation
    from deltaw.training.state import NotFinite, Outcome, Step, TrainState


@dataclass(frozen=True)
class RateSearch:
    """Result of a learning rate range test.

    Attributes:
        rates: Learning rate of each step until the loss diverged.
        losses: Loss of each step until the loss diverged.
        smoothed: Smoothed losses. Before smoothing, losses are clipped so that the rise above the first losses is at
            most as large as the decrease below them.
        lowest: Rate with the lowest smoothed loss, or None if the loss did not decrease by more than its noise.
        steepest: Rate below ``lowest`` at which the loss decreases fastest, or None.
        end: Highest rate at which the loss is still about as low as at ``lowest``, or None.
        chosen: Rate used for training.
        why: Reason for the choice.
        usual: Default rate of the method, for comparison.
        diverged: True if the loss diverged before the highest rate.
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
        """Return a dictionary of JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Sample:
    """Generated answer to a held-out prompt.

    Attributes:
        row: Number of the row in the file.
        prompt: Last turn of the prompt.
        expected: Answer in the data, if any.
        answer: Answer of the model.
    """

    row: int
    prompt: str
    expected: str | None
    answer: str

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class RunStart:
    """Information about a run that is about to start: its folder exists and all automatic settings are chosen.

    Attributes:
        folder: Folder of the run.
        config: Settings of the run.
        chosen: Automatically chosen values with their reasons, by name or dotted key.
        total_parameters: Number of parameters of the model.
        trained_parameters: Number of trained parameters.
        total_steps: Planned number of optimizer steps.
    """

    folder: Path
    config: RunConfig
    chosen: Mapping[str, Choice[Any]]
    total_parameters: int
    trained_parameters: int
    total_steps: int


class Callback:
    """Base class of callbacks. The methods are listed in the order in which they are called.

    An exception in a method stops the run. :func:`deltaw.training.loop.train`, if called directly, uses only
    ``on_begin``, ``on_step``, ``on_skip``, ``should_stop``, ``should_finish`` and ``diagnose``.
    """

    def on_line(self, line: str) -> None:
        """Called with a message for the user. :class:`deltaw.progress.Detail` marks messages for verbose output."""

    def on_choice(self, name: str, choice: Choice[Any]) -> None:
        """Called when a value was chosen automatically. By default, passes a message to ``on_line``.

        ``on_start`` receives all choices.
        """
        self.on_line(Detail(f"{name}: {choice}"))

    def on_plan(self, plan: Plan, limit_bytes: int) -> None:
        """Called with the memory plan of the run and the available memory. Not called if no plan can be computed."""

    def on_start(self, start: RunStart) -> None:
        """Called when the run's folder exists and all values are chosen, before training starts."""

    def on_rate_search(self, search: RateSearch, folder: Path) -> None:
        """Called when a range test has chosen the learning rate.

        Args:
            search: Result of the range test.
            folder: Folder of the run. The measurements are stored in it.
        """

    def on_begin(self, state: TrainState) -> None:
        """Called before the first step.

        ``state`` is updated in place during training. ``state.state()`` returns the values for a checkpoint.
        """

    def on_step(self, step: Step) -> None:
        """Called after an optimizer step. Time spent here does not count as training time."""

    def on_skip(self, event: NotFinite) -> None:
        """Called after a step was skipped or is repeated, because its loss or gradient is not finite."""

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Called when the held-out rows were evaluated after ``step`` steps."""

    def on_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Called with the model's answers to held-out prompts after ``step`` steps. Step 0 is the base model."""

    def should_stop(self) -> bool:
        """Return True to interrupt the run like Ctrl-C does.

        Called after each microbatch. The adapter of the last complete step is saved.
        """
        return False

    def should_finish(self) -> bool:
        """Return True to finish the training early as if the last step were done. Called before each step."""
        return False

    def diagnose(self, event: NotFinite) -> Sequence[str]:
        """Return lines that explain why the loss or gradient of a step is not finite.

        Called before the training stops at this step. The model is in its state before the step.
        """
        return ()

    def on_end(self, outcome: Outcome | None) -> None:
        """Called when training has stopped. ``outcome`` is None if an error stopped it."""


class LineCallback(Callback):
    """Passes a run's messages to a function such as ``print``. The memory plan is not included."""

    def __init__(self, log: LogFunction) -> None:
        self._log = log

    def on_line(self, line: str) -> None:
        self._log(line)


class FunctionCallback(Callback):
    """Callback whose methods are functions, passed by method name: ``FunctionCallback(on_line=print)``. None is
    ignored.
    """

    def __init__(self, **functions: Callable[..., Any] | None) -> None:
        for name, function in functions.items():
            if function is not None:
                setattr(self, name, function)


class Callbacks(Callback):
    """Several callbacks combined into one. Each receives all events, in order. Any of them can stop the run."""

    def __init__(self, *callbacks: Callback) -> None:
        self._callbacks = callbacks

    def should_stop(self) -> bool:
        return any(callback.should_stop() for callback in self._callbacks)

    def should_finish(self) -> bool:
        return any(callback.should_finish() for callback in self._callbacks)

    def diagnose(self, event: NotFinite) -> Sequence[str]:
        return [line for callback in self._callbacks for line in callback.diagnose(event)]


def _to_each(name: str) -> Callable[..., None]:
    def forward(self: Callbacks, *arguments: Any, **keywords: Any) -> None:
        for callback in self._callbacks:
            getattr(callback, name)(*arguments, **keywords)

    forward.__name__ = name
    forward.__doc__ = getattr(Callback, name).__doc__
    return forward


# Forward all ``on_`` methods of Callback, so that new events need no change here.
for _name in vars(Callback):
    if _name.startswith("on_"):
        setattr(Callbacks, _name, _to_each(_name))
