"""Long operations show a spinner on a terminal, or lines if it cannot redraw. Short operations show no output."""

from __future__ import annotations

import io
import time

import pytest
from rich.progress import Progress

from deltaw.progress import track_progress, use_listener
from deltaw.reports import work_display as module
from deltaw.reports.tables import TerminalOutput
from deltaw.reports.work_display import WorkingDisplay


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SPINNER_DELAY", "SPINNER_INTERVAL", "FIRST_LINE", "NEXT_LINE"):
        monkeypatch.setattr(module, name, 0.01)


def make_console(redraws: bool) -> tuple[TerminalOutput, io.StringIO]:
    """Return a console on a terminal."""
    file = io.StringIO()
    console = TerminalOutput(file=file, force_terminal=True, color_system=None, width=80)
    console.redraws = redraws
    return console, file


def wait_for_text(file: io.StringIO, text: str) -> None:
    """Wait up to 20 seconds for a text in the output."""
    deadline = time.monotonic() + 20
    while text not in file.getvalue():
        assert time.monotonic() < deadline, file.getvalue()
        time.sleep(0.01)


@pytest.mark.parametrize("redraws", [True, False])
def test_progress_is_shown_with_percentage(redraws: bool) -> None:
    console, file = make_console(redraws)
    with use_listener(WorkingDisplay(console)), track_progress("converting [big] model.gguf", 8) as advance:
        advance(2)
        wait_for_text(file, "converting [big] model.gguf 25 %")
    output = file.getvalue()
    assert ("\x1b" in output) == redraws
    time.sleep(0.05)
    assert file.getvalue() == output  # the display has stopped


def test_pipes_and_files_get_no_progress_lines() -> None:
    file = io.StringIO()
    console = TerminalOutput(file=file, width=80)
    with use_listener(WorkingDisplay(console)), track_progress("computing step 9 of 60"):
        time.sleep(0.1)
    assert file.getvalue() == ""


def test_innermost_work_is_shown_first() -> None:
    console, file = make_console(False)
    with use_listener(WorkingDisplay(console)), track_progress("planning"):
        with track_progress("reading"):
            wait_for_text(file, "still reading")
        wait_for_text(file, "still planning")


def test_short_work_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPINNER_DELAY", 60.0)
    monkeypatch.setattr(module, "FIRST_LINE", 60.0)
    for redraws in (True, False):
        console, file = make_console(redraws)
        with use_listener(WorkingDisplay(console)), track_progress("planning"):
            console.print("a line")
        assert file.getvalue() == "a line\n"


def test_consecutive_short_works_are_shown_like_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_LINE", 60.0)
    console, file = make_console(False)
    with use_listener(WorkingDisplay(console)):
        with track_progress("planning"):
            assert file.getvalue() == ""
        console.spoke -= 60.0
        with track_progress("loading"):
            wait_for_text(file, "still loading")
    assert "planning" not in file.getvalue()


def test_other_progress_bar_continues() -> None:
    console, file = make_console(True)
    with use_listener(WorkingDisplay(console)), Progress(console=console) as bar:
        task = bar.add_task("training", total=2)
        with track_progress("evaluating"):
            time.sleep(0.1)
            bar.update(task, completed=2)
    assert "training" in file.getvalue()
