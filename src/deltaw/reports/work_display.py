"""Show long-running work on a terminal: a spinner, or a line at intervals if the terminal cannot redraw lines.

Work is reported by :mod:`deltaw.progress`. Training steps have a separate display (:mod:`deltaw.reports.progress`).
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from rich.errors import LiveError
from rich.status import Status
from rich.text import Text

from deltaw.reports.tables import TerminalOutput

# Seconds before the spinner is shown on a terminal, and between its updates.
SPINNER_DELAY = 0.6
SPINNER_INTERVAL = 0.2


# Without redrawing: seconds without output before the first line, and between two lines of work or steps.
FIRST_LINE = 5.0
NEXT_LINE = 15.0


@dataclass
class _Work:
    message: str
    total: float | None
    started: float = field(default_factory=time.monotonic)
    done: float = 0.0

    def describe(self) -> str:
        """Return the message, the progress and the elapsed time."""
        percentage = f" {100 * min(self.done / self.total, 1):.0f} %" if self.total else ""
        return f"{self.message}{percentage}  {time.monotonic() - self.started:.0f} s"


class WorkingDisplay:
    """Listener that shows the innermost long-running work. A background thread updates the display.

    Args:
        console: Console to print to. Pipes and files get no output. If another live display is active on it, no spinner
            is shown.
    """

    def __init__(self, console: TerminalOutput) -> None:
        self._console = console
        self._works: list[_Work] = []
        self._lock = threading.Lock()
        self._idle: threading.Event | None = None
        self._thread: threading.Thread | None = None

    def started(self, message: str, total: float | None) -> None:
        with self._lock:
            self._works.append(_Work(message, total))
            if len(self._works) > 1 or not self._console.is_terminal:
                return
            self._idle = threading.Event()
            draw = self._spin if self._console.redraws else self._lines
            self._thread = threading.Thread(target=draw, args=(self._idle,), name="deltaw-progress", daemon=True)
            self._thread.start()

    def advance(self, done: float) -> None:
        with self._lock:
            if self._works:
                self._works[-1].done = done

    def finished(self) -> None:
        with self._lock:
            self._works.pop()
            if self._works:
                return
            idle = self._idle
            thread = self._thread
        if idle is not None and thread is not None:
            idle.set()
            thread.join()

    def _current_text(self) -> str | None:
        with self._lock:
            return self._works[-1].describe() if self._works else None

    def _spin(self, idle: threading.Event) -> None:
        if idle.wait(SPINNER_DELAY):
            return
        # As Text, because user text may contain brackets, which would be parsed as markup.
        label = Text(self._current_text() or "")
        status = Status(label, console=self._console, refresh_per_second=1 / SPINNER_INTERVAL)
        try:
            status.start()
        except LiveError:
            return
        try:
            while not idle.wait(SPINNER_INTERVAL):
                text = self._current_text()
                if text is not None:
                    status.update(Text(text))
        finally:
            status.stop()

    def _lines(self, idle: threading.Event) -> None:
        silence = FIRST_LINE
        # Consecutive short tasks can also add up to a long time without output.
        while not idle.wait(max(min(1.0, silence), silence - (time.monotonic() - self._console.spoke))):
            if time.monotonic() - self._console.spoke < silence:
                continue
            text = self._current_text()
            if text is not None:
                self._console.print(f"still {text}")
            silence = NEXT_LINE
