"""Logs as lines of JSON: one for each request, and one for each thing that goes wrong.

Lines are written by a thread of their own; where their reader does not keep up, they are dropped and counted,
rather than to wait for him. Prompts are left out unless asked for; keys never appear.
"""

from __future__ import annotations

import datetime
import json
import logging
import logging.handlers
import queue
from typing import TextIO

LOGGER = logging.getLogger("deltaw.serve")
# Lines that wait for the writer.
MOST_WAITING = 10_000
# Of uvicorn, told in the same way.
_OTHERS = ("uvicorn", "uvicorn.error")


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        line: dict[str, object] = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
        }
        fields = getattr(record, "fields", None)
        line |= fields if isinstance(fields, dict) else {"event": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


class _Dropping(logging.handlers.QueueHandler):
    """Puts lines into a queue while there is room."""

    dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1


class RequestLog:
    """Writes the log of a server to a stream while it is open.

    Args:
        stream: such as standard error; None for no lines at all.
    """

    def __init__(self, stream: TextIO | None) -> None:
        waiting: queue.Queue[logging.LogRecord] = queue.Queue(MOST_WAITING)
        self._handler: logging.Handler = logging.NullHandler() if stream is None else _Dropping(waiting)
        self._listener: logging.handlers.QueueListener | None = None
        if stream is not None:
            shown = logging.StreamHandler(stream)
            shown.setFormatter(_Lines())
            self._listener = logging.handlers.QueueListener(waiting, shown)
        self._before: list[tuple[logging.Logger, int, bool]] = []

    def __enter__(self) -> RequestLog:
        levels = {LOGGER.name: logging.INFO} | dict.fromkeys(_OTHERS, logging.WARNING)
        for name, level in levels.items():
            logger = logging.getLogger(name)
            self._before.append((logger, logger.level, logger.propagate))
            logger.setLevel(level)
            # Children of uvicorn's logger pass their lines up to it.
            logger.propagate = name == "uvicorn.error"
            if name != "uvicorn.error":
                logger.addHandler(self._handler)
        if self._listener is not None:
            self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        for logger, level, propagate in self._before:
            logger.removeHandler(self._handler)
            logger.setLevel(level)
            logger.propagate = propagate
        if self._listener is not None:
            self._listener.stop()

    @property
    def dropped(self) -> int:
        """Lines that were not written."""
        return getattr(self._handler, "dropped", 0)
