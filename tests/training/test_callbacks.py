"""What a caller sees of a run, and how it stops one; without a callback a run is silent."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest

import deltaw
from deltaw.errors import UserError
from deltaw.training.callbacks import Lines
from tests.training.runs import Told, metrics

ORDER = ("on_plan", "on_begin", "on_step", "on_evaluation", "on_end")


def test_everything_is_told_in_order(settings, tmp_path):
    told = Told()
    noted = mock.Mock(spec=Told, wraps=told)
    result = deltaw.fit(settings(tmp_path / "run", train={"epochs": 2, "eval_every": 4}), callback=noted)
    calls = itertools.groupby(name for name, *_ in noted.method_calls if name in ORDER)
    assert [name for name, _ in calls] == [*ORDER[:4], "on_step", "on_end", "on_evaluation"]
    plan, limit_bytes = noted.on_plan.call_args.args
    assert 0 < plan.peak_resident_bytes < limit_bytes
    assert noted.on_begin.call_args.args[0].total_steps == 6
    assert told.steps == [1, 2, 3, 4, 5, 6] and noted.on_end.call_args.args == (result.outcome,)
    found = [(step, evaluation.metrics["loss"]) for step, evaluation in told.evaluations]
    assert found == [(t["step"], t["eval"]["loss"]) for t in metrics(result.output, "eval")]
    assert [step for step, _ in found] == [4, 6] and found[-1][1] == result.evaluation.metrics["loss"]
    assert (result.output / "README.md").is_file()


def test_the_end_is_told_also_where_a_training_fails(settings, tmp_path):
    noted = mock.Mock(spec=Told, wraps=Told())
    broken = settings(tmp_path / "run", lora={"alpha": 1e20}, train={"epochs": 2})
    with pytest.raises(UserError, match="diverged"):
        deltaw.fit(broken, callback=noted)
    assert [name for name, *_ in noted.method_calls[-2:]] == ["on_end", "on_line"]
    assert noted.on_end.call_args.args == (None,)


def test_a_run_from_python_prints_nothing(settings, tmp_path, capfd):
    said, short = [], {"train": {"max_steps": 1}}
    deltaw.fit(settings(tmp_path / "run", **short))
    deltaw.plan(settings(tmp_path / "run"))
    deltaw.fit(settings(tmp_path / "other", **short), callback=Lines(said.append))
    assert said and capfd.readouterr() == ("", "")
