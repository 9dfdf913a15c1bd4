"""Drift and answers to general prompts on the command line."""

from __future__ import annotations

import json

import pytest

from deltaw.training.evaluation.general_prompts import DRIFT_PROMPTS


def test_train_and_eval_report_drift_and_general_answers(call, flags, long_context_folder, tmp_path):
    run = tmp_path / "run"
    arguments = flags(run, model=long_context_folder, train__drift="true", train__keep_general=0.5)
    result = call("train", "-v", *arguments, "--json", status=0)
    trained = json.loads(result.out)["drift"]
    assert "drift: general answers'" in result.err and "keep_general 0.5" in result.err
    result = call("eval", run, "--precision", "fp32", "--with-base", "--general", 2, "--json")
    output = json.loads(result.out)
    assert output["drift"]["loss"] == pytest.approx(trained["loss"], rel=1e-3)
    assert output["base_score"]["metric"] == output["score"]["metric"] == "exact_match"
    assert "95 % interval" in result.err and "general question" in result.err
    assert DRIFT_PROMPTS[0].split()[0] in result.err
    without = json.loads(call("eval", run, "--precision", "fp32", "--no-drift", "--json").out)
    assert without["drift"] is None and without["eval"] == output["eval"]


def test_eval_of_base_model_has_no_drift(call, long_context_folder, rows_file):
    result = call("eval", long_context_folder, "--data", rows_file, "--precision", "fp32", "--json")
    assert json.loads(result.out)["drift"] is None and "drift" not in result.err


def test_int8_evaluation_matches_training(call, flags, tmp_path):
    run = tmp_path / "run"
    trained = json.loads(call("train", *flags(run, precision="int8"), "--json").out)
    result = call("eval", run, "--precision", "int8", "--no-drift", "--json", "--verbose")
    output = json.loads(result.out)
    assert "precision int8:" in result.err
    assert output["eval"]["loss"] == pytest.approx(trained["eval"]["loss"], rel=0.05)
