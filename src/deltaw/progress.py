"""Progress reports of long operations.

Code that takes seconds, such as a conversion, planning or a measurement, reports with :func:`track_progress`. A
program that displays progress registers a listener with :func:`use_listener`. Like Python's logging, this needs no
arguments in between, and has no effect without a listener. Lines for the record of a run use its callback instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Protocol

# Receives the completed amount, in the unit of the total.
Advance = Callable[[float], None]
# Receives a line for the user.
LogFunction = Callable[[str], None]


def ignore_line(line: str) -> None:
    """Discard a line. The default of functions that report lines."""


class Detail(str):
    """Line with technical details, displayed only with ``--verbose``."""


class Listener(Protocol):
    """Displays operations in progress. Operations may be nested. The innermost one finishes first."""

    def started(self, description: str, total: float | None) -> None:
        """Start an operation with a short description and its total, if known."""

    def advance(self, done: float) -> None:
        """Set the completed amount of the innermost operation."""

    def finished(self) -> None:
        """End the innermost operation, after success or failure."""


_listener: ContextVar[Listener | None] = ContextVar("deltaw_listener", default=None)


@contextlib.contextmanager
def track_progress(description: str, total: float | None = None) -> Iterator[Advance]:
    """Report an operation to the listener while the block runs.

    Args:
        description: Short description, for example "converting model.gguf".
        total: Total amount in any unit, or None if unknown.

    Yields:
        Function to call with the completed amount.
    """
    listener = _listener.get()
    if listener is None:
        yield _ignore
        return
    listener.started(description, total)
    try:
        yield listener.advance
    finally:
        listener.finished()


@contextlib.contextmanager
def use_listener(listener: Listener | None) -> Iterator[None]:
    """Report operations of this thread to ``listener`` within the block. None disables reports."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def set_listener(listener: Listener) -> None:
    """Report operations to ``listener`` until the end of the enclosing :func:`use_listener`."""
    _listener.set(listener)


def _ignore(done: float) -> None:
    """Discard progress if no listener is set."""
