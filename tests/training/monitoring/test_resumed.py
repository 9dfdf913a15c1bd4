"""Monitoring state is saved with a run, so a killed and resumed run matches an uninterrupted one."""

from __future__ import annotations

import json
import shutil

import pytest

import deltaw
from deltaw.runs.fit import fit
from deltaw.training.monitoring import rates
from tests.training.runs import ADAPTER, RecordingCallback, Snapshots, outcome

TRAIN = {"epochs": 5, "learning_rate": 2e-2, "schedule": "constant", "eval_every": 3, "eval_answers": 2, "samples": 1}
TRAIN |= {"checkpoint_every": 4, "checkpoint_minutes": None}


def restore_copy(copy, run):
    """Replace the run's folder with a copy taken at the moment of the kill."""
    shutil.rmtree(run)
    shutil.copytree(copy, run)


@pytest.mark.slow
def test_killed_run_resumes_with_best_adapter_and_samples(settings, tmp_path, worst):
    run = tmp_path / "run"
    config = settings(run, train={**TRAIN, "saved_adapter": "best"})
    snapshots = Snapshots(run, tmp_path, ["step 5", "evaluation 9", "evaluation 15"])
    full = fit(config, callback=snapshots)
    expected = outcome(run)
    best = full.as_dict()["best"]
    last = (run / "last" / ADAPTER).read_bytes()
    assert best["step"] < 9
    for copy in snapshots.copies.values():
        restore_copy(copy, run)
        result = fit(config)
        assert result.resumed_from_step is not None and outcome(run) == expected and result.as_dict()["best"] == best
        assert result.evaluation.metrics == pytest.approx(full.evaluation.metrics)
        assert (run / "last" / ADAPTER).read_bytes() == last
    # A finished run that is trained further retains its best step.
    callback = RecordingCallback()
    extended = deltaw.fit({"train": {"epochs": 7}}, resume=run, callback=callback)
    assert extended.outcome.steps == 21 and extended.best == full.best
    assert outcome(run)[1] == expected[1] and "gone" not in callback


@pytest.mark.slow
def test_killed_run_stops_early_at_same_step(settings, tmp_path, worst):
    run = tmp_path / "run"
    config = settings(run, train={**TRAIN, "early_stopping": 2})
    snapshots = Snapshots(run, tmp_path, ["step 8", "evaluation 9"])
    full = fit(config, callback=snapshots)
    assert full.outcome.steps == 9 and full.best["step"] == 3 and not (run / "last").exists()
    expected = outcome(run)
    for copy in snapshots.copies.values():
        restore_copy(copy, run)
        result = fit(config)
        assert outcome(run) == expected and (result.outcome.steps, result.stopped_early) == (9, full.stopped_early)


@pytest.mark.slow
def test_killed_run_does_not_repeat_rate_search(settings, tmp_path, monkeypatch):
    run = tmp_path / "run"
    config = settings(run, train={**TRAIN, "learning_rate": "search"})
    snapshots = Snapshots(run, tmp_path, ["step 2", "step 6"])
    fit(config, callback=snapshots)
    expected = outcome(run)
    rate = json.loads((run / "learning_rate.json").read_text())["chosen"]
    monkeypatch.setattr(rates, "search_rate", lambda *args, **kwargs: pytest.fail("searched again"))
    for copy in snapshots.copies.values():
        restore_copy(copy, run)
        fit(config)
        assert outcome(run) == expected
        assert f"learning_rate: search  # {rate}: " in (run / "run.yaml").read_text()


@pytest.mark.slow
def test_missing_best_file_starts_new_search_and_is_reported(settings, tmp_path):
    run = tmp_path / "run"
    callback = RecordingCallback()
    config = settings(run, train={**TRAIN, "saved_adapter": "best"})
    fit(config, callback=RecordingCallback(stop_after=8))
    shutil.rmtree(run / "best")
    result = fit(config, callback=callback)
    assert "are missing: looking for a new one" in callback and result.best["step"] > 8


@pytest.mark.slow
def test_killed_run_resumes_its_time_budget(settings, tmp_path, clock):
    class StateCallback(Snapshots):
        def on_begin(self, state):
            self.state = state
            self.initial_steps = state.total_steps

    run = tmp_path / "run"
    train = {**TRAIN, "epochs": 1000, "time": "60s", "eval_every": None, "eval_answers": 0, "samples": 0}
    first = StateCallback(run, tmp_path, ["step 25"])
    second = StateCallback(run, tmp_path, [])
    full = fit(settings(run, train=train), callback=first)
    restore_copy(first.copies["step 25"], run)
    result = fit(settings(run, train=train), callback=second)
    assert first.initial_steps == 3000 and second.initial_steps < 300, "the second process uses the plan of the first"
    # The newest complete checkpoint depends on timing.
    assert second.state.schedule.planned and result.resumed_from_step in (20, 24)
    assert 0.6 * full.outcome.steps < result.outcome.steps <= 1.4 * full.outcome.steps
