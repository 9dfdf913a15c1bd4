"""Runs and `deltaw eval` of embeddings report the passages that they searched."""

from __future__ import annotations

import json

from deltaw.runs.fit import fit
from deltaw.runs.folder import Run
from tests.training.runs import metrics
from tests.training.test_passage_search import rows_of, run_settings


def test_a_run_and_eval_agree_and_say_what_was_searched(call, tmp_path):
    settings = run_settings(tmp_path, rows_of(60))
    result = fit(settings)
    assert result.evaluation.metrics["passages_searched"] == 60
    found = json.loads(call("eval", tmp_path / "run", "--base", "--json", status=0).out)
    assert found["eval"] == result.evaluation.as_dict()
    assert found["difference"]["metric"] == "ndcg@10" and len(found["difference"]["interval"]) == 2
    shown = call("eval", tmp_path / "run", "--rows", "2", status=0).out
    assert "passages searched" in shown and "60" in shown
    (recorded,) = [line["predictions"][""] for line in metrics(tmp_path / "run", "predictions")]
    assert recorded["score_name"] == "ndcg@10"
    assert all(one["score"] < 1 and one["expected"] != one["predicted"] for one in recorded["mistakes"])
    run = Run(tmp_path / "run")
    run.metrics.evaluations.insert(0, (0, {"ndcg@10": 0.9}))  # by a version that searched fewer passages
    assert run.base == {}


def test_a_run_on_a_large_file_says_that_it_searched_a_part(call, tmp_path, monkeypatch):
    monkeypatch.setattr("deltaw.training.tasks.base.Task.most_searched", 20)
    found = fit(run_settings(tmp_path, rows_of(60))).evaluation.metrics
    assert (found["passages_searched"], found["passages_in_file"]) == (20, 60)
    found = json.loads(call("eval", tmp_path / "run", "--json", status=0).out)["eval"]
    assert found["passages_searched"] == 60 and "passages_in_file" not in found
