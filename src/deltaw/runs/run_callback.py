"""Callback of a run: metrics, evaluations, checkpoints, and the user's callback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltaw.kernels import compiled, gpu_attention
from deltaw.runs.folder import RunFolder
from deltaw.runs.part_timer import PartTimer
from deltaw.runs.record import RunRecord
from deltaw.training.callbacks import Callback
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.monitoring.monitor import Monitor
from deltaw.training.session import APPROXIMATE, Session
from deltaw.training.state import NotFinite, Step, TrainState


@dataclass(eq=False)
class RunCallback(Callback):
    """Callback that records metrics, evaluates, writes checkpoints and forwards events to the user's callback.

    Attributes:
        should_train: If False, the training stops before its first step.
    """

    session: Session
    folder: RunFolder
    record: RunRecord
    monitor: Monitor
    callback: Callback
    should_train: bool
    clock: PartTimer

    def on_begin(self, state: TrainState) -> None:
        self.record.start(state)
        self.monitor.start(state)
        self.callback.on_begin(state)

    def on_step(self, step: Step) -> None:
        self.clock.add("training", step.seconds)
        self.folder.write_metrics(step.as_dict())
        self.callback.on_step(step)
        for line in [*gpu_attention.notes(), *compiled.notes()]:  # kernels are tried when a shape first occurs
            if line not in self.session.notes:
                self.session.notes.append(line)
                self.callback.on_line(line)
        with self.clock.part("evaluating"):
            evaluation = self.monitor.on_step(step)
        self._finish_step(step.step, evaluation)

    def on_skip(self, event: NotFinite) -> None:
        self.folder.write_metrics(event.as_dict())
        self.callback.on_skip(event)
        if event.repeated:
            self.callback.on_line(f"step {event.step}: overflow at loss scale {event.loss_scale:g}, repeated")
            return
        self.callback.on_line(f"step {event.step}: skipped, its loss or gradient is not finite")
        with self.clock.part("evaluating"):
            evaluation = self.monitor.on_skip(event.step)
        self._finish_step(event.step, evaluation)

    def on_approximations(self, line: str, step: int) -> None:
        """Record that an approximation was disabled from this step on."""
        approximations = self.session.approximations
        self.session.chosen[APPROXIMATE] = approximations.choice({"": line})
        self.folder.write_metrics({"step": step, "approximations": approximations.as_dict()})
        self.callback.on_line(f"approximation disabled from step {step}: {line}")

    def should_stop(self) -> bool:
        return not self.should_train or self.callback.should_stop()

    def should_finish(self) -> bool:
        return self.monitor.should_finish() or self.callback.should_finish()

    def diagnose(self, event: NotFinite) -> Sequence[str]:
        return [*self.record.diagnose(event), *self.callback.diagnose(event)]

    def _finish_step(self, step: int, evaluation: Evaluation | None) -> None:
        checkpoints = self.record.checkpoints
        checkpoints.step_done(best=evaluation is not None and checkpoints.evaluated(step, evaluation))
