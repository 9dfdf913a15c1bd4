"""Output of a run adapts to its environment: terminals, logs, CI and notebooks."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.text import Text

from deltaw.reports.progress import print_summary
from deltaw.reports.tables import NOTEBOOK_VARIABLE, TerminalOutput
from tests.reports.test_progress import (
    make_console,
    make_result,
    make_run_start,
    make_started_callback,
    make_step,
    output_lines,
)

CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


class Terminal(io.StringIO):
    """Fake pseudo-terminal for rich."""

    def isatty(self):
        return True


@pytest.fixture
def make_output(monkeypatch):
    """Return a function that creates an output for a terminal or file with these environment variables."""
    for name in ("CI", NOTEBOOK_VARIABLE, "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)

    def make(terminal, **variables):
        for name, value in {"TERM": "xterm-256color", "COLUMNS": "80", **variables}.items():
            monkeypatch.setenv(name, value)
        return TerminalOutput(file=Terminal() if terminal else io.StringIO())

    return make


def print_full_run(out):
    """Print a run from start to summary and return the text."""
    callback = make_started_callback(out)
    callback.on_begin(type("State", (), {"total_steps": 3, "step": 0})())
    for number in (1, 2, 3):
        callback.on_step(make_step(number))
    callback.on_end(None)
    print_summary(out, make_result(Path("runs/demo")))
    return out.file.getvalue()


def test_terminal_redraws_line(make_output):
    out = make_output(True)
    assert out.redraws and "\x1b[?25l" in print_full_run(out)


@pytest.mark.parametrize(
    ("terminal", "variables"),
    [(False, {}), (False, {"CI": "true"}), (True, {"TERM": "dumb"}), (True, {"TERM": "dumb", "CI": "1"})],
    ids=["a file", "the log of CI", "a plain terminal", "a plain terminal of CI"],
)
def test_other_outputs_get_plain_lines(make_output, terminal, variables):
    out = make_output(terminal, **variables)
    text = print_full_run(out)
    assert not out.redraws and not CONTROLS.search(text)
    assert "step 1/3" in text and "step 3/3" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("variables", [{"CI": "true"}, {NOTEBOOK_VARIABLE: "77"}], ids=["CI", "a notebook's cell"])
def test_ci_and_notebook_terminals_get_lines(make_output, variables):
    text = print_full_run(make_output(True, **variables))
    assert "step 1/3" in text and "step 3/3" in text
    assert not re.search(r"\r|\x1b\[[^m]*[A-Za-ln-z]", text)  # only colors


def test_disabled_ci_variable_is_ignored(make_output):
    assert make_output(True, CI="false").redraws and make_output(True, CI="").redraws


def test_forced_colors_do_not_enable_redrawing(make_output):
    out = make_output(False, FORCE_COLOR="1")
    out.print(Text("red", "red"))
    assert "\x1b[31mred" in out.file.getvalue() and not out.redraws
    assert "\x1b[?25l" not in print_full_run(out)


def test_no_color_is_respected(make_output):
    out = make_output(True, NO_COLOR="1")
    out.print(Text("red", "red"))
    assert out.file.getvalue() == "red\n"


def test_narrow_terminal_gets_short_lines(make_output):
    out = make_output(True, COLUMNS="40")
    assert out.width == 40
    text = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", print_full_run(out)).replace("\r", "\n")
    # Paths, commands and numbers with units are not truncated.
    long_lines = [line for line in text.splitlines() if len(line) > 40 and not line.startswith(("next: ", "report: "))]
    assert long_lines == []


def test_log_lines_drop_least_important_parts():
    out = make_console(terminal=False)
    callback = make_started_callback(out, make_run_start())
    callback.on_begin(type("State", (), {"total_steps": 1_250_000, "step": 0})())
    callback.on_step(make_step(1_250_000, loss=12345.678))
    (line,) = [line for line in output_lines(out) if line.startswith("step 1,250,000/")]
    assert len(line) <= 80 and "mean 12345.6780" in line and "left" in line
