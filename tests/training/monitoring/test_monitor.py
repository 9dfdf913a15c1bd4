"""Complete runs on a tiny model: early stopping, best adapter, named evaluation sets, samples, and time budget."""

from __future__ import annotations

import shutil

import pytest
import torch

from deltaw.errors import UserError
from deltaw.inference.scores import ScoreOptions
from deltaw.runs.fit import fit
from deltaw.runs.folder import Run
from deltaw.settings.config import RunConfig
from deltaw.settings.data import DataSettings
from tests.conftest import COLORS, refusal, write_rows
from tests.training.runs import METHODS, RecordingCallback, adapter, losses, metrics, open_on_cpu, slow_except

OVERFITTING = {"learning_rate": 3e-2, "schedule": "constant", "warmup": 0, "epochs": 8, "eval_every": 2}


@pytest.fixture(scope="session")
def conflicting_rows(tmp_path_factory):
    """Rows with other completions than the training rows. Their loss soon increases during training."""
    rows = [{"prompt": f"paint it {c}", "completion": "z"} for c in COLORS[:4]]
    return {"eval": str(write_rows(tmp_path_factory.mktemp("contrary") / "rows.jsonl", rows))}


def losses_by_step(folder):
    return {line["step"]: line["eval"]["loss"] for line in metrics(folder, "eval")}


def test_run_stops_early_without_improvement(settings, tmp_path, conflicting_rows):
    callback = RecordingCallback()
    train = {**OVERFITTING, "early_stopping": 2}
    result = fit(settings(tmp_path / "run", data=conflicting_rows, train=train), callback=callback)
    eval_losses = losses_by_step(result.output)
    best = min(eval_losses, key=eval_losses.get)
    steps = sorted(eval_losses)
    assert result.outcome.steps == steps[-1] < 24 and not result.interrupted
    assert steps.index(best) == len(steps) - 3, "two evaluations without improvement after the best one"
    assert result.as_dict()["best_step"] == best
    assert result.as_dict()["best"] == {"step": best, "metric": "loss", "value": eval_losses[best]}
    assert "early stopping" in result.as_dict()["stopped_early"]
    assert sum("early stopping" in line for line in callback.lines) == 1
    assert result.evaluation.metrics["loss"] == eval_losses[steps[-1]], "the last adapter is saved by default"
    assert len(eval_losses) == len(metrics(result.output, "eval")), "no step is evaluated twice"


def test_improving_run_is_not_stopped_and_last_adapter_is_best(settings, tmp_path):
    train = {"learning_rate": 1e-3, "eval_every": 1, "early_stopping": 1, "epochs": 2, "saved_adapter": "best"}
    result = fit(settings(tmp_path / "run", train=train))
    assert result.outcome.steps == 6 and result.stopped_early is None
    top = adapter(result.output)
    last = adapter(result.output / "last")
    assert result.best["step"] == 6 and all(torch.equal(top[name], last[name]) for name in top)


@pytest.mark.parametrize("method", slow_except("lora", "head"))
def test_best_and_last_adapters_are_saved(settings, tmp_path, gpt2_folder, worst, method):
    config = settings(tmp_path / "run", train={**OVERFITTING, "epochs": 4, "saved_adapter": "best"}, **METHODS[method])
    config |= {"model": str(gpt2_folder)} if method == "bias" else {}
    callback = RecordingCallback()
    result = fit(config, callback=callback)
    eval_losses = losses_by_step(result.output)
    best = max(eval_losses, key=eval_losses.get)
    last = result.outcome.steps
    assert result.as_dict()["best_step"] == best < last
    assert result.evaluation.metrics["loss"] == pytest.approx(eval_losses[best], rel=1e-6)
    assert len(list((result.output / "best").iterdir())) == 1
    for folder, step in [(result.output, best), (result.output / "last", last)]:
        run = open_on_cpu(folder, model=config["model"])
        rows = run.task.read(RunConfig.read(result.output / "run.yaml").data, seed=0).held_out
        assert run.score(rows).metrics["loss"] == pytest.approx(eval_losses[step], rel=1e-4)
    assert f"the adapter is that of step {best}" in callback


def test_interrupted_run_saves_best_adapter(settings, tmp_path, worst):
    class StoppingCallback(RecordingCallback):
        def should_stop(self):
            return len(self.evaluations) == 5

    train = {**OVERFITTING, "saved_adapter": "best"}
    result = fit(settings(tmp_path / "run", train=train), callback=StoppingCallback())
    assert result.interrupted and result.best["step"] < result.outcome.steps
    top = adapter(result.output)
    last = adapter(result.output / "last")
    assert not all(torch.equal(top[name], last[name]) for name in top)
    assert (result.output / "best").is_dir(), "a resumed run needs it"


