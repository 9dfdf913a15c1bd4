"""The default learning rate of preference trainings on few rows."""

from __future__ import annotations

import functools
import json

import pytest

from deltaw.runs.fit import fit
from deltaw.tasks.preference.task import FEW_ROWS_RATE, MANY_ROWS
from tests.conftest import write_rows
from tests.training.runs import RecordingCallback, assert_same_run, metrics, stopped_run


@pytest.fixture
def make_config(settings, tmp_path):
    """Return a function that makes settings of a run on this number of pairs, or of single answers with KTO."""

    def make(name, count, loss="dpo", **train):
        answers = {"completion": "red", "label": True} if loss == "kto" else {"chosen": "red", "rejected": "blue"}
        rows = [
            {"prompt": f"paint {n}", **answers, **({"label": n % 2 == 0} if loss == "kto" else {})}
            for n in range(count)
        ]
        file = write_rows(tmp_path / f"{name}.jsonl", rows)
        options = {"max_steps": 1, "learning_rate": "auto", "schedule": "constant", "warmup": 0, **train}
        data = {"train": str(file), "eval": None}
        return settings(tmp_path / name, task="preference", data=data, preference={"loss": loss}, train=options)

    return make


def rate_of(run):
    return metrics(run, "learning_rate")[0]["learning_rate"]


@pytest.mark.parametrize("loss", ["dpo", "kto"])
@pytest.mark.slow
def test_few_rows_train_at_lower_default_rate(make_config, loss):
    few = RecordingCallback()
    many = RecordingCallback()
    few_run = fit(make_config("few", MANY_ROWS - 1, loss), callback=few).output
    many_run = fit(make_config("many", MANY_ROWS, loss), callback=many).output
    assert rate_of(few_run) == pytest.approx(FEW_ROWS_RATE * rate_of(many_run), rel=0.06)
    assert any("times 0.3 (fewer than 200 training rows)" in line for line in few.lines)
    assert not any("training rows" in line and "times" in line for line in many.lines)
    chosen = json.loads((few_run / "run.json").read_text())["chosen"]["train.learning_rate"]
    assert chosen["value"] == rate_of(few_run) and "fewer than 200" in chosen["why"]


def test_explicit_learning_rate_is_used_for_few_rows(make_config):
    callback = RecordingCallback()
    run = fit(make_config("run", 8, learning_rate=1e-3), callback=callback).output
    assert rate_of(run) == pytest.approx(1e-3)
    assert not any("fewer than 200" in line for line in callback.lines)


def test_resumed_run_keeps_rate_of_few_rows(make_config):
    make = functools.partial(make_config, count=8, max_steps=4, checkpoint_every=2)
    whole = fit(make("whole")).output
    run = stopped_run(make("run"), 3)
    assert fit(make("run")).resumed_from_step >= 2
    assert_same_run(run, whole)
