"""Experiments on the machines of a Ray cluster: the same results as here, and refused in words."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

import pytest

from deltaw.errors import UserError
from deltaw.experiments.compare import compare
from deltaw.experiments.jobs import Cluster, Job, WorkerEnded, elsewhere
from deltaw.experiments.tune import tune
from deltaw.settings import RunConfig

with_ray = pytest.mark.skipif(find_spec("ray") is None, reason="the extra 'ray' is not installed")
SEARCH = ["train.learning_rate=1e-4..1e-1:log", "lora.rank=[2,4]"]


def test_without_ray_it_is_refused_and_nothing_is_written(study_settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    config = RunConfig.read(study_settings(tmp_path / "run"))
    with pytest.raises(UserError, match="need Ray Tune, which is not installed") as refused:
        tune(config, trials=1, folder=tmp_path / "out", cluster=Cluster("auto"))
    assert "deltaw[ray]" in str(refused.value.hint) and not (tmp_path / "out").exists()


@with_ray
def test_rays_client_is_refused(study_settings, tmp_path):
    config = RunConfig.read(study_settings(tmp_path / "run"))
    with pytest.raises(UserError, match="not through Ray's client"):
        tune(config, trials=1, folder=tmp_path / "out", cluster=Cluster("ray://host:10001"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@with_ray
def test_a_search_on_a_cluster_finds_what_it_finds_here(study_settings, tmp_path):
    config = RunConfig.read(study_settings(tmp_path / "run"))
    asked = {"trials": 4, "search": SEARCH}
    expected = tune(config, folder=tmp_path / "here", **asked)
    said = []
    found = tune(config, folder=tmp_path / "there", cluster=Cluster("local", cpus=1), say=said.append, **asked)
    # Which trial ends first is chance; its values, and what they lead to, are not.
    here, there = ([(t.number, t.values, t.end, t.loss) for t in tuning.trials] for tuning in (expected, found))
    assert here == there
    assert found.best_settings == expected.best_settings
    assert sum("trial " in line for line in said) == 4


@pytest.mark.slow
@with_ray
def test_a_comparison_on_a_cluster_finds_what_it_finds_here(study_settings, tmp_path):
    config = RunConfig.read(study_settings(tmp_path / "run"))
    given = {"methods": ["head", "lora"], "rates": {"head": [1e-2]}, "seeds": 2}
    expected = compare(config, folder=tmp_path / "here", **given)
    found = compare(config, folder=tmp_path / "there", cluster=Cluster("local", cpus=1), **given)
    for ours, theirs in zip(found.results, expected.results, strict=True):
        assert ours.method == theirs.method and ours.learning_rate == theirs.learning_rate
        assert ours.rates == theirs.rates and ours.error is None
    assert scores(tmp_path / "there") == scores(tmp_path / "here")
    said = []
    again = compare(config, folder=tmp_path / "there", cluster=Cluster("local"), say=said.append, **given)
    assert "lora: done before" in said and "head: done before" in said and len(said) == 2
    assert [r.method for r in again.results] == [r.method for r in found.results]


def scores(folder):
    """Of the base model and of each method with each seed, as stored."""
    pieces = {path.stem: json.loads(path.read_text()) for path in (folder / "pieces").glob("*.json")}
    runs = {name: piece.get("runs", {}) for name, piece in pieces.items()}
    return {
        name: [piece.get("score"), *(run["score"] for _, run in sorted(runs[name].items()))]
        for name, piece in pieces.items()
    }


@pytest.mark.slow
@with_ray
def test_jobs_that_are_stopped_fail_or_lose_their_process_are_told(study_settings, tmp_path):
    plain = RunConfig.read(study_settings(tmp_path / "run", train={"epochs": 4})).model_dump(mode="json")
    trial = {"config": plain, "share": 1.0, "evaluations": 3}
    missing = {"config": {**plain, "model": str(tmp_path / "none")}, "share": 1.0, "evaluations": 3}

    class Three:
        def __init__(self):
            asked = [("stopped", "trial", trial), ("refused", "trial", missing), ("broken", "no such request", {})]
            self.left = [Job(key, what, tmp_path / "log", request) for key, what, request in asked]
            self.reports, self.found = [], {}

        def next(self):
            return self.left.pop(0) if self.left else None

        def report(self, key, report):
            self.reports.append((key, report["evaluation"]))
            return len(self.reports) < 2

        def ended(self, key, found):
            self.found[key] = found

    jobs = Three()
    elsewhere(jobs, Cluster("local"), tmp_path / "ray")
    assert [number for _, number in jobs.reports] == [1, 2]
    assert jobs.found["stopped"] == {"stopped": True}
    assert isinstance(jobs.found["refused"], UserError)
    assert str(tmp_path / "none") in str(jobs.found["refused"])
    assert isinstance(jobs.found["broken"], WorkerEnded)


@pytest.mark.slow
@with_ray
def test_a_cluster_that_is_not_there_and_one_without_room(tmp_path):
    with pytest.raises(UserError, match="there is no Ray cluster"):
        elsewhere(None, Cluster("auto"), tmp_path)
    with pytest.raises(UserError, match="no machine of the cluster has 4096 cores"):
        elsewhere(None, Cluster("local", cpus=4096), tmp_path)
