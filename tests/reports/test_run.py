"""Runs from Python write their report page, also if they stop early. A failing page does not stop a run."""

from __future__ import annotations

import json
from unittest.mock import Mock

import pytest

import deltaw
from deltaw.decoding import opening
from deltaw.errors import UserError
from deltaw.inference.open_run import open_run
from deltaw.inference.run_drift import measure_run_drift
from deltaw.inference.scores import ScoreOptions
from deltaw.reports import run as reports_run
from deltaw.runs.folder import read_run
from deltaw.training.callbacks import Callback, LineCallback
from tests.reports.html_pages import Page
from tests.training.runs import load_eval_rows


class PageRecorder(Callback):
    """Records the page at every step and stops the run after ``stop_after`` steps."""

    def __init__(self, stop_after=None):
        self.folder = None
        self.pages = []
        self.steps = 0
        self.stop_after = stop_after

    def on_start(self, start):
        self.folder = start.folder

    def on_step(self, step):
        self.steps = step.step
        page = self.folder / "report.html"
        self.pages.append(page.read_text() if page.exists() else None)

    def should_stop(self):
        return self.stop_after is not None and self.steps >= self.stop_after


def test_fit_writes_report_page(settings, tmp_path):
    recorder = PageRecorder()
    result = deltaw.fit(settings(tmp_path / "run", train={"epochs": 2, "eval_every": 2}), callback=recorder)
    assert recorder.pages[:2] == [None, None], "no page before the first evaluation"
    assert recorder.pages[2] is not None and "This run is in progress: step 2 of 6" in recorder.pages[2]
    text = (result.output / "report.html").read_text()
    page = Page(text)
    assert page.faults == [] and "This run is in progress" not in text
    record = json.loads((result.output / "run.json").read_text())
    assert record["state"] == "finished" and record["result"] == result.as_dict()
    assert "paint it" in page.text and page.marked and "Norm of the change by layer" in page.words
    example = record["data"]["examples"][0]
    trained = "".join(piece["text"] for piece in example["pieces"] if piece["trained"])
    assert trained.startswith(("r", "b", "g", "w", "p", "t", "c")) and "<|im_end|>" in trained


def test_interrupted_and_failed_runs_have_page_with_state(settings, tmp_path):
    deltaw.fit(settings(tmp_path / "stopped", train={"epochs": 4}), callback=PageRecorder(stop_after=2))
    assert read_run(tmp_path / "stopped").state == "interrupted"
    assert "stopped after 2 steps of 12" in (tmp_path / "stopped" / "report.html").read_text()
    with pytest.raises(UserError, match="diverged"):
        deltaw.fit(settings(tmp_path / "failed", lora={"alpha": 1e20}, train={"epochs": 2}))
    assert read_run(tmp_path / "failed").state == "diverged"
    assert "training diverged" in (tmp_path / "failed" / "report.html").read_text()


def test_failing_page_is_reported_once_without_stopping_run(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(reports_run, "write_page", Mock(side_effect=ZeroDivisionError("of the page")))
    output = []
    result = deltaw.fit(settings(tmp_path / "run", train={"eval_every": 1}), callback=LineCallback(output.append))
    (line,) = [line for line in output if "report.html" in line]
    assert line == "report.html: not written (ZeroDivisionError: of the page)"
    assert (result.output / "adapter_model.safetensors").is_file()


def test_page_writing_takes_small_share_of_time(monkeypatch, tmp_path):
    now = [0.0]
    page_times = []

    def page(folder):
        page_times.append(now[0])
        now[0] += 5.0  # pages of long runs are slow

    monkeypatch.setattr(reports_run, "write_page", page)
    callback = reports_run.PageCallback(Callback(), clock=lambda: now[0])
    callback.on_start(type("Start", (), {"folder": tmp_path})())
    for number in range(20_000):
        now[0] += 0.1
        callback.on_step(None)
        if number % 7 == 0:
            callback.on_evaluation(number, None)
    page_seconds = 5.0 * len(page_times)
    assert len(page_times) >= 2 and page_seconds / now[0] < 0.02
    callback.close()
    assert page_times[-1] == pytest.approx(now[0] - 5.0)


@pytest.mark.parametrize("precision", ["int8", *(pytest.param(p, marks=pytest.mark.slow) for p in ("bf16", "fp32"))])
def test_later_evaluation_equals_evaluation_of_run(precision, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))  # no cached answers of other tests
    train = {"epochs": 4, "drift": True, "samples": 2, "tokens_per_pass": 64}
    changes = {"precision": precision, "data": {"eval": 4}, "lora": {"dropout": 0.2}}
    result = deltaw.fit(settings(tmp_path / "run", train=train, **changes))
    session = open_run(str(result.output), device="cpu", log=str)
    assert measure_run_drift(session) == result.drift
    score = session.score(load_eval_rows(session), ScoreOptions(num_answers=2))
    assert score.evaluation.metrics == result.evaluation.metrics
    assert score.evaluation.per_row.tolist() == result.evaluation.per_row.tolist()
    assert [answer.exact for answer in score.answers] == [bool(is_exact) for is_exact in result.evaluation.per_row[:2]]


def test_run_generates_answers_with_decoding_engine(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    decoded = Mock(wraps=opening.build_decodable)
    monkeypatch.setattr(opening, "build_decodable", decoded)
    monkeypatch.setattr("deltaw.decoding.generation._decoder", Mock(side_effect=AssertionError("transformers decodes")))
    train = {"max_steps": 2, "eval_every": 1, "samples": 1, "keep_general": 1.0}
    callback = Mock(spec=Callback, should_stop=lambda: False, should_finish=lambda: False, diagnose=lambda report: [])
    result = deltaw.fit(settings(tmp_path / "run", train=train), callback=callback)
    assert result.outcome.steps == 2 and callback.on_samples.call_count == 3
    assert decoded.call_count == 4  # general answers, the base model's samples, and two evaluations
