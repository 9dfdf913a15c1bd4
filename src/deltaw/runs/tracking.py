"""Send the metrics of a run to TensorBoard, trackio or Weights & Biases (setting ``track``).

The tracker's package is checked before anything is loaded. A tracker that fails later is reported once and disabled;
the run continues, and ``metrics.jsonl`` contains all metrics.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from deltaw.errors import UserError
from deltaw.settings.config import RunConfig, flat
from deltaw.training.callbacks import Callback, Callbacks, RunStart
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.state import Step, TrainState

PROJECT = "deltaw"
# Values of a step that are sent. Other values can be derived from them.
STEP_METRICS = ("loss", "learning_rate", "gradient_norm", "epoch", "general_loss")


class Tracker(Protocol):
    """Interface of trackers. They are created with the run's folder, its settings by dotted key, and its first step."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers by name for a step."""

    def close(self) -> None:
        """Finish the tracked run."""


class TensorBoard:
    """Writes event files to the folder ``tensorboard`` of the run."""

    def __init__(self, folder: Path, settings: Mapping[str, object], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step or None)
        rows = "".join(f"\n| {key} | {_cell(value)} |" for key, value in settings.items())
        self._writer.add_text("settings", "| setting | value |\n| --- | --- |" + rows, first_step)
        self._writer.flush()

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """Logs to a trackio run in the project ``TRACKIO_PROJECT``, which is stored locally by default."""

    def __init__(self, folder: Path, settings: Mapping[str, object], first_step: int) -> None:
        self._trackio: Any = importlib.import_module("trackio")
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        # Disable trackio's printing and GPU logging if this version supports these options.
        parameters = inspect.signature(self._trackio.init).parameters
        quiet: dict[str, Any] = {name: False for name in ("embed", "auto_log_gpu") if name in parameters}
        self._trackio.init(project=project, name=folder.name, config=_plain(settings), resume="allow", **quiet)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        self._trackio.finish()


class WandB:
    """Logs to a Weights & Biases run in the project ``WANDB_PROJECT``. ``WANDB_MODE=offline`` stores it locally."""

    def __init__(self, folder: Path, settings: Mapping[str, object], first_step: int) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            config=_plain(settings),
            dir=str(folder),
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


# Creates a tracker from the run's folder, its settings and its first step.
TrackerFactory: TypeAlias = Callable[[Path, Mapping[str, object], int], Tracker]
TRACKERS: dict[str, TrackerFactory] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": WandB}


class TrackingCallback(Callback):
    """Sends settings, steps and evaluations of a run to a tracker.

    Args:
        name: Key of :data:`TRACKERS`.
        log: Receives a message if the tracker fails. The tracker is disabled then.
    """

    def __init__(self, name: str, callback: Callback) -> None:
        self._name = name
        self._callback = callback
        self._start: RunStart | None = None
        self._tracker: Tracker | None = None

    def on_start(self, start: RunStart) -> None:
        self._start = start

    def on_begin(self, state: TrainState) -> None:
        if (start := self._start) is not None:
            settings = resolved_settings(start)
            self._try(lambda: self._open(start.folder, settings, state.step))

    def _open(self, folder: Path, settings: Mapping[str, object], first_step: int) -> None:
        self._tracker = TRACKERS[self._name](folder, settings, first_step)

    def on_step(self, step: Step) -> None:
        step_values = step.as_dict()
        values = {f"train/{name}": step_values[name] for name in STEP_METRICS if name in step_values}
        values |= {f"train/{name.replace(' ', '/')}": value for name, value in step.metrics.items()}
        if step.seconds:
            values["train/tokens_per_second"] = step.tokens / step.seconds
        self._log(values, step.step)

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        self._log({f"eval/{name.replace(' ', '/')}": value for name, value in evaluation.named_metrics().items()}, step)

    def close(self) -> None:
        """Flush and close the tracker at the end of the run."""
        tracker = self._tracker
        self._tracker = None
        if tracker is not None:
            self._try(tracker.close)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        tracker = self._tracker
        if tracker is not None and finite:
            self._try(lambda: tracker.log(finite, step))

    def _try(self, call: Callable[[], None]) -> None:
        """Call the tracker with its output suppressed, and disable it if it raises."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                call()
        except Exception as error:
            self._tracker = None
            brief = [*str(error).strip().splitlines(), "no reason given"][0][:160]
            message = f"failed and gets no more metrics ({type(error).__name__}: {brief})"
            self._callback.on_line(f"track {self._name}: {message}")


@contextlib.contextmanager
def tracked(config: RunConfig, callback: Callback) -> Iterator[Callback]:
    """Add the tracker in the settings to a run's callback.

    Raises:
        UserError: If the tracker's package is not installed.
    """
    if config.track is None:
        yield callback
        return
    check_installed(config.track)
    with contextlib.closing(TrackingCallback(config.track, callback)) as tracking:
        yield Callbacks(callback, tracking)


def check_installed(name: str) -> None:
    """Check that the package of a tracker is installed.

    Raises:
        UserError: If it is not.
    """
    if importlib.util.find_spec(name) is None:  # tracker, module and package have the same name
        extra = "" if name == "wandb" else ', or pip install "deltaw[track]"'
        hint = f"pip install {name}{extra}; without a tracker all metrics are in metrics.jsonl"
        raise UserError(f"track: {name} needs the package {name}, which is not installed", location="track", hint=hint)


def resolved_settings(start: RunStart) -> dict[str, object]:
    """Return the settings by dotted key, with automatic choices in place of ``auto``."""
    chosen = {key: choice.value for key, choice in start.chosen.items()}
    counts = {"trained_parameters": start.trained_parameters, "total_steps": start.total_steps}
    return {**flat(start.config.model_dump(mode="json")), **chosen, **counts}


def _plain(settings: Mapping[str, object]) -> dict[str, object]:
    """Convert settings to types that trackers accept: numbers, strings, lists and dictionaries."""
    supported = (bool, int, float, str, list, dict, type(None))
    return {key: value if isinstance(value, supported) else str(value) for key, value in settings.items()}


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
