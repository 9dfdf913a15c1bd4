"""The texts of requests, between an engine's threads and the event loop: taken in, followed, and let go.

Each text is followed by a thread that waits for its pieces; the event loop only looks at what came, and never
waits for the engine. Knows neither HTTP nor what the texts are about.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from deltaw.serving.http.errors import ApiError
from deltaw.serving.request import Piece, Request, TextEngine, Writing

# Seconds after a request's own time, in which the engine must have ended its texts.
GRACE = 10.0


class Texts:
    """The texts of one request, as they are written.

    Args:
        writings: of the engine. follow: runs a function in another thread. ended: told, from that thread,
            each time that a text has ended.
        seconds: after which they are given up.
    """

    def __init__(
        self,
        writings: Sequence[Writing],
        follow: Callable[[Callable[[], None]], object],
        ended: Callable[[], None],
        seconds: float,
    ) -> None:
        self._writings = writings
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._came: deque[tuple[int, Piece | Exception]] = deque()
        self._news = asyncio.Event()
        self._timer = self._loop.call_later(seconds + GRACE, self._give_up)
        for index, writing in enumerate(writings):
            follow(lambda index=index, writing=writing: self._follow(index, writing))  # type: ignore[misc]

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all texts as they come, each with its text's place; ends with the last text.

        Raises:
            Exception: what the engine failed with.
        """
        open_texts = len(self._writings)
        try:
            while open_texts:
                await self._news.wait()
                self._news.clear()
                while self._came:
                    index, piece = self._came.popleft()
                    if isinstance(piece, Exception):
                        raise piece
                    open_texts -= piece.finish is not None
                    yield index, piece
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Let go of what is not yet written."""
        self._timer.cancel()
        for writing in self._writings:
            writing.cancel()

    def _give_up(self) -> None:
        self.cancel()
        self._tell(0, ApiError(504, "the engine did not end the text in time", code="timeout"))

    def _follow(self, index: int, writing: Writing) -> None:
        """In a thread of its own."""
        finished = False
        try:
            for piece in writing:
                if piece.finish == "error":
                    writing.result()  # raises what the engine failed with
                finished = finished or piece.finish is not None
                self._tell(index, piece)
            if not finished:
                self._tell(index, Piece("", finish="error"))
        except Exception as error:
            self._tell(index, error)
        finally:
            self._ended()

    def _tell(self, index: int, piece: Piece | Exception) -> None:
        self._came.append((index, piece))
        # One call into the loop is enough for all that comes until it looks.
        if not self._news.is_set():
            # A loop that is closed has nobody left who waits.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._news.set)


class Desk:
    """Takes requests in, as many as there may be at once.

    Args:
        engine: that writes. most: texts in hand at once. seconds: for each.
    """

    def __init__(self, engine: TextEngine, *, most: int, seconds: float) -> None:
        self._engine = engine
        self._most = most
        self._seconds = seconds
        self._lock = threading.Lock()
        self._in_hand = 0
        self._open: set[Texts] = set()
        self.closing = False
        self._preparing = ThreadPoolExecutor(4, "deltaw-prepare")
        # A thread for each text in hand, which waits for its constraint, then for its pieces.
        self._following = ThreadPoolExecutor(most, "deltaw-follow")
        self._submitted: set[asyncio.Future[list[Writing]]] = set()

    @property
    def in_hand(self) -> int:
        """Texts that are waiting or being written."""
        return self._in_hand

    async def elsewhere(self, work: Callable[[], list[Request]]) -> list[Request]:
        """The requests that ``work`` makes, in another thread: rendering and tokenizing takes time."""
        return await asyncio.get_running_loop().run_in_executor(self._preparing, work)

    def check_room(self, count: int) -> None:
        """Refuse what would not be taken in, before work is spent on it.

        Raises:
            ApiError: 429 or 503.
        """
        if self.closing:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
        if self._in_hand + count > self._most:
            raise ApiError(
                429,
                f"{self._in_hand} texts are in hand, and {self._most} may be: ask again later",
                code="queue_full",
                retry_after=1,
            )

    async def write(self, requests: Sequence[Request]) -> Texts:
        """Let the engine write these texts.

        Raises:
            ApiError: 429 the queue is full; 503 the server is shutting down.
            UserError: the engine refuses a request; then none of them is written.
        """
        with self._lock:
            self.check_room(len(requests))
            self._in_hand += len(requests)
        submitted = asyncio.get_running_loop().run_in_executor(self._following, self._submit, requests)
        self._submitted.add(submitted)
        try:
            writings = await submitted
        except BaseException:
            self._release(len(requests))
            if self.closing:
                self.check_room(0)
            raise
        finally:
            self._submitted.discard(submitted)
        texts = Texts(writings, self._following.submit, self._release, self._seconds)
        self._open.add(texts)
        return texts

    def done(self, texts: Texts) -> None:
        """Nobody waits for these texts any more."""
        texts.cancel()
        self._open.discard(texts)

    def turn_away(self) -> None:
        """Take in no more, and let nobody wait for a constraint any longer."""
        self.closing = True
        self._engine.hurry()
        for submitted in self._submitted:
            submitted.cancel()

    def cancel_all(self) -> None:
        """Let go of all texts in hand; those who wait for them are told."""
        for texts in list(self._open):
            texts.cancel()

    def close(self) -> None:
        """End the threads; the engine must have been closed."""
        self._preparing.shutdown(wait=True, cancel_futures=True)
        self._following.shutdown(wait=True)

    def _submit(self, requests: Sequence[Request]) -> list[Writing]:
        writings: list[Writing] = []
        try:
            for request in requests:
                writings.append(self._engine.submit(request))
        except BaseException:
            for writing in writings:
                writing.cancel()
            raise
        return writings

    def _release(self, count: int = 1) -> None:
        with self._lock:
            self._in_hand -= count
