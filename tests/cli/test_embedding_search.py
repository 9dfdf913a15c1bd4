"""Embedding runs and `deltaw eval` report the number of searched passages."""

from __future__ import annotations

import json

from deltaw.runs.fit import fit
from deltaw.runs.folder import Run
from tests.training.runs import metrics
from tests.training.test_passage_search import rows_of, run_settings


def test_run_and_eval_agree_and_report_searched_passages(call, tmp_path):
    settings = run_settings(tmp_path, rows_of(60))
    result = fit(settings)
    assert result.evaluation.metrics["passages_searched"] == 60
    output = json.loads(call("eval", tmp_path / "run", "--with-base", "--json", status=0).out)
    assert output["eval"] == result.evaluation.as_dict()
    assert output["difference"]["metric"] == "ndcg@10" and len(output["difference"]["interval"]) == 2
    text = call("eval", tmp_path / "run", "--limit", "2", status=0).out
    assert "passages searched" in text and "60" in text
    (recorded,) = [line["predictions"][""] for line in metrics(tmp_path / "run", "predictions")]
    assert recorded["score_name"] == "ndcg@10"
    assert all(mistake["score"] < 1 and mistake["expected"] != mistake["predicted"] for mistake in recorded["mistakes"])
    run = Run(tmp_path / "run")
    run.metrics.evaluations.insert(0, (0, {"ndcg@10": 0.9}))  # written by a version that searched fewer passages
    assert run.base == {}


def test_large_file_reports_partial_passage_search(call, tmp_path, monkeypatch):
    monkeypatch.setattr("deltaw.tasks.embedding.task.EmbeddingTask.max_searched_passages", 20)
    run_metrics = fit(run_settings(tmp_path, rows_of(60))).evaluation.metrics
    assert (run_metrics["passages_searched"], run_metrics["passages_in_file"]) == (20, 60)
    run_metrics = json.loads(call("eval", tmp_path / "run", "--json", status=0).out)["eval"]
    assert run_metrics["passages_searched"] == 60 and "passages_in_file" not in run_metrics
