"""Experiments on a Ray cluster: results equal local ones, and errors are readable."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

import pytest

from deltaw.errors import UserError
from deltaw.experiments.cluster import Cluster, run_on_cluster
from deltaw.experiments.compare import compare
from deltaw.experiments.jobs import Job, WorkerExited
from deltaw.experiments.tune import tune
from deltaw.settings.config import RunConfig

with_ray = pytest.mark.skipif(find_spec("ray") is None, reason="the extra 'ray' is not installed")
SEARCH = ["train.learning_rate=1e-4..1e-1:log", "lora.rank=[2,4]"]


def test_missing_ray_is_rejected_without_writing(study_settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    config = RunConfig.read(study_settings(tmp_path / "run"))
    with pytest.raises(UserError, match="need Ray Tune, which is not installed") as exc_info:
        tune(config, trials=1, folder=tmp_path / "out", cluster=Cluster("auto"))
    assert "deltaw[ray]" in str(exc_info.value.hint) and not (tmp_path / "out").exists()


@with_ray
def test_ray_client_address_is_rejected(study_settings, tmp_path):
    config = RunConfig.read(study_settings(tmp_path / "run"))
    with pytest.raises(UserError, match="not through Ray's client"):
        tune(config, trials=1, folder=tmp_path / "out", cluster=Cluster("ray://host:10001"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@with_ray
def test_cluster_search_equals_local_search(study_settings, tmp_path):
    config = RunConfig.read(study_settings(tmp_path / "run"))
    options = {"trials": 4, "search": SEARCH}
    expected = tune(config, folder=tmp_path / "here", **options)
    lines = []
    result = tune(config, folder=tmp_path / "there", cluster=Cluster("local", cpus=1), log=lines.append, **options)
    # The order in which trials finish is random. Their values and losses are not.
    local, remote = ([(t.number, t.values, t.end, t.loss) for t in tuning.trials] for tuning in (expected, result))
    assert local == remote
    assert result.best_settings == expected.best_settings
    assert sum("trial " in line for line in lines) == 4


@pytest.mark.slow
@with_ray
def test_cluster_comparison_equals_local_comparison(study_settings, tmp_path):
    config = RunConfig.read(study_settings(tmp_path / "run"))
    options = {"methods": ["head", "lora"], "rates": {"head": [1e-2]}, "seeds": 2}
    expected = compare(config, folder=tmp_path / "here", **options)
    result = compare(config, folder=tmp_path / "there", cluster=Cluster("local", cpus=1), **options)
    for cluster_result, local_result in zip(result.results, expected.results, strict=True):
        assert cluster_result.method == local_result.method
        assert cluster_result.learning_rate == local_result.learning_rate
        assert cluster_result.rates == local_result.rates and cluster_result.error is None
    assert scores(tmp_path / "there") == scores(tmp_path / "here")
    lines = []
    repeated = compare(config, folder=tmp_path / "there", cluster=Cluster("local"), log=lines.append, **options)
    assert "lora: done before" in lines and "head: done before" in lines and len(lines) == 2
    assert [r.method for r in repeated.results] == [r.method for r in result.results]


def scores(folder):
    """Return the stored scores of the base model and of each method and seed."""
    pieces = {path.stem: json.loads(path.read_text()) for path in (folder / "pieces").glob("*.json")}
    runs = {name: piece.get("runs", {}) for name, piece in pieces.items()}
    return {
        name: [piece.get("score"), *(run["score"] for _, run in sorted(runs[name].items()))]
        for name, piece in pieces.items()
    }


@pytest.mark.slow
@with_ray
def test_stopped_and_failed_jobs_are_reported(study_settings, tmp_path):
    plain = RunConfig.read(study_settings(tmp_path / "run", train={"epochs": 4})).model_dump(mode="json")
    trial = {"config": plain, "share": 1.0, "evaluations": 3}
    missing = {"config": {**plain, "model": str(tmp_path / "none")}, "share": 1.0, "evaluations": 3}

    class JobSource:
        def __init__(self):
            specs = [("stopped", "trial", trial), ("refused", "trial", missing), ("broken", "no such request", {})]
            self.pending = [Job(key, kind, tmp_path / "log", request) for key, kind, request in specs]
            self.reports = []
            self.results = {}

        def next(self):
            return self.pending.pop(0) if self.pending else None

        def report(self, key, report):
            self.reports.append((key, report["evaluation"]))
            return len(self.reports) < 2

        def complete(self, key, result):
            self.results[key] = result

    jobs = JobSource()
    run_on_cluster(jobs, Cluster("local"), tmp_path / "ray")
    assert [number for _, number in jobs.reports] == [1, 2]
    assert jobs.results["stopped"] == {"stopped": True}
    assert isinstance(jobs.results["refused"], UserError)
    assert str(tmp_path / "none") in str(jobs.results["refused"])
    assert isinstance(jobs.results["broken"], WorkerExited)


@pytest.mark.slow
@with_ray
def test_missing_and_too_small_clusters_are_rejected(tmp_path):
    with pytest.raises(UserError, match="cannot connect to a Ray cluster"):
        run_on_cluster(None, Cluster("auto"), tmp_path)
    with pytest.raises(UserError, match="no machine of the cluster has 4096 cores"):
        run_on_cluster(None, Cluster("local", cpus=4096), tmp_path)
