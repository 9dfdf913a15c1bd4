"""A text that is being written, as its reader sees it: pieces in a queue, and the whole at the end.

Knows values alone; an engine of any kind fills it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import numpy as np

from deltaw.serving.request import FinishReason, Piece, TokenLogprob, Written


class QueuedWriting:
    """Implements :class:`deltaw.serving.request.Writing`.

    Args:
        woken: called when the reader cancels, so that an engine that sleeps looks.

    Attributes:
        cancelled: whether the reader has cancelled.
    """

    def __init__(self, woken: Callable[[], None] = lambda: None) -> None:
        self.cancelled = False
        self._woken = woken
        self._pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._finish: FinishReason = "error"
        self._terminator: int | None = None
        self._exhausted = False

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._done.is_set()

    def put(self, piece: Piece, terminator: int | None = None) -> None:
        """Add a piece; one with a finish reason is the last."""
        self._text.append(piece.text)
        self._tokens.extend(piece.tokens)
        self._logprobs.extend(piece.logprobs)
        self._pieces.put(piece)
        if piece.finish is not None:
            self._finish, self._terminator = piece.finish, terminator
            self._pieces.put(None)
            self._done.set()

    def fail(self, error: BaseException) -> None:
        """End it with an error, which :meth:`result` raises."""
        self._error = error
        self.put(Piece("", finish="error"))

    def __iter__(self) -> Iterator[Piece]:
        while not self._exhausted:
            piece = self._pieces.get()
            if piece is None:
                self._exhausted = True
                return
            yield piece

    def cancel(self) -> None:
        """End it; the last piece then says "cancelled"."""
        if not self.done:
            self.cancelled = True
            self._woken()

    def result(self) -> Written:
        """Wait for the end.

        Raises:
            Exception: what the engine failed with.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error
        return Written(
            "".join(self._text),
            np.asarray(self._tokens, dtype=np.int64),
            self._finish,
            tuple(self._logprobs),
            self._terminator,
        )
