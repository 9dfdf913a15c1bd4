"""What a run watches goes on with it: a run that is killed and started again ends as if nothing had happened.

A copy of a run's folder, made while the run goes on, is what a process leaves that is killed at that moment.
"""

from __future__ import annotations

import itertools
import json
import shutil

import pytest

import deltaw
from deltaw.training.fit import fit
from deltaw.training.monitoring import best as best_score
from deltaw.training.monitoring import rates
from tests.training.copies import copied
from tests.training.runs import ADAPTER, Told, outcome

TRAIN = {
    "epochs": 5,
    "learning_rate": 2e-2,
    "schedule": "constant",
    "checkpoint_every": 4,
    "checkpoint_minutes": None,
    "eval_every": 3,
    "eval_answers": 2,
    "samples": 1,
}


class Killed(Told):
    """Copies the run's folder after steps and within evaluations."""

    def __init__(self, run=None, into=None, moments=()):
        super().__init__()
        self.run, self.into, self.moments = run, into, set(moments)

    def on_step(self, step):
        self._take("step", step.step)

    def on_evaluation(self, step, evaluation):
        self._take("evaluation", step)

    def _take(self, *moment):
        if moment in self.moments:
            copied(self.run, self.into / f"{moment[0]}-{moment[1]}")


def goes_on(copy, run):
    """The killed run in the place of the whole one, started again with the same command."""
    shutil.rmtree(run)
    shutil.copytree(copy, run)


@pytest.mark.parametrize("adapter", ["best", "last"])
def test_a_killed_run_keeps_its_best_adapter_and_its_samples(settings, tmp_path, monkeypatch, adapter):
    # The highest loss counts as the best, so that the best step is early and must be remembered.
    monkeypatch.setattr(best_score, "deciding_metric", lambda evaluation, writes_text: ("loss", True))
    run = tmp_path / "run"
    told = settings(run, train={**TRAIN, "adapter": adapter})
    moments = [("step", 5), ("evaluation", 9), ("step", 14), ("evaluation", 15)]
    whole = fit(told, callback=Killed(run, tmp_path, moments))
    expected, best = outcome(run), whole.as_dict()["best"]
    assert best["step"] < 9 and (run / "last").is_dir() == (adapter == "best")
    last = (run / "last" / ADAPTER).read_bytes() if adapter == "best" else None
    for kind, step in moments:
        goes_on(tmp_path / f"{kind}-{step}", run)
        result = fit(told)
        assert result.resumed_from_step is not None
        assert outcome(run) == expected and result.as_dict()["best"] == best
        assert result.evaluation.metrics == pytest.approx(whole.evaluation.metrics)
        if last is not None:
            assert (run / "last" / ADAPTER).read_bytes() == last


def test_a_killed_run_stops_early_where_it_would_have(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(best_score, "deciding_metric", lambda evaluation, writes_text: ("loss", True))
    run = tmp_path / "run"
    told = settings(run, train={**TRAIN, "early_stopping": 2})
    moments = [("step", 8), ("evaluation", 9)]
    whole = fit(told, callback=Killed(run, tmp_path, moments))
    assert whole.outcome.steps == 9 and whole.best["step"] == 3
    expected = outcome(run)
    for kind, step in moments:
        goes_on(tmp_path / f"{kind}-{step}", run)
        result = fit(told)
        assert outcome(run) == expected
        assert (result.outcome.steps, result.stopped_early) == (9, whole.stopped_early)


def test_a_killed_run_does_not_search_its_rate_again(settings, tmp_path, monkeypatch):
    run = tmp_path / "run"
    told = settings(run, train={**TRAIN, "learning_rate": "search"})
    fit(told, callback=Killed(run, tmp_path, [("step", 2), ("step", 6)]))
    expected, rate = outcome(run), json.loads((run / "learning_rate.json").read_text())["chosen"]
    monkeypatch.setattr(rates, "search_rate", lambda *args, **kwargs: pytest.fail("searched again"))
    for step in (2, 6):
        goes_on(tmp_path / f"step-{step}", run)
        fit(told)
        assert outcome(run) == expected
        assert f"learning_rate: search  # {rate}: " in (run / "run.yaml").read_text()


def test_a_finished_run_that_is_trained_further_remembers_its_best(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(best_score, "deciding_metric", lambda evaluation, writes_text: ("loss", True))
    run = tmp_path / "run"
    first = fit(settings(run, train={**TRAIN, "adapter": "best"}))
    adapter = (run / ADAPTER).read_bytes()
    killed = Killed()
    second = deltaw.fit({"train": {"epochs": 7}}, resume=run, callback=killed)
    assert second.outcome.steps == 21 and second.best == first.best
    assert (run / ADAPTER).read_bytes() == adapter
    assert "gone" not in killed


def test_a_best_step_whose_file_is_gone_is_sought_anew_and_that_is_said(settings, tmp_path):
    run, killed = tmp_path / "run", Killed()
    fit(settings(run, train={**TRAIN, "adapter": "best"}), callback=Told(stop_after=8))
    shutil.rmtree(run / "best")
    result = fit(settings(run, train={**TRAIN, "adapter": "best"}), callback=killed)
    assert "are gone: the best is sought anew" in killed
    assert result.best["step"] > 8


def test_a_killed_run_with_a_time_budget_goes_on_with_its_plan_and_what_is_left(settings, tmp_path, monkeypatch):
    looks = itertools.count()

    def clock():
        return 0.25 * next(looks)  # each look takes time, and a step has a few of them

    for module in ("fit", "monitoring.monitor"):
        monkeypatch.setattr(f"deltaw.training.{module}.now", clock)

    class Told(Killed):
        total = begun = None

        def on_begin(self, state):
            self.state, self.begun = state, state.total_steps

    run = tmp_path / "run"
    train = {**TRAIN, "epochs": 1000, "time": "60s", "eval_every": None, "eval_answers": 0, "samples": 0}
    first, second = Told(run, tmp_path, [("step", 25)]), Told()
    whole = fit(settings(run, train=train), callback=first)
    goes_on(tmp_path / "step-25", run)
    result = fit(settings(run, train=train), callback=second)
    assert first.begun == 3000 and second.begun < 300, "the plan is that of the first process"
    assert second.state.schedule.planned and result.resumed_from_step in (20, 24)  # whichever was durable
    assert 0.6 * whole.outcome.steps < result.outcome.steps <= 1.4 * whole.outcome.steps
