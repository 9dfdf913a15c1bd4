"""Whole runs on a tiny model: early stopping, the best adapter, named sets, answers, samples, time."""

from __future__ import annotations

import shutil

import pytest
import torch

from deltaw.data.settings import DataSettings
from deltaw.errors import UserError
from deltaw.runs.fit import fit
from deltaw.runs.folder import Run
from deltaw.settings import RunConfig
from deltaw.training.origin import score_run
from tests.conftest import COLORS, write_rows
from tests.training.runs import METHODS, Told, adapter, metrics, often, opened

RUINED = {"learning_rate": 3e-2, "schedule": "constant", "warmup": 0, "epochs": 8, "eval_every": 2}


@pytest.fixture(scope="session")
def contrary(tmp_path_factory):
    """Rows with other answers than those that are trained on, so that training soon makes them unlikely."""
    rows = [{"prompt": f"paint it {c}", "completion": "z"} for c in COLORS[:4]]
    return {"eval": str(write_rows(tmp_path_factory.mktemp("contrary") / "rows.jsonl", rows))}


def losses_by_step(folder):
    return {line["step"]: line["eval"]["loss"] for line in metrics(folder, "eval")}


def test_a_run_stops_once_it_has_not_improved_for_long(settings, tmp_path, contrary):
    told = Told()
    result = fit(settings(tmp_path / "run", data=contrary, train={**RUINED, "early_stopping": 2}), callback=told)
    losses = losses_by_step(result.output)
    best = min(losses, key=losses.get)
    steps = sorted(losses)
    assert result.outcome.steps == steps[-1] < 24 and not result.interrupted
    assert steps.index(best) == len(steps) - 3, "two evaluations without improvement after the best one"
    assert result.as_dict()["best_step"] == best
    assert result.as_dict()["best"] == {"step": best, "metric": "loss", "value": losses[best]}
    assert "early stopping" in result.as_dict()["stopped_early"]
    assert sum("early stopping" in line for line in told.lines) == 1
    assert result.evaluation.metrics["loss"] == losses[steps[-1]], "the adapter is the last by default"
    assert len(losses) == len(metrics(result.output, "eval")), "no step is evaluated twice"


def test_a_run_that_keeps_improving_is_not_stopped_and_its_best_adapter_is_its_last(settings, tmp_path):
    train = {"learning_rate": 1e-3, "eval_every": 1, "early_stopping": 1, "epochs": 2, "adapter": "best"}
    result = fit(settings(tmp_path / "run", train=train))
    assert result.outcome.steps == 6 and result.stopped_early is None
    top, last = adapter(result.output), adapter(result.output / "last")
    assert result.best["step"] == 6 and all(torch.equal(top[name], last[name]) for name in top)


@pytest.mark.parametrize("method", often("lora", "head", "prompt"))
def test_the_best_adapter_is_kept_with_the_last_beside_it(settings, tmp_path, gpt2_folder, worst, method):
    made = settings(tmp_path / "run", train={**RUINED, "epochs": 4, "adapter": "best"}, **METHODS[method])
    made |= {"model": str(gpt2_folder)} if method == "bias" else {}
    told = Told()
    result = fit(made, callback=told)
    losses = losses_by_step(result.output)
    best = max(losses, key=losses.get)
    last = result.outcome.steps
    assert best < last, "this test needs a run whose best step is not its last"
    assert result.as_dict()["best_step"] == best
    assert result.evaluation.metrics["loss"] == pytest.approx(losses[best], rel=1e-6)
    assert len(list((result.output / "best").iterdir())) == 1
    for folder, step in [(result.output, best), (result.output / "last", last)]:
        run = opened(folder, model=made["model"])
        rows = run.task.read(RunConfig.read(result.output / "run.yaml").data, seed=0).held_out
        assert score_run(run, rows).metrics["loss"] == pytest.approx(losses[step], rel=1e-4)
    assert f"the adapter is that of step {best}" in told


def test_an_interrupted_run_has_its_best_adapter_too(settings, tmp_path, worst):
    class Stops(Told):
        def should_stop(self):
            return len(self.evaluations) == 5

    train = {**RUINED, "adapter": "best"}
    result = fit(settings(tmp_path / "run", train=train), callback=Stops())
    assert result.interrupted and result.best["step"] < result.outcome.steps
    top, last = adapter(result.output), adapter(result.output / "last")
    assert not all(torch.equal(top[name], last[name]) for name in top)
    assert (result.output / "best").is_dir(), "a run that goes on needs it"


