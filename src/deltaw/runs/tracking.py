"""Metrics of a run sent to a tracker: TensorBoard, trackio or Weights & Biases, by the setting ``track``.

A tracker is a :class:`~deltaw.training.callbacks.Callback` around the few calls that all of them share. It is
looked for before anything is loaded. One that fails later does not end the run: it is told once, and the
run's own ``metrics.jsonl`` has every number anyway.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from deltaw.errors import UserError
from deltaw.settings import RunConfig, flat
from deltaw.training.callbacks import Callback, Callbacks, RunStart
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.state import Step, TrainState

PROJECT = "deltaw"
# What of a step is sent; the rest can be computed from it.
STEP = ("loss", "learning_rate", "gradient_norm", "epoch", "general_loss")


class Tracker(Protocol):
    """What every tracker takes. Each is made with the run's folder and its settings by dotted key."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name, after so many steps."""

    def close(self) -> None:
        """Nothing more comes."""


class TensorBoard:
    """Event files in the folder ``tensorboard`` of the run."""

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
    """A run of the project that ``TRACKIO_PROJECT`` names, kept on this machine by default."""

    def __init__(self, folder: Path, settings: Mapping[str, object], first_step: int) -> None:
        self._trackio: Any = importlib.import_module("trackio")
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        # Where this version has them: against what it would print and measure itself.
        known = inspect.signature(self._trackio.init).parameters
        quiet: dict[str, Any] = {name: False for name in ("embed", "auto_log_gpu") if name in known}
        self._trackio.init(project=project, name=folder.name, config=_plain(settings), resume="allow", **quiet)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        self._trackio.finish()


class WandB:
    """A run of the project that ``WANDB_PROJECT`` names; ``WANDB_MODE=offline`` keeps it on this machine."""

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


# Makes the tracker of a run, from its folder, its settings and its first step.
Maker: TypeAlias = Callable[[Path, Mapping[str, object], int], Tracker]
TRACKERS: dict[str, Maker] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": WandB}


class TrackingCallback(Callback):
    """Sends a run's settings, steps and evaluations to a tracker.

    Args:
        name: of :data:`TRACKERS`.
        tell: told where the tracker fails; nothing is sent from then on.
    """

    def __init__(self, name: str, tell: Callback) -> None:
        self._name, self._tell = name, tell
        self._start: RunStart | None = None
        self._tracker: Tracker | None = None

    def on_start(self, start: RunStart) -> None:
        self._start = start

    def on_begin(self, state: TrainState) -> None:
        start = self._start
        if start is None:
            return
        settings = settings_of(start)
        self._try(lambda: self._open(start.folder, settings, state.step))

    def _open(self, folder: Path, settings: Mapping[str, object], first_step: int) -> None:
        self._tracker = TRACKERS[self._name](folder, settings, first_step)

    def on_step(self, step: Step) -> None:
        told = step.as_dict()
        values = {f"train/{name}": told[name] for name in STEP if name in told}
        values |= {f"train/{name.replace(' ', '/')}": value for name, value in step.metrics.items()}
        if step.seconds:
            values["train/tokens_per_second"] = step.tokens / step.seconds
        self._log(values, step.step)

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        self._log({f"eval/{name.replace(' ', '/')}": value for name, value in evaluation.named_metrics().items()}, step)

    def close(self) -> None:
        """Let the tracker write what it holds. Called once the run is over."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            self._try(tracker.close)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        tracker = self._tracker
        if tracker is not None and finite:
            self._try(lambda: tracker.log(finite, step))

    def _try(self, call: Any) -> None:
        """Whatever a foreign package raises, the run goes on without it; what it prints is not the run's."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                call()
        except Exception as error:
            self._tracker = None
            brief = [*str(error).strip().splitlines(), "no reason given"][0][:160]
            what = f"failed and gets no more metrics ({type(error).__name__}: {brief})"
            self._tell.on_line(f"track {self._name}: {what}")


class Tracking:
    """The callback of a run with its tracker, if the settings name one. A context manager.

    Raises:
        UserError: the tracker's package is not installed.
    """

    def __init__(self, config: RunConfig, callback: Callback) -> None:
        self.callback = callback
        self._tracking: TrackingCallback | None = None
        if config.track is not None:
            check_installed(config.track)
            self._tracking = TrackingCallback(config.track, callback)
            self.callback = Callbacks(callback, self._tracking)

    def __enter__(self) -> Callback:
        return self.callback

    def __exit__(self, *error: object) -> None:
        if self._tracking is not None:
            self._tracking.close()


def check_installed(name: str) -> None:
    """Refuse a tracker whose package is not there.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec(name) is None:  # each module is called like its tracker and its package
        extra = "" if name == "wandb" else ', or pip install "deltaw[track]"'
        hint = f"pip install {name}{extra}; without a tracker all metrics are in metrics.jsonl"
        raise UserError(f"track: {name} needs the package {name}, which is not installed", where="track", hint=hint)


def settings_of(start: RunStart) -> dict[str, object]:
    """The settings by dotted key, with what the run chose itself for ``auto``."""
    chosen = {key: choice.value for key, choice in start.chosen.items()}
    counts = {"trained_parameters": start.trained_parameters, "total_steps": start.total_steps}
    return {**flat(start.config.model_dump(mode="json")), **chosen, **counts}


def _plain(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings as trackers take them: numbers, texts, and lists and sections of these."""
    kept = (bool, int, float, str, list, dict, type(None))
    return {key: value if isinstance(value, kept) else str(value) for key, value in settings.items()}


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
