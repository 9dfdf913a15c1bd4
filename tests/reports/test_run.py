"""Runs from Python leave their page, also where they end early; a page that fails does not end a run."""

from __future__ import annotations

import json
from unittest.mock import Mock

import pytest

import deltaw
from deltaw.errors import UserError
from deltaw.reports import run as reports_run
from deltaw.runs.folder import read_run
from deltaw.serving import opening
from deltaw.training.callbacks import Callback, Lines
from deltaw.training.drift import drift_of
from deltaw.training.origin import open_run, score_run
from tests.reports.html_pages import Page
from tests.training.runs import held_out_rows


class Looks(Callback):
    """Notes what the page says when the run is evaluated, and stops the run after some steps."""

    def __init__(self, stop_after=None):
        self.folder, self.seen, self.steps, self.stop_after = None, [], 0, stop_after

    def on_start(self, start):
        self.folder = start.folder

    def on_step(self, step):
        self.steps = step.step
        page = self.folder / "report.html"
        self.seen.append(page.read_text() if page.exists() else None)

    def should_stop(self):
        return self.stop_after is not None and self.steps >= self.stop_after


def test_a_run_from_python_leaves_its_page(settings, tmp_path):
    looks = Looks()
    result = deltaw.fit(settings(tmp_path / "run", train={"epochs": 2, "eval_every": 2}), callback=looks)
    assert looks.seen[:2] == [None, None], "no page before the first evaluation"
    assert looks.seen[2] is not None and "This run goes on: step 2 of 6" in looks.seen[2]
    text = (result.output / "report.html").read_text()
    page = Page(text)
    assert page.faults == [] and "This run goes on" not in text
    told = json.loads((result.output / "run.json").read_text())
    assert told["state"] == "finished" and told["result"] == result.as_dict()
    assert "paint it" in page.text and page.marked and "Where it learned" in page.words
    example = told["data"]["examples"][0]
    trained = "".join(piece["text"] for piece in example["pieces"] if piece["trained"])
    assert trained.startswith(("r", "b", "g", "w", "p", "t", "c")) and "<|im_end|>" in trained


def test_an_interrupted_and_a_failed_run_leave_a_page_that_says_so(settings, tmp_path):
    deltaw.fit(settings(tmp_path / "stopped", train={"epochs": 4}), callback=Looks(stop_after=2))
    assert read_run(tmp_path / "stopped").state == "interrupted"
    assert "ended after 2 steps of 12" in (tmp_path / "stopped" / "report.html").read_text()
    with pytest.raises(UserError, match="diverged"):
        deltaw.fit(settings(tmp_path / "failed", lora={"alpha": 1e20}, train={"epochs": 2}))
    assert read_run(tmp_path / "failed").state == "diverged"
    assert "training diverged" in (tmp_path / "failed" / "report.html").read_text()


def test_a_page_that_cannot_be_written_is_told_once_and_the_run_goes_on(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(reports_run, "write_page", Mock(side_effect=ZeroDivisionError("of the page")))
    said = []
    result = deltaw.fit(settings(tmp_path / "run", train={"eval_every": 1}), callback=Lines(said.append))
    (line,) = [line for line in said if "report.html" in line]
    assert line == "report.html: not written (ZeroDivisionError: of the page)"
    assert (result.output / "adapter_model.safetensors").is_file()


def test_pages_are_written_at_intervals_and_cost_a_small_share_of_the_time(monkeypatch, tmp_path):
    now, written = [0.0], []

    def page(folder):
        written.append(now[0])
        now[0] += 5.0  # a page of a long run takes a while

    monkeypatch.setattr(reports_run, "write_page", page)
    callback = reports_run.PageCallback(Callback(), clock=lambda: now[0])
    callback.on_start(type("Start", (), {"folder": tmp_path})())
    for number in range(20_000):
        now[0] += 0.1
        callback.on_step(None)
        if number % 7 == 0:
            callback.on_evaluation(number, None)
    took = 5.0 * len(written)
    assert len(written) >= 2 and took / now[0] < 0.02
    callback.close()
    assert written[-1] == pytest.approx(now[0] - 5.0)


@pytest.mark.parametrize("precision", ["int8", "bf16", "fp32"])
def test_a_run_and_its_evaluation_later_give_the_same_numbers(precision, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))  # nobody else's answers
    train = {"epochs": 4, "drift": True, "samples": 2, "tokens_per_pass": 64}
    changes = {"precision": precision, "data": {"eval": 4}, "lora": {"dropout": 0.2}}
    result = deltaw.fit(settings(tmp_path / "run", train=train, **changes))
    opened = open_run(str(result.output), device="cpu", say=str)
    assert drift_of(opened) == result.drift
    found = score_run(opened, held_out_rows(opened), shown=2)
    assert found.evaluation.metrics == result.evaluation.metrics
    assert found.evaluation.per_row.tolist() == result.evaluation.per_row.tolist()
    assert [answer.exact for answer in found.answers] == [bool(one) for one in result.evaluation.per_row[:2]]


def test_a_run_lets_the_engine_write_the_answers_of_base_model_and_adapter(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    decoded = Mock(wraps=opening.decodable)
    monkeypatch.setattr(opening, "decodable", decoded)
    monkeypatch.setattr("deltaw.runtime.generation._decoder", Mock(side_effect=AssertionError("transformers decodes")))
    train = {"max_steps": 2, "eval_every": 1, "samples": 1, "keep_general": 1.0}
    told = Mock(spec=Callback, should_stop=lambda: False, ended=lambda: False, diagnose=lambda found: [])
    result = deltaw.fit(settings(tmp_path / "run", train=train), callback=told)
    assert result.outcome.steps == 2 and told.on_samples.call_count == 3
    assert decoded.call_count == 4  # general answers, the base model's samples, and two evaluations
