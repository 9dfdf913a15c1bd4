"""What a run watches goes on with it: a run that is killed and started again ends as if nothing had happened."""

from __future__ import annotations

import json
import shutil

import pytest

import deltaw
from deltaw.runs.fit import fit
from deltaw.training.monitoring import rates
from tests.training.runs import ADAPTER, Snapshots, Told, outcome

TRAIN = {"epochs": 5, "learning_rate": 2e-2, "schedule": "constant", "eval_every": 3, "eval_answers": 2, "samples": 1}
TRAIN |= {"checkpoint_every": 4, "checkpoint_minutes": None}


def goes_on(copy, run):
    """The killed run in the place of the whole one, started again with the same command."""
    shutil.rmtree(run)
    shutil.copytree(copy, run)


@pytest.mark.slow
def test_a_killed_run_keeps_its_best_adapter_and_its_samples(settings, tmp_path, worst):
    run = tmp_path / "run"
    made = settings(run, train={**TRAIN, "adapter": "best"})
    taken = Snapshots(run, tmp_path, ["step 5", "evaluation 9", "evaluation 15"])
    whole = fit(made, callback=taken)
    expected, best, last = outcome(run), whole.as_dict()["best"], (run / "last" / ADAPTER).read_bytes()
    assert best["step"] < 9
    for copy in taken.taken.values():
        goes_on(copy, run)
        result = fit(made)
        assert result.resumed_from_step is not None
        assert outcome(run) == expected and result.as_dict()["best"] == best
        assert result.evaluation.metrics == pytest.approx(whole.evaluation.metrics)
        assert (run / "last" / ADAPTER).read_bytes() == last
    # A finished run that is trained further remembers its best too.
    told = Told()
    further = deltaw.fit({"train": {"epochs": 7}}, resume=run, callback=told)
    assert further.outcome.steps == 21 and further.best == whole.best
    assert outcome(run)[1] == expected[1] and "gone" not in told


@pytest.mark.slow
def test_a_killed_run_stops_early_where_it_would_have(settings, tmp_path, worst):
    run = tmp_path / "run"
    made = settings(run, train={**TRAIN, "early_stopping": 2})
    taken = Snapshots(run, tmp_path, ["step 8", "evaluation 9"])
    whole = fit(made, callback=taken)
    assert whole.outcome.steps == 9 and whole.best["step"] == 3 and not (run / "last").exists()
    expected = outcome(run)
    for copy in taken.taken.values():
        goes_on(copy, run)
        result = fit(made)
        assert outcome(run) == expected
        assert (result.outcome.steps, result.stopped_early) == (9, whole.stopped_early)


@pytest.mark.slow
def test_a_killed_run_does_not_search_its_rate_again(settings, tmp_path, monkeypatch):
    run = tmp_path / "run"
    made = settings(run, train={**TRAIN, "learning_rate": "search"})
    taken = Snapshots(run, tmp_path, ["step 2", "step 6"])
    fit(made, callback=taken)
    expected, rate = outcome(run), json.loads((run / "learning_rate.json").read_text())["chosen"]
    monkeypatch.setattr(rates, "search_rate", lambda *args, **kwargs: pytest.fail("searched again"))
    for copy in taken.taken.values():
        goes_on(copy, run)
        fit(made)
        assert outcome(run) == expected
        assert f"learning_rate: search  # {rate}: " in (run / "run.yaml").read_text()


@pytest.mark.slow
def test_a_best_step_whose_file_is_gone_is_sought_anew_and_that_is_said(settings, tmp_path):
    run, told = tmp_path / "run", Told()
    made = settings(run, train={**TRAIN, "adapter": "best"})
    fit(made, callback=Told(stop_after=8))
    shutil.rmtree(run / "best")
    result = fit(made, callback=told)
    assert "are gone: the best is sought anew" in told
    assert result.best["step"] > 8


@pytest.mark.slow
def test_a_killed_run_with_a_time_budget_goes_on_with_its_plan_and_what_is_left(settings, tmp_path, clock):
    class Begun(Snapshots):
        def on_begin(self, state):
            self.state, self.begun = state, state.total_steps

    run = tmp_path / "run"
    train = {**TRAIN, "epochs": 1000, "time": "60s", "eval_every": None, "eval_answers": 0, "samples": 0}
    first, second = Begun(run, tmp_path, ["step 25"]), Begun(run, tmp_path, [])
    whole = fit(settings(run, train=train), callback=first)
    goes_on(first.taken["step 25"], run)
    result = fit(settings(run, train=train), callback=second)
    assert first.begun == 3000 and second.begun < 300, "the plan is that of the first process"
    assert second.state.schedule.planned and result.resumed_from_step in (20, 24)  # whichever was durable
    assert 0.6 * whole.outcome.steps < result.outcome.steps <= 1.4 * whole.outcome.steps