def test_evaluation_interval_is_chosen_and_reported(settings, tmp_path):
    callback = RecordingCallback()
    train = {"epochs": 4, "learning_rate": 1e-4, "early_stopping": 3}
    result = fit(settings(tmp_path / "run", train=train), callback=callback)
    assert [line["step"] for line in metrics(result.output, "eval")] == [3, 6, 9, 12]
    assert "evaluating every 3 steps" in callback
    assert "eval_every: null  # 3: " in (result.output / "run.yaml").read_text()
    assert RunConfig.read(result.output / "run.yaml").train.eval_every is None


def test_settings_that_need_eval_rows_are_rejected_without_them(settings, tmp_path):
    for name, value in {"early_stopping": 3, "saved_adapter": "best", "eval_answers": 4}.items():
        with pytest.raises(UserError, match=f"train.{name}") as error:
            fit(settings(tmp_path / "run", data={"eval": None}, train={name: value}))
        assert "data.eval" in error.value.hint and not (tmp_path / "run").exists()


def test_named_evaluation_sets_match_single_sets_and_first_decides(settings, tmp_path, rows_file):
    other_rows = [{"prompt": f"paint it {c}", "completion": "no"} for c in COLORS[:4]]
    other_rows = write_rows(tmp_path / "other.jsonl", other_rows)
    same_file = str(shutil.copy(rows_file, tmp_path / "same.jsonl"))
    callback = RecordingCallback()
    data = {"eval": {"others": str(other_rows), "held_out": 2, "same": same_file}}
    result = fit(settings(tmp_path / "run", data=data, train={"eval_every": 2}), callback=callback)
    lines = metrics(result.output, "eval")
    assert all(list(line["eval"]) == [*data["eval"]] for line in lines)
    assert lines[0]["eval"]["others"].keys() == {"loss", "perplexity", "exact_match"}
    summary = result.as_dict()
    assert summary["eval"] == lines[-1]["eval"]
    assert summary["score"]["value"] == summary["eval"]["others"]["exact_match"]
    assert result.best["value"] == min(line["eval"]["others"]["loss"] for line in lines)
    assert "evaluation set 'others': 4 rows" in callback and "8 of them are also training rows" in callback
    assert "held-out held_out loss" in (result.output / "README.md").read_text()
    assert RunConfig.read(result.output / "run.yaml").data.eval == data["eval"]
    sampled = fit(settings(tmp_path / "drawn", data={"eval": 2})).as_dict()
    assert summary["eval"]["held_out"] == pytest.approx(sampled["eval"])
    run = open_on_cpu(result.output)
    rows, _ = run.task.read_file(str(other_rows), DataSettings(train="unused"), None)
    assert summary["eval"]["others"]["loss"] == pytest.approx(run.score(rows).metrics["loss"], rel=1e-4)


def test_invalid_evaluation_sets_are_rejected(settings, tmp_path, rows_file):
    for sets, problem in [
        ({"a": 0.1, "b": 0.2}, "both be sampled"),
        ({}, "names no set"),
        ({"a": 0}, "has no rows"),
        ({"a": -1}, "data.eval is -1"),
        ({"": 0.1}, "no name"),
        ({"a": "missing.jsonl", "b": "gone.jsonl"}, "missing.jsonl"),
        ({"a": 0.3, "b": "gone.jsonl"}, "gone.jsonl"),
    ]:
        error = refusal(fit, settings(tmp_path / "run") | {"data": {"train": str(rows_file), "eval": sets}})
        assert problem in str(error) and not (tmp_path / "run").exists()


def test_answers_are_generated_and_scored_at_each_evaluation(settings, tmp_path):
    train = {"eval_every": 4, "eval_answers": 2, "epochs": 12, "batch_size": 8, "learning_rate": 3e-2}
    rows = [{"prompt": f"paint it {c}", "completion": c[0]} for c in COLORS[:4]]
    data = {"eval": str(write_rows(tmp_path / "same.jsonl", rows))}
    result = fit(settings(tmp_path / "run", data=data, train={**train, "schedule": "constant"}))
    exact_match = [line["eval"]["generated_exact_match"] for line in metrics(result.output, "eval")]
    assert set(exact_match) <= {0.0, 0.5, 1.0} and exact_match[-1] == 1.0 > exact_match[0]
    assert result.as_dict()["score"]["metric"] == "exact_match"


def test_answers_and_samples_do_not_change_training(settings, tmp_path):
    lora = {"dropout": 0.1}
    plain = fit(settings(tmp_path / "plain", lora=lora))
    train = {"eval_every": 1, "eval_answers": 1, "samples": 1, "saved_adapter": "best"}
    monitored = fit(settings(tmp_path / "watched", lora=lora, train=train))
    assert losses(plain.output) == losses(monitored.output)
    last = adapter(monitored.output / "last")
    assert all(torch.equal(tensor, last[name]) for name, tensor in adapter(plain.output).items())


