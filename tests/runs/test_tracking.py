"""Trackers receive settings, steps and evaluations of a run.

TensorBoard and trackio are tested with their packages if installed. wandb is replaced by a mock module.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import get_args
from unittest import mock

import pytest

from deltaw.errors import UserError
from deltaw.runs import tracking
from deltaw.runs.fit import fit
from deltaw.settings.config import RunConfig
from tests.training.runs import RecordingCallback, metrics


def by_step(folder, key):
    """Return a metric by step. For evaluations, return the loss."""
    return {line["step"]: line[key]["loss"] if key == "eval" else line[key] for line in metrics(folder, key)}


def requires(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


@requires("tensorboard")
def test_tensorboard_logs_all_metrics(settings, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = fit(settings(tmp_path / "run", track="tensorboard", train={"epochs": 2, "eval_every": 3}))
    accumulator = EventAccumulator(str(result.output / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    expected = {f"train/{name}": by_step(result.output, name) for name in ("loss", "learning_rate", "gradient_norm")}
    for name, numbers in {**expected, "eval/loss": by_step(result.output, "eval")}.items():
        assert {event.step: event.value for event in accumulator.Scalars(name)} == pytest.approx(numbers, rel=1e-6)
    assert min(event.value for event in accumulator.Scalars("train/tokens_per_second")) > 0
    (text,) = accumulator.Tensors("settings/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    expected_rows = ("| lora.rank | 4 |", f"| output | {result.output} |", "| precision | fp32 |")
    assert all(part in table for part in (*expected_rows, "| trained_parameters |"))


@requires("trackio")
def test_trackio_logs_all_metrics(settings, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TRACKIO_PROJECT", "of-a-test")
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it reads the folder name on import
    result = fit(settings(tmp_path / "my-run", track="trackio", train={"eval_every": 2}))
    assert capfd.readouterr().out == ""
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("of-a-test", "my-run")
    for key, kind in {"train/loss": "loss", "eval/loss": "eval"}.items():
        logged = {entry["step"]: entry[key] for entry in logs if key in entry}
        assert logged == pytest.approx(by_step(result.output, kind))


@pytest.fixture
def wandb(monkeypatch):
    """Replace wandb by a mock that prints. Its ``log`` raises at step ``fails_at``."""

    def init(**arguments):
        print("wandb says a lot")
        return module

    def log(values, step):
        if step == module.fails_at:
            raise ConnectionError("the network is gone\nand more")

    module = mock.MagicMock(__spec__=importlib.util.spec_from_loader("wandb", None), fails_at=None)
    module.init.side_effect = init
    module.log.side_effect = log
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_receives_settings_steps_and_evaluations(settings, tmp_path, monkeypatch, wandb, capfd):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    result = fit(settings(tmp_path / "run", track="wandb"))
    arguments = wandb.init.call_args.kwargs
    assert arguments["project"] == "mine" and arguments["name"] == "run" and arguments["dir"] == str(result.output)
    assert arguments["config"]["lora.rank"] == 4 and arguments["config"]["train.learning_rate"] == 1e-2
    json.dumps(arguments["config"])
    logged = [(call.kwargs["step"], call.args[0]) for call in wandb.log.call_args_list]
    losses = {step: values["train/loss"] for step, values in logged if "train/loss" in values}
    assert losses == by_step(result.output, "loss") and wandb.finish.call_count == 1
    assert [step for step, values in logged if "eval/loss" in values] == [3]
    assert capfd.readouterr().out == "", "what a tracker prints is not the run's"


def test_failing_tracker_is_reported_once_without_stopping_run(settings, tmp_path, wandb):
    wandb.fails_at = 2
    recorder = RecordingCallback()
    assert fit(settings(tmp_path / "run", track="wandb"), callback=recorder).outcome.steps == 3
    message = "track wandb: failed and gets no more metrics (ConnectionError: the network is gone)"
    assert [line for line in recorder.lines if "wandb" in line] == [message]
    assert [call.kwargs["step"] for call in wandb.log.call_args_list] == [1, 2]
    # A failed run also calls finish() of its tracker.
    wandb.finish.reset_mock()
    with pytest.raises(UserError, match="diverged"):
        fit(settings(tmp_path / "broken", track="wandb", lora={"alpha": 1e20}, train={"epochs": 2}))
    assert wandb.finish.call_count == 1


def test_missing_tracker_is_rejected_early(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda module: None)
    for name in tracking.TRACKERS:
        with pytest.raises(UserError, match=f"needs the package {name}") as exc_info:
            fit(settings(tmp_path / "run", track=name, model=str(tmp_path / "no model is there")))
        assert f"pip install {name}" in exc_info.value.hint and exc_info.value.location == "track"
    assert not (tmp_path / "run").exists()
    tracker_names = {name for kind in get_args(RunConfig.model_fields["track"].annotation) for name in get_args(kind)}
    assert tracker_names == set(tracking.TRACKERS)
