"""Long work reports what it is doing to a listener.

Converting a file, planning or measuring takes seconds in the middle of other code. It announces itself with
:func:`working`; a program that shows progress listens (:func:`listening`). As with Python's logging, the code
in between passes nothing along, and without a listener nothing happens. Lines that belong to the record of a run
go to its callback instead.

Knows no terminal and imports nothing from deltaw.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Protocol

# Takes how much of the work is done, in the unit of its total.
Advance = Callable[[float], None]


class Detail(str):
    """A line on how something is computed, for whoever asks for more (``--verbose``). Other lines are what a user
    decides on, or has to know."""


class Listener(Protocol):
    """Shows work in progress. Work may be nested; the innermost ends first."""

    def began(self, what: str, total: float | None) -> None:
        """Work begins: what it is, in a few words, and its total, if known."""

    def advanced(self, done: float) -> None:
        """This much of the innermost work is done in total."""

    def ended(self) -> None:
        """The innermost work has ended, normally or not."""


_listener: ContextVar[Listener | None] = ContextVar("deltaw_listener", default=None)


@contextlib.contextmanager
def working(what: str, total: float | None = None) -> Iterator[Advance]:
    """Announce ``what`` while the block runs; call the yielded function with how much of ``total`` is done.

    Args:
        what: in a few words, such as "converting model.gguf".
        total: how much there is, in any unit; None if unknown.
    """
    listener = _listener.get()
    if listener is None:
        yield _ignore
        return
    listener.began(what, total)
    try:
        yield listener.advanced
    finally:
        listener.ended()


@contextlib.contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Within the block, and only in this thread, work is reported to ``listener``; None: to nobody."""
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


def listen(listener: Listener) -> None:
    """Report work to ``listener`` from now on, until the end of the innermost :func:`listening`."""
    _listener.set(listener)


def _ignore(done: float) -> None:
    """There is no listener."""