@pytest.mark.parametrize("method", slow_except("lora", names=("lora", "full", "prompt")))
def test_samples_contain_answers_of_base_model_and_adapter(settings, tmp_path, method):
    callback = RecordingCallback()
    train = {"samples": 1, "eval_every": 2, "learning_rate": 5e-2, "max_steps": 4}
    result = fit(settings(tmp_path / "run", method=method, train=train), callback=callback)
    lines = metrics(result.output, "samples")
    assert [line["step"] for line in lines] == [0, 2, 4] == [step for step, _ in callback.samples]
    for line, (_, samples) in zip(lines, callback.samples, strict=True):
        (sample,) = line["samples"]
        assert sample.keys() == {"row", "prompt", "expected", "answer"}
        assert sample["prompt"].startswith("paint it ") and samples[0].as_dict() == sample
        assert sample["prompt"].removeprefix("paint it ").startswith(sample["expected"])
    model = settings(tmp_path)["model"]
    folder = result.output
    for model_reference, line in [(model, lines[0]), (str(folder), lines[-1])]:
        run = open_on_cpu(model_reference)
        rows = run.task.read(RunConfig.read(folder / "run.yaml").data, seed=0).held_out
        (row,) = [row for row in rows if row.row == line["samples"][0]["row"]]
        (answer,) = run.score([row], ScoreOptions(num_answers=1, max_new_tokens=16)).answers
        assert answer.output == line["samples"][0]["answer"]


@pytest.mark.slow
def test_base_model_is_evaluated_before_first_step_if_cheap(settings, tmp_path):
    callback = RecordingCallback(stop_after=4)
    base = fit(settings(tmp_path / "none", train={"max_steps": 3, "learning_rate": 1e-6}))
    run = tmp_path / "run"
    train = {"epochs": 3, "checkpoint_every": 2, "checkpoint_minutes": None}
    fit(settings(run, train=train), callback=callback)
    assert callback.evaluations == [], "it is not an evaluation of the adapter"
    fit(settings(run, train=train))
    (line,) = metrics(run, "base")
    assert line["step"] == 0 and metrics(run).index(line) == 0, "a resumed run must not repeat it"
    assert line["base"] == pytest.approx(base.evaluation.as_dict(), rel=1e-3)
    assert Run(run).base == line["base"] and Run(run).metrics.evaluated("loss")[0] == (0, line["base"]["loss"])
    for name, train in {"many": {"max_steps": 1}, "budget": {"epochs": 3, "time": "100s"}}.items():
        assert metrics(fit(settings(tmp_path / name, train=train)).output, "base") == []


def test_small_models_and_rows_without_prompts_have_no_samples(settings, tmp_path):
    callback = RecordingCallback()
    result = fit(settings(tmp_path / "run", train={"max_steps": 1}), callback=callback)
    assert callback.samples == [] and "samples: auto  # 0: a model of" in (result.output / "run.yaml").read_text()
    text = write_rows(tmp_path / "text.jsonl", [{"text": f"it is {c}"} for c in COLORS])
    changes = {"data": {"train": str(text)}, "train": {"max_steps": 1, "samples": 2}}
    fit(settings(tmp_path / "text", **changes), callback=callback)
    assert callback.samples == []


def test_run_with_time_budget_plans_its_steps_and_finishes(settings, tmp_path, clock):
    callback = RecordingCallback()
    train = {"time": "60s", "epochs": 1000, "schedule": "cosine"}
    result = fit(settings(tmp_path / "run", train=train), callback=callback)
    plan_lines = [line for line in callback.lines if line.startswith("time 60s")]
    assert plan_lines and "steps planned" in plan_lines[0]
    assert 10 < result.outcome.steps < 200 and not result.interrupted
    rates = [line["learning_rate"] for line in metrics(result.output) if "learning_rate" in line]
    assert rates[-1] < 0.2 * max(rates) and result.evaluation.metrics


def test_warning_is_reported_and_stored_in_metrics(settings, tmp_path):
    callback = RecordingCallback()
    train = {"learning_rate": 1e-4, "max_grad_norm": 1e-3, "batch_size": 1, "max_steps": 201, "eval_every": 201}
    (line,) = metrics(fit(settings(tmp_path / "run", train=train), callback=callback).output, "warning")
    assert (line["step"], line["warning"]["kind"]) == (200, "clipped")
    assert sum("were clipped to train.max_grad_norm 0.001" in message for message in callback.lines) == 1