def test_how_often_to_evaluate_is_chosen_and_said_where_it_matters(settings, tmp_path):
    told = Told()
    train = {"epochs": 4, "learning_rate": 1e-4, "early_stopping": 3}
    result = fit(settings(tmp_path / "run", train=train), callback=told)
    assert [line["step"] for line in metrics(result.output, "eval")] == [3, 6, 9, 12]
    assert "evaluating every 3 steps" in told
    assert "eval_every: null  # 3: " in (result.output / "run.yaml").read_text()
    assert RunConfig.read(result.output / "run.yaml").train.eval_every is None


def test_what_needs_held_out_rows_is_refused_without_them(settings, tmp_path):
    for name, value in {"early_stopping": 3, "adapter": "best", "eval_answers": 4}.items():
        with pytest.raises(UserError, match=f"train.{name}") as error:
            fit(settings(tmp_path / "run", data={"eval": None}, train={name: value}))
        assert "data.eval" in error.value.hint and not (tmp_path / "run").exists()


def test_several_sets_are_evaluated_by_name_as_each_would_be_alone_and_the_first_one_decides(
    settings, tmp_path, rows_file
):
    others = write_rows(tmp_path / "other.jsonl", [{"prompt": f"paint it {c}", "completion": "no"} for c in COLORS[:4]])
    same = str(shutil.copy(rows_file, tmp_path / "same.jsonl"))
    told = Told()
    data = {"eval": {"others": str(others), "held_out": 2, "same": same}}
    result = fit(settings(tmp_path / "run", data=data, train={"eval_every": 2}), callback=told)
    lines = metrics(result.output, "eval")
    assert all(list(line["eval"]) == [*data["eval"]] for line in lines)
    assert lines[0]["eval"]["others"].keys() == {"loss", "perplexity", "exact_match"}
    answer = result.as_dict()
    assert answer["eval"] == lines[-1]["eval"]
    assert answer["score"]["value"] == answer["eval"]["others"]["exact_match"]
    assert result.best["value"] == min(line["eval"]["others"]["loss"] for line in lines)
    assert "evaluation set 'others': 4 rows" in told and "8 of them are also training rows" in told
    assert "held-out held_out loss" in (result.output / "README.md").read_text()
    assert RunConfig.read(result.output / "run.yaml").data.eval == data["eval"]
    drawn = fit(settings(tmp_path / "drawn", data={"eval": 2})).as_dict()
    assert answer["eval"]["held_out"] == pytest.approx(drawn["eval"])
    run = opened(result.output)
    rows, _ = run.task.read_file(str(others), DataSettings(train="unused"), None)
    assert answer["eval"]["others"]["loss"] == pytest.approx(score_run(run, rows).metrics["loss"], rel=1e-4)


def test_sets_that_cannot_be_are_refused(settings, tmp_path, rows_file):
    for sets, problem in [
        ({"a": 0.1, "b": 0.2}, "both to be drawn"),
        ({}, "names no set"),
        ({"a": 0}, "has no rows"),
        ({"a": -1}, "data.eval is -1"),
        ({"": 0.1}, "no name"),
        ({"a": "missing.jsonl", "b": "gone.jsonl"}, "missing.jsonl"),
        ({"a": 0.3, "b": "gone.jsonl"}, "gone.jsonl"),
    ]:
        with pytest.raises(UserError) as error:
            fit(settings(tmp_path / "run") | {"data": {"train": str(rows_file), "eval": sets}})
        assert problem in str(error.value) and not (tmp_path / "run").exists()


def test_answers_are_written_and_scored_at_each_evaluation(settings, tmp_path):
    train = {"eval_every": 2, "eval_answers": 2, "epochs": 12, "batch_size": 8, "learning_rate": 3e-2}
    rows = [{"prompt": f"paint it {c}", "completion": c[0]} for c in COLORS[:4]]
    data = {"eval": str(write_rows(tmp_path / "same.jsonl", rows))}
    result = fit(settings(tmp_path / "run", data=data, train={**train, "schedule": "constant"}))
    found = [line["eval"]["written_exact_match"] for line in metrics(result.output, "eval")]
    assert set(found) <= {0.0, 0.5, 1.0} and found[-1] == 1.0 > found[0]
    assert result.as_dict()["score"]["metric"] == "exact_match"


def test_answers_and_samples_do_not_disturb_the_training(settings, tmp_path):
    lora = {"dropout": 0.1}
    plain = fit(settings(tmp_path / "plain", lora=lora, train={"epochs": 2}))
    train = {"epochs": 2, "eval_every": 1, "eval_answers": 2, "samples": 2, "adapter": "best"}
    watched = fit(settings(tmp_path / "watched", lora=lora, train=train))

    ours, theirs = (
        [(line["step"], line["loss"], line["gradient_norm"]) for line in metrics(run.output, "learning_rate")]
        for run in (plain, watched)
    )
    assert ours == theirs
    last = adapter(watched.output / "last")
    assert all(torch.equal(tensor, last[name]) for name, tensor in adapter(plain.output).items())


