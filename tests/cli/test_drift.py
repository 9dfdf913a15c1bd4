"""Drift and general answers on the command line."""

from __future__ import annotations

import json

import pytest

from deltaw.training.evaluation.general_prompts import MEASURED


def test_train_and_eval_show_drift_and_answers_side_by_side(call, flags, roomy_folder, tmp_path):
    run = tmp_path / "run"
    given = flags(run, model=roomy_folder, train__drift="true", train__keep_general=0.5)
    ended = call("train", "-v", *given, "--json", status=0)
    trained = json.loads(ended.out)["drift"]
    assert "drift: general answers'" in ended.err and "keep_general 0.5" in ended.err
    ended = call("eval", run, "--precision", "fp32", "--base", "--general", 2, "--json")
    told = json.loads(ended.out)
    assert told["drift"]["loss"] == pytest.approx(trained["loss"], rel=1e-3)
    assert told["base_score"]["metric"] == told["score"]["metric"] == "exact_match"
    assert "95 % interval" in ended.err and "general question" in ended.err
    assert MEASURED[0].split()[0] in ended.err
    without = json.loads(call("eval", run, "--precision", "fp32", "--no-drift", "--json").out)
    assert without["drift"] is None and without["eval"] == told["eval"]


def test_a_bare_model_has_not_drifted(call, roomy_folder, rows_file):
    ended = call("eval", roomy_folder, "--data", rows_file, "--precision", "fp32", "--json")
    assert json.loads(ended.out)["drift"] is None and "drift" not in ended.err


def test_int8_weights_are_evaluated_as_they_were_trained(call, flags, tmp_path):
    run = tmp_path / "run"
    trained = json.loads(call("train", *flags(run, precision="int8"), "--json").out)
    ended = call("eval", run, "--precision", "int8", "--no-drift", "--json", "--verbose")
    told = json.loads(ended.out)
    assert "precision int8:" in ended.err
    assert told["eval"]["loss"] == pytest.approx(trained["eval"]["loss"], rel=0.05)
