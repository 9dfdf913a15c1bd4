"""Chains of stages: reading the file, training in order, resuming, and scores on the same rows."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import deltaw
from deltaw.errors import UserError
from deltaw.experiments import chain as chain_module
from deltaw.experiments.chain import (
    BASE,
    ChainResult,
    evaluated_config,
    score_key,
    score_stages,
    scored_models,
    train_stages,
)
from deltaw.reports.chain import PAGE_FILE, score_tables, stages_table, warning_lines, write_results
from deltaw.runs.folder import read_run
from deltaw.settings.config import RunConfig
from deltaw.settings.stages import Chain, read_chain
from deltaw.training.callbacks import Callback
from tests import processes
from tests.conftest import COLORS, deep_merge, refusal, write_rows
from tests.training.parallel_runs import assert_same_run as assert_same_sums
from tests.training.parallel_runs import needs_gloo, train_all
from tests.training.runs import ADAPTER, RecordingCallback, assert_same_run

TRAIN = {"max_steps": 4, "batch_size": 3, "checkpoint_every": 1, "drift": False, "samples": 0}


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory) -> Path:
    rows = ({"prompt": f"paint it {c}", "chosen": c, "rejected": c[::-1] + "x"} for c in COLORS)
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def shared(settings):
    """Return a factory of the shared settings of a chain."""

    def make(output: Path) -> dict:
        values = settings(output, train=TRAIN)
        return {key: value for key, value in values.items() if key != "data"}

    return make


@pytest.fixture(scope="module")
def stages(rows_file, pairs_file) -> list[dict]:
    sft = {"name": "sft", "data": {"train": str(rows_file), "eval": 4}}
    return [sft, {"name": "dpo", "task": "dpo", "data": {"train": str(pairs_file), "eval": 3}}]


@pytest.fixture
def chain(shared, stages, tmp_path) -> Chain:
    return parsed({**shared(tmp_path / "chain"), "stages": stages})


@pytest.fixture(scope="module")
def finished(shared, stages, tmp_path_factory) -> ChainResult:
    """A finished chain with its scores."""
    chain = parsed({**shared(tmp_path_factory.mktemp("chains") / "chain"), "stages": stages})
    results = {stage.name: result for stage, result in train_stages(chain)}
    return ChainResult(chain, results, score_stages(chain))


def parsed(values: dict, flags: dict | None = None) -> Chain:
    chain = read_chain(values, flags)
    assert chain is not None
    return chain


def file_bytes(chain: Chain) -> list[bytes]:
    return [(chain.folder / stage.name / ADAPTER).read_bytes() for stage in chain.stages]


# Reading the file.


def test_file_without_stages_is_no_chain(shared, tmp_path):
    assert read_chain(shared(tmp_path)) is None


def test_stages_share_settings_and_start_from_previous(shared, stages, tmp_path):
    values = shared(tmp_path / "c")
    third = {"name": "apart", "data": stages[0]["data"], "start_from": None, "train": {"max_steps": 2}}
    fourth = {"name": "sum", "data": stages[0]["data"], "start_from": ["sft", {"from": "apart", "weight": 0.5}]}
    chain = parsed({**values, "start_from": str(tmp_path), "stages": [*stages, third, fourth]})
    sft, dpo, apart, total = chain.stages
    folder = tmp_path / "c"
    assert [stage.config.output for stage in chain.stages] == [str(folder / s) for s in ("sft", "dpo", "apart", "sum")]
    assert (sft.config.start_from, sft.parents) == (str(tmp_path), ())
    assert (dpo.config.start_from, dpo.parents) == (str(folder / "sft"), ("sft",))
    assert (apart.config.start_from, apart.parents) == (None, ())
    assert total.config.start_from == [str(folder / "sft"), {"from": str(folder / "apart"), "weight": 0.5}]
    assert total.parents == ("sft", "apart")
    assert (dpo.config.task, sft.config.task) == ("preference", "causal-lm")
    assert [stage.config.train.max_steps for stage in chain.stages] == [4, 4, 2, 4]
    assert all(stage.config.train.batch_size == 3 for stage in chain.stages)


def test_flags_override_all_stages(shared, stages, tmp_path):
    flags = {"train": {"max_steps": 7}, "output": str(tmp_path / "other"), "start_from": "you/adapter"}
    chain = parsed({**shared(tmp_path / "c"), "stages": stages}, flags)
    assert [stage.config.train.max_steps for stage in chain.stages] == [7, 7]
    assert chain.folder == tmp_path / "other"
    assert [stage.config.start_from for stage in chain.stages] == ["you/adapter", str(tmp_path / "other/sft")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": {"sft": {}}}, "not a list of stages"),
        ({"stages": []}, "not a list of stages"),
        ({0: {"name": None}}, "no name"),
        ({0: {"name": "../up"}}, "cannot be the name"),
        ({0: {"name": 3}}, "cannot be the name"),
        ({1: {"name": "SFT"}}, "two stages have the name"),
        ({1: {"output": "elsewhere"}}, "cannot have the key 'output'"),
        ({0: {"start_from": "dpo"}, 1: {"start_from": "sft"}}, "'sft' starts from 'dpo', which is not an earlier"),
        ({1: {"start_from": "dpo"}}, "'dpo' starts from itself"),
        ({1: {"start_from": ["sft", "dpo"]}}, "'dpo' starts from itself"),
        ({"start_from": "dpo"}, "'sft' starts from 'dpo', which is not an earlier"),
        ({0: {"name": "pieces"}}, "cannot be the name"),
        ({1: {"start_from": "stf"}}, "no stage and no folder 'stf'"),
        ({1: {"trian": {}}}, "unknown key 'trian'"),
        ({1: {"train": {"epochs": -1}}}, "'train.epochs' cannot be -1"),
    ],
)
def test_invalid_file_is_rejected(shared, stages, tmp_path, changes, message):
    listed = [deep_merge(stage, changes.get(number, {})) for number, stage in enumerate(stages)]
    outside = {key: value for key, value in changes.items() if isinstance(key, str)}
    error = refusal(read_chain, {**shared(tmp_path / "c"), "stages": listed, **outside})
    assert message in error.message
    assert not (tmp_path / "c").exists()


def test_other_commands_name_the_problem(shared, stages, tmp_path):
    error = refusal(RunConfig.read, {**shared(tmp_path / "c"), "stages": stages})
    assert "several stages" in error.message and "deltaw train" in error.hint


# Checks before the first stage.


def test_other_files_in_folder_are_kept(chain):
    chain.folder.mkdir()
    (chain.folder / "thesis.txt").write_text("mine")
    assert "thesis.txt" in refusal(list, train_stages(chain)).message
    assert [path.name for path in chain.folder.iterdir()] == ["thesis.txt"]


def test_rows_of_first_stage_are_checked_before_folder_exists(shared, stages, tmp_path):
    missing = deep_merge(stages[0], {"data": {"train": "missing.jsonl"}})
    refusal(list, train_stages(parsed({**shared(tmp_path / "c"), "stages": [missing, stages[1]]})))
    assert not (tmp_path / "c").exists()


def test_stage_given_by_its_folder_is_that_stage(shared, stages, tmp_path):
    folder = tmp_path / "c"
    second = {**stages[1], "start_from": str(tmp_path / "c" / ".." / "c" / "sft")}
    chain = parsed({**shared(folder), "stages": [stages[0], second]})
    assert chain.stages[1].parents == ("sft",)
    own = {**stages[1], "start_from": str(folder / "dpo")}
    assert "starts from itself" in refusal(read_chain, {**shared(folder), "stages": [stages[0], own]}).message


def test_finished_stage_without_adapter_is_rejected(chain):
    list(train_stages(chain))
    (chain.folder / "dpo" / ADAPTER).unlink()
    error = refusal(list, train_stages(chain))
    assert "its adapter is missing" in error.message and "stage 'dpo'" in error.location


@pytest.mark.parametrize("name", ["pieces", "sft"])
def test_links_out_of_chain_folder_are_rejected(chain, tmp_path, name):
    chain.folder.mkdir()
    (chain.folder / "study.json").write_text('{"kind": "chain"}')
    outside = tmp_path / "outside"
    outside.mkdir()
    (chain.folder / name).symlink_to(outside)
    assert "is a link" in refusal(list, train_stages(chain)).message
    assert not list(outside.iterdir())


# Training.


def test_chain_equals_separate_runs(finished, shared, stages, tmp_path):
    values = shared(tmp_path / "sft")
    sft = deltaw.fit({**values, "data": stages[0]["data"]}).output
    dpo = {"task": "dpo", "data": stages[1]["data"], "start_from": str(sft), "output": str(tmp_path / "dpo")}
    expected = [sft, deltaw.fit({**values, **dpo}).output]
    assert file_bytes(finished.chain) == [(folder / ADAPTER).read_bytes() for folder in expected]


@pytest.mark.parametrize(
    ("stage", "steps"),
    [
        pytest.param("sft", 2, marks=pytest.mark.slow),
        ("sft", 4),
        ("dpo", 1),
        pytest.param("dpo", 3, marks=pytest.mark.slow),
    ],
)
def test_interrupted_chain_resumes_to_same_adapters(finished, chain, stage, steps):
    def open_callback(opened) -> Callback:
        return RecordingCallback(stop_after=steps) if opened.name == stage else Callback()

    interrupted = list(train_stages(chain, open_callback))
    assert [name.name for name, _ in interrupted] == ["sft", "dpo"][: len(interrupted)]
    assert interrupted[-1][0].name == stage or steps == 4
    assert [stage.name for stage, _ in train_stages(chain)] == ["sft", "dpo"]
    for first, second in zip(finished.chain.stages, chain.stages, strict=True):
        assert_same_run(chain.folder / second.name, finished.chain.folder / first.name)


def test_finished_chain_is_unchanged(finished):
    before = file_bytes(finished.chain)
    results = [result for _, result in train_stages(finished.chain)]
    assert all(result.earlier is not None for result in results)
    assert file_bytes(finished.chain) == before


def test_changed_stage_of_finished_chain_is_rejected(finished, shared, stages):
    values = {
        **shared(finished.chain.folder),
        "stages": [deep_merge(stages[0], {"train": {"max_steps": 5}}), stages[1]],
    }
    error = refusal(list, train_stages(parsed(values)))
    assert "max_steps" in str(error) and "stage 'sft'" in error.location


def test_failed_stage_stops_chain(chain):
    class Failing(Callback):
        def on_step(self, step) -> None:
            raise UserError("the disk is full", location="step 1")

    error = refusal(list, train_stages(chain, lambda _: Failing()))
    assert "stage 'sft': step 1" in error.location
    assert not (chain.folder / "dpo").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="requires POSIX signals")
def test_chain_killed_six_times_equals_uninterrupted_one(shared, stages, tmp_path):
    """The kills are spread over both stages, with the same command each time."""
    train = {**TRAIN, "max_steps": 60, "checkpoint_every": 5}
    files = {}
    for name in ("whole", "killed"):
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump({**shared(tmp_path / name), "train": train, "stages": stages}))

    def finish(name: str) -> None:
        with processes.start("-m", "deltaw", "train", files[name]) as process:
            process.communicate(timeout=300)
            assert process.returncode == 0

    finish("whole")

    def lines() -> int:
        return sum(path.read_text().count("\n") for path in (tmp_path / "killed").glob("*/metrics.jsonl"))

    total = sum(path.read_text().count("\n") for path in (tmp_path / "whole").glob("*/metrics.jsonl"))
    for number in range(6):
        with processes.start("-m", "deltaw", "train", files["killed"]) as process:
            process.wait_for(lambda number=number: lines() > (number + 0.5) / 6 * total)
            process.kill()
    finish("killed")
    for stage in ("sft", "dpo"):
        assert_same_run(tmp_path / "killed" / stage, tmp_path / "whole" / stage)


@needs_gloo
@pytest.mark.slow
def test_two_processes_train_same_chain(finished, shared, stages, tmp_path):
    train_all({**shared(tmp_path / "several"), "stages": stages})
    for stage in finished.chain.stages:
        assert_same_sums(tmp_path / "several" / stage.name, finished.chain.folder / stage.name)


# Scores.


def test_all_models_are_scored_on_rows_of_each_stage(finished):
    assert [held_out.stage for held_out in finished.held_out] == ["sft", "dpo"]
    for held_out, rows in zip(finished.held_out, (4, 3), strict=True):
        assert list(held_out.scores) == [BASE, "sft", "dpo"]
        assert held_out.rows == rows and not held_out.errors
        assert all(len(score.per_row) == rows for score in held_out.scores.values())
        assert len({score.metrics["loss"] for score in held_out.scores.values()}) == 3


def test_score_of_stage_is_that_of_its_run(finished):
    result = finished.results["sft"]
    by_model = finished.held_out[0].scores
    assert by_model["sft"].metrics["loss"] == pytest.approx(result.evaluation.metrics["loss"], rel=1e-5)
    base = read_run(finished.chain.folder / "sft").base
    assert by_model[BASE].metrics["loss"] == pytest.approx(base["loss"], rel=1e-5)


def test_scores_are_stored(finished, monkeypatch):
    monkeypatch.setattr(chain_module, "_evaluate", None)
    again = score_stages(finished.chain)
    assert [vars(entry) for entry in again] == [vars(entry) for entry in finished.held_out]


@pytest.mark.parametrize(
    "score", [None, [], {}, {"metric": 1}, {"metrics": {"loss": "high"}}, {"metrics": 3}, {"interval": [[]]}]
)
def test_damaged_score_is_computed_again(finished, score):
    file = finished.chain.folder / "pieces/sft.dpo.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({**stored, "score": {**stored["score"], **score} if score else score, "rows": 4}))
    again = score_stages(finished.chain)
    assert [vars(entry) for entry in again] == [vars(entry) for entry in finished.held_out]


def test_scores_change_with_adapter(finished):
    sft, _ = finished.chain.stages
    models = scored_models(finished.chain)
    assert list(models) == [BASE, "sft", "dpo"]
    assert len({score_key(evaluated_config(finished.chain, sft, model)) for model in models.values()}) == 3


def test_report_has_stages_and_differences(finished):
    table = stages_table(finished)
    assert [row[0] for row in table.rows] == ["sft", "dpo"]
    assert table.rows[1][1] == "sft"
    for scores in score_tables(finished):
        assert scores.rows[0][2:4] == ("", "") and scores.head[-1] == "loss"
        assert scores.rows[1][2] and scores.rows[2][3] and not scores.rows[1][3]
    assert " ± " in score_tables(finished)[1].rows[1][2]
    write_results(finished)
    page = (finished.chain.folder / PAGE_FILE).read_text()
    assert "held-out rows of" in page and 'href="dpo/report.html"' in page
    stored = json.loads((finished.chain.folder / "chain.json").read_text())
    assert [stage["name"] for stage in stored["stages"]] == ["sft", "dpo"]
    assert list(stored["held_out"]["sft"]["scores"]) == [BASE, "sft", "dpo"]


def test_start_of_first_stage_is_scored_too(finished, shared, stages, tmp_path):
    """The rows, the start and the result of the second stage are those of the chain of both."""
    start = str(finished.chain.folder / "sft")
    chain = parsed({**shared(tmp_path / "c"), "stages": [stages[1]], "start_from": start})
    (result,) = [result for _, result in train_stages(chain)]
    (held_out,) = score_stages(chain)
    assert list(held_out.scores) == [BASE, "start_from", "dpo"] and held_out.is_relative
    expected = finished.held_out[1].scores
    for name, other in {BASE: BASE, "start_from": "sft", "dpo": "dpo"}.items():
        assert held_out.scores[name].metrics == expected[other].metrics
    table = score_tables(ChainResult(chain, {"dpo": result}, [held_out]))[0]
    assert "relative to the base model" in table.caption and table.rows[2][3]


def test_worse_scores_than_parent_are_reported(finished):
    worse = copy.deepcopy(finished)
    scores = worse.held_out[0].scores
    scores["sft"] = replace(scores["sft"], per_row=[1.0] * 4, metrics={**scores["sft"].metrics, "exact_match": 1.0})
    assert warning_lines(worse) == ["'dpo' is worse than 'sft' on the rows of 'sft': exact match -100.0"]


# Command line.


@pytest.fixture
def call(capsys):
    from deltaw.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_info:
            main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return int(exit_info.value.code or 0), output.out, output.err

    return run


def test_command_trains_chain(shared, stages, tmp_path, call):
    file = tmp_path / "chain.yaml"
    file.write_text(yaml.safe_dump({**shared(tmp_path / "c"), "stages": stages}))
    status, out, err = call("train", file, "--train.max_steps", "1", "--json")
    assert status == 0
    assert [stage["steps"] for stage in json.loads(out)["stages"]] == [1, 1]
    assert "stage 'dpo', 2 of 2" in err
    status, out, _ = call("train", file, "--train.max_steps", "1")
    assert status == 0 and " ".join(out.split()).count("is finished and left unchanged") == 2


def test_command_plans_chain(shared, stages, tmp_path, call):
    file = tmp_path / "chain.yaml"
    file.write_text(yaml.safe_dump({**shared(tmp_path / "c"), "stages": stages}))
    status, out, _ = call("plan", file, "--json")
    assert status == 0
    plans = json.loads(out)
    assert list(plans) == ["sft", "dpo"]
    assert all(plan["peak_resident_bytes"] > 1e8 for plan in plans.values())
    starts = [plan["seconds_by_phase"].get("starting", 0) for plan in plans.values()]
    assert starts[0] > 0 and starts[1] == 0, "one process trains all stages"
    assert not (tmp_path / "c").exists()
