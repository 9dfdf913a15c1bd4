"""Events that callbacks receive, and runs without a callback, which print no output."""

from __future__ import annotations

import itertools
from unittest import mock

import deltaw
from deltaw.training.callbacks import LineCallback
from tests.conftest import refusal
from tests.training.runs import RecordingCallback, metrics

ORDER = ("on_plan", "on_begin", "on_step", "on_evaluation", "on_end")


def test_callback_events_arrive_in_order(settings, tmp_path):
    recorder = RecordingCallback()
    callback = mock.Mock(spec=RecordingCallback, wraps=recorder)
    result = deltaw.fit(settings(tmp_path / "run", train={"eval_every": 2}), callback=callback)
    calls = itertools.groupby(name for name, *_ in callback.method_calls if name in ORDER)
    assert [name for name, _ in calls] == [*ORDER[:4], "on_step", "on_end", "on_evaluation"]
    plan, limit_bytes = callback.on_plan.call_args.args
    assert 0 < plan.peak_resident_bytes < limit_bytes and callback.on_begin.call_args.args[0].total_steps == 3
    assert recorder.steps == [1, 2, 3] and callback.on_end.call_args.args == (result.outcome,)
    losses = [(step, evaluation.metrics["loss"]) for step, evaluation in recorder.evaluations]
    assert losses == [(t["step"], t["eval"]["loss"]) for t in metrics(result.output, "eval")]
    assert [step for step, _ in losses] == [2, 3] and losses[-1][1] == result.evaluation.metrics["loss"]
    assert (result.output / "README.md").is_file()


def test_on_end_is_called_after_a_failed_run(settings, tmp_path):
    callback = mock.Mock(spec=RecordingCallback, wraps=RecordingCallback())
    broken = settings(tmp_path / "run", lora={"alpha": 1e20})
    refusal(deltaw.fit, broken, callback=callback, match="diverged")
    assert [name for name, *_ in callback.method_calls[-2:]] == ["on_end", "on_line"]
    assert callback.on_end.call_args.args == (None,)


def test_fit_from_python_prints_no_output(settings, tmp_path, capfd):
    lines = []
    short = {"train": {"max_steps": 1}}
    deltaw.fit(settings(tmp_path / "run", **short))
    deltaw.plan(settings(tmp_path / "run"))
    deltaw.fit(settings(tmp_path / "other", **short), callback=LineCallback(lines.append))
    assert lines and capfd.readouterr() == ("", "")
