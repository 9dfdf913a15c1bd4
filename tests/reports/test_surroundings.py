"""A run shown where it is started: terminals that redraw a line or not, narrow ones, logs, CI, notebooks."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.text import Text

from deltaw.reports.progress import show_end
from deltaw.reports.tables import NOTEBOOK, Output
from tests.reports.test_progress import begun, console, lines_of, result, start, step

CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


class Terminal(io.StringIO):
    """What a pseudo-terminal is to rich."""

    def isatty(self):
        return True


@pytest.fixture
def surroundings(monkeypatch):
    """An output as it is made where these variables are set, and a file or a terminal."""
    for name in ("CI", NOTEBOOK, "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)

    def make(terminal, **variables):
        for name, value in {"TERM": "xterm-256color", "COLUMNS": "80", **variables}.items():
            monkeypatch.setenv(name, value)
        return Output(file=Terminal() if terminal else io.StringIO())

    return make


def whole_run(out):
    """A run from its first line to its last."""
    callback = begun(out)
    callback.on_begin(type("State", (), {"total_steps": 3, "step": 0})())
    for number in (1, 2, 3):
        callback.on_step(step(number))
    callback.on_end(None)
    show_end(out, result(Path("runs/demo")))
    return out.file.getvalue()


def test_a_terminal_redraws_one_line(surroundings):
    out = surroundings(True)
    assert out.redraws and "\x1b[?25l" in whole_run(out)


@pytest.mark.parametrize(
    ("terminal", "variables"),
    [(False, {}), (False, {"CI": "true"}), (True, {"TERM": "dumb"}), (True, {"TERM": "dumb", "CI": "1"})],
    ids=["a file", "the log of CI", "a plain terminal", "a plain terminal of CI"],
)
def test_elsewhere_a_run_prints_plain_lines_with_its_steps(surroundings, terminal, variables):
    out = surroundings(terminal, **variables)
    text = whole_run(out)
    assert not out.redraws and not CONTROLS.search(text)
    assert "step 1/3" in text and "step 3/3" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("variables", [{"CI": "true"}, {NOTEBOOK: "77"}], ids=["CI", "a notebook's cell"])
def test_a_terminal_that_keeps_every_state_gets_lines(surroundings, variables):
    text = whole_run(surroundings(True, **variables))
    assert "step 1/3" in text and "step 3/3" in text
    assert not re.search(r"\r|\x1b\[[^m]*[A-Za-ln-z]", text)  # colors are all that there is


def test_ci_that_is_off_changes_nothing(surroundings):
    assert surroundings(True, CI="false").redraws and surroundings(True, CI="").redraws


def test_colors_in_a_log_that_asks_for_them_bring_no_redrawing(surroundings):
    out = surroundings(False, FORCE_COLOR="1")
    out.print(Text("red", "red"))
    assert "\x1b[31mred" in out.file.getvalue() and not out.redraws
    assert "\x1b[?25l" not in whole_run(out)


def test_no_color_is_honored(surroundings):
    out = surroundings(True, NO_COLOR="1")
    out.print(Text("red", "red"))
    assert out.file.getvalue() == "red\n"


def test_a_narrow_terminal_gets_lines_of_its_width(surroundings):
    out = surroundings(True, COLUMNS="40")
    assert out.width == 40
    text = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", whole_run(out)).replace("\r", "\n")
    # A path, a command or a number with its unit is never cut.
    long = [line for line in text.splitlines() if len(line) > 40 and not line.startswith(("next: ", "report: "))]
    assert long == []


def test_the_lines_of_a_log_fit_and_lose_what_matters_least():
    out = console(terminal=False)
    callback = begun(out, start())
    callback.on_begin(type("State", (), {"total_steps": 1_250_000, "step": 0})())
    callback.on_step(step(1_250_000, loss=12345.678))
    (line,) = [line for line in lines_of(out) if line.startswith("step 1,250,000/")]
    assert len(line) <= 80 and "mean 12345.6780" in line and "left" in line
