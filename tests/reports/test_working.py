"""Long work on a console: a spinner on a terminal, lines elsewhere, nothing for short work."""

from __future__ import annotations

import io
import time

import pytest
from rich.progress import Progress

from deltaw.reports import working as module
from deltaw.reports.tables import Output
from deltaw.reports.working import WorkingDisplay
from deltaw.working import listening, working


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PATIENCE", "REDRAW", "FIRST_LINE", "NEXT_LINE"):
        monkeypatch.setattr(module, name, 0.01)


def shown(terminal: bool) -> tuple[Output, io.StringIO]:
    file = io.StringIO()
    return Output(file=file, force_terminal=terminal, width=80), file


def until(file: io.StringIO, text: str) -> None:
    """Wait until something is there; a test that waits in vain fails."""
    ends = time.monotonic() + 20
    while text not in file.getvalue():
        assert time.monotonic() < ends, file.getvalue()
        time.sleep(0.01)


@pytest.mark.parametrize("terminal", [True, False])
def test_work_is_shown_with_its_share(terminal: bool) -> None:
    console, file = shown(terminal)
    with listening(WorkingDisplay(console)), working("converting [big] model.gguf", 8) as advance:
        advance(2)
        until(file, "converting [big] model.gguf 25 %")
    written = file.getvalue()
    assert ("\x1b" in written) == terminal
    time.sleep(0.05)
    assert file.getvalue() == written  # it has ended


def test_the_innermost_work_is_shown_and_then_the_outer_one_again() -> None:
    console, file = shown(False)
    with listening(WorkingDisplay(console)), working("planning"):
        with working("reading"):
            until(file, "still reading")
        until(file, "still planning")


def test_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 60.0)
    monkeypatch.setattr(module, "FIRST_LINE", 60.0)
    for terminal in (True, False):
        console, file = shown(terminal)
        with listening(WorkingDisplay(console)), working("planning"):
            console.print("a line")
        assert file.getvalue() == "a line\n"


def test_several_short_works_in_silence_are_shown_as_a_long_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_LINE", 60.0)
    console, file = shown(False)
    with listening(WorkingDisplay(console)):
        with working("planning"):
            assert file.getvalue() == ""
        console.spoke -= 60.0
        with working("loading"):
            until(file, "still loading")
    assert "planning" not in file.getvalue()


def test_a_bar_of_another_display_goes_on() -> None:
    console, file = shown(True)
    with listening(WorkingDisplay(console)), Progress(console=console) as bar:
        task = bar.add_task("training", total=2)
        with working("evaluating"):
            time.sleep(0.1)
            bar.update(task, completed=2)
    assert "training" in file.getvalue()
