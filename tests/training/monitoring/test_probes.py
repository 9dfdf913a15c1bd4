"""Calls of the probes of a run, and the recording of their results."""

from __future__ import annotations

import pytest

from deltaw.runs.fit import fit
from deltaw.training.monitoring.probe import Probe, ProbeResult
from tests.training.runs import RecordingCallback, metrics, stopped_run


class RecordedProbe(Probe):
    """Records its calls, and returns a result for each."""

    def __init__(self):
        self.calls = []

    def _result(self, call, **arguments):
        self.calls.append(call)
        yield ProbeResult({"probe": call}, f"probe called {call}", **arguments)

    def before(self):
        self.calls.append("before")

    def evaluate(self, step):
        return self._result(f"at {step}")

    def verify(self, evaluation):
        return self._result(f"to verify {evaluation.main}")

    def after(self, evaluation):
        return self._result(f"after {evaluation.main}", fields={"generation": {"verdict": "recorded"}})

    def state(self):
        return {"recorded": list(self.calls)}

    def restore(self, state):
        self.calls = [*state["recorded"], "restored"]


@pytest.fixture
def probe(monkeypatch):
    probe = RecordedProbe()
    monkeypatch.setattr("deltaw.runs.training_run.run_probes", lambda session, callback: [probe])
    return probe


def test_probes_are_called_in_order_and_results_recorded(probe, settings, tmp_path):
    lines = RecordingCallback()
    result = fit(settings(tmp_path / "run", train={"max_steps": 4, "eval_every": 2}), callback=lines)
    main = result.evaluation.main
    assert probe.calls == ["before", "at 0", "at 2", "at 4", f"to verify {main}", f"after {main}"]
    recorded = [(line["step"], line["probe"]) for line in metrics(result.output, "probe")]
    assert recorded == list(zip([0, 2, 4, 4, 4], probe.calls[1:], strict=True))
    assert all(f"probe called {call}" in lines for call in probe.calls[1:])
    assert result.generation == {"verdict": "recorded"} and result.drift is None


def test_probes_of_resumed_run_are_restored_and_interrupted_run_is_not_measured(probe, settings, tmp_path):
    config = settings(tmp_path / "run", train={"max_steps": 4, "checkpoint_every": 1})
    stopped_run(config, 2)
    assert probe.calls == ["before", "at 0"]
    probe.calls = []
    fit(config)
    assert probe.calls[:5] == ["before", "at 0", "restored", "at 0", "at 4"]
