"""Probes of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deltaw.training.callbacks import Callback
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.monitoring.drift_probe import DriftProbe
from deltaw.training.monitoring.generation import GenerationProbe
from deltaw.training.monitoring.probe import Probe, ProbeResult
from deltaw.training.monitoring.samples import SampleProbe
from deltaw.training.session import Session


class TaskProbe(Probe):
    """Runs the final measurements of the task, such as the comparison with a distilled prompt."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def after(self, evaluation: Evaluation) -> Iterator[ProbeResult]:
        for name, result in self._session.task.final_measurements(self._session, evaluation):
            yield ProbeResult({name: result.as_dict()}, str(result))


def run_probes(session: Session, callback: Callback) -> Sequence[Probe]:
    """Return the probes of a run, in the order in which they measure."""
    return TaskProbe(session), DriftProbe(session), GenerationProbe(session), SampleProbe(session, callback)