@pytest.mark.parametrize("method", often("lora", of=("lora", "full", "prompt")))
def test_samples_show_the_base_models_answers_and_the_adapters(settings, tmp_path, method):
    told = Told()
    train = {"samples": 1, "eval_every": 2, "learning_rate": 5e-2, "epochs": 2}
    result = fit(settings(tmp_path / "run", method=method, train=train), callback=told)
    lines = metrics(result.output, "samples")
    assert [line["step"] for line in lines] == [0, 2, 4, 6] == [step for step, _ in told.samples]
    for line, (_, samples) in zip(lines, told.samples, strict=True):
        (sample,) = line["samples"]
        assert sample.keys() == {"row", "prompt", "expected", "answer"}
        assert sample["prompt"].startswith("paint it ") and samples[0].as_dict() == sample
        assert sample["prompt"].removeprefix("paint it ").startswith(sample["expected"])
    model, folder = settings(tmp_path)["model"], result.output
    for reference, line in [(model, lines[0]), (str(folder), lines[-1])]:
        run = opened(reference)
        rows = run.task.read(RunConfig.read(folder / "run.yaml").data, seed=0).held_out
        (row,) = [row for row in rows if row.row == line["samples"][0]["row"]]
        (answer,) = score_run(run, [row], shown=1, max_new_tokens=16).answers
        assert answer.written == line["samples"][0]["answer"]


@pytest.mark.slow
def test_the_base_model_is_evaluated_before_the_first_step_where_that_is_cheap(settings, tmp_path):
    told = Told(stop_after=4)
    base = fit(settings(tmp_path / "none", train={"max_steps": 3, "learning_rate": 1e-6}))
    run = tmp_path / "run"
    train = {"epochs": 3, "checkpoint_every": 2, "checkpoint_minutes": None}
    fit(settings(run, train=train), callback=told)
    assert told.evaluations == [], "it is no evaluation of the adapter"
    fit(settings(run, train=train))
    (line,) = metrics(run, "base")
    assert line["step"] == 0 and metrics(run).index(line) == 0, "not again where a run goes on"
    assert line["base"] == pytest.approx(base.evaluation.as_dict(), rel=1e-3)
    assert Run(run).base == line["base"] and Run(run).metrics.evaluated("loss")[0] == (0, line["base"]["loss"])
    for name, train in {"many": {"max_steps": 2}, "budget": {"epochs": 3, "time": "100s"}}.items():
        assert metrics(fit(settings(tmp_path / name, train=train)).output, "base") == []


def test_small_models_and_rows_without_prompts_give_no_samples(settings, tmp_path):
    told = Told()
    result = fit(settings(tmp_path / "run", train={"max_steps": 1}), callback=told)
    assert told.samples == [] and "samples: auto  # 0: a model of" in (result.output / "run.yaml").read_text()
    text = write_rows(tmp_path / "text.jsonl", [{"text": f"it is {c}"} for c in COLORS])
    changes = {"data": {"train": str(text)}, "train": {"max_steps": 1, "samples": 2}}
    fit(settings(tmp_path / "text", **changes), callback=told)
    assert told.samples == []


def test_a_run_with_a_time_budget_plans_its_steps_and_ends(settings, tmp_path, clock):
    told = Told()
    train = {"time": "60s", "epochs": 1000, "schedule": "cosine"}
    result = fit(settings(tmp_path / "run", train=train), callback=told)
    planned = [line for line in told.lines if line.startswith("time 60s")]
    assert planned and "steps planned" in planned[0]
    assert 10 < result.outcome.steps < 200 and not result.interrupted
    rates = [line["learning_rate"] for line in metrics(result.output) if "learning_rate" in line]
    assert rates[-1] < 0.2 * max(rates)
    assert result.evaluation.metrics


def test_a_warning_is_said_and_stands_among_the_metrics(settings, tmp_path):
    told = Told()
    train = {"learning_rate": 1e-4, "max_grad_norm": 1e-3, "batch_size": 1, "max_steps": 201}
    (line,) = metrics(fit(settings(tmp_path / "run", train=train), callback=told).output, "warning")
    assert (line["step"], line["warning"]["kind"]) == (200, "clipped")
    assert sum("were clipped to train.max_grad_norm 0.001" in said for said in told.lines) == 1
