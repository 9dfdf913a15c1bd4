"""What a person sees of long work: a spinner with the time on a terminal, a line now and then elsewhere.

Short work shows nothing. It listens to :mod:`deltaw.working`, and knows nothing of the work itself. The steps
of a run have a display of their own (:mod:`deltaw.reports.progress`).
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from rich.errors import LiveError
from rich.status import Status
from rich.text import Text

from deltaw.reports.tables import Output

# Seconds before long work is shown on a terminal, and between changes of its line.
PATIENCE, REDRAW = 0.6, 0.2


# Without a terminal: seconds of silence before the first line of a work, and between two lines of work or of steps.
FIRST_LINE, NEXT_LINE = 5.0, 15.0


@dataclass
class _Work:
    what: str
    total: float | None
    began: float = field(default_factory=time.monotonic)
    done: float = 0.0

    def shown(self) -> str:
        """The work, how far it is, and for how long it has been going on."""
        share = f" {100 * min(self.done / self.total, 1):.0f} %" if self.total else ""
        return f"{self.what}{share}  {time.monotonic() - self.began:.0f} s"


class WorkingDisplay:
    """Shows the innermost long work: one line with the time on a terminal, a line now and then elsewhere.

    It listens to :mod:`deltaw.working` and knows nothing of the work itself. A thread draws while there is any.

    Args:
        console: where to. Where another display is live on it already, that one stays alone.
    """

    def __init__(self, console: Output) -> None:
        self._console = console
        self._works: list[_Work] = []
        self._lock = threading.Lock()
        self._idle: threading.Event | None = None
        self._thread: threading.Thread | None = None

    def began(self, what: str, total: float | None) -> None:
        with self._lock:
            self._works.append(_Work(what, total))
            if len(self._works) > 1:
                return
            self._idle = threading.Event()
            draw = self._spin if self._console.redraws else self._lines
            self._thread = threading.Thread(target=draw, args=(self._idle,), name="deltaw-progress", daemon=True)
            self._thread.start()

    def advanced(self, done: float) -> None:
        with self._lock:
            if self._works:
                self._works[-1].done = done

    def ended(self) -> None:
        with self._lock:
            self._works.pop()
            if self._works:
                return
            idle, thread = self._idle, self._thread
        if idle is not None and thread is not None:
            idle.set()
            thread.join()

    def _shown(self) -> str | None:
        with self._lock:
            return self._works[-1].shown() if self._works else None

    def _spin(self, idle: threading.Event) -> None:
        if idle.wait(PATIENCE):
            return
        # As text, since a name of the user's may hold brackets.
        status = Status(Text(self._shown() or ""), console=self._console, refresh_per_second=1 / REDRAW)
        try:
            status.start()
        except LiveError:
            return
        try:
            while not idle.wait(REDRAW):
                shown = self._shown()
                if shown is not None:
                    status.update(Text(shown))
        finally:
            status.stop()

    def _lines(self, idle: threading.Event) -> None:
        silence = FIRST_LINE
        # Several works that are short, one after another, are a long silence too.
        while not idle.wait(max(min(1.0, silence), silence - (time.monotonic() - self._console.spoke))):
            if time.monotonic() - self._console.spoke < silence:
                continue
            shown = self._shown()
            if shown is not None:
                self._console.print(f"still {shown}")
            silence = NEXT_LINE
