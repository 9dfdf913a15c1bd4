"""Queue of API requests: validates and tokenizes them, submits them to the engine, and follows their completions."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from deltaw.decoding.request import GenerationHandle, Request, TextChunk, TextEngine
from deltaw.serving.http.errors import ApiError
from deltaw.serving.http.settings import Limits

# Seconds after a request's time limit until the server stops waiting for the engine.
GRACE = 10.0


class RequestGroup:
    """The completions of one API request.

    The engine's thread adds chunks and the event loop reads them. Neither blocks the other.

    Args:
        count: Number of completions.
        on_finish: Called from any thread with the number of completions that have finished.
        seconds: Time limit.
    """

    def __init__(self, count: int, on_finish: Callable[[int], None], seconds: float) -> None:
        self._handles: list[GenerationHandle] = []
        self._num_unfinished = count
        self._on_finish = on_finish
        self._cancelled = self._timed_out = False
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._received: deque[tuple[int, TextChunk]] = deque()
        self._wakeup = asyncio.Event()
        self._seconds = seconds

    def submit(self, engine: TextEngine, requests: Sequence[Request]) -> None:
        """Submit the requests to the engine. Call it on a worker thread, because compiling a constraint takes time."""
        for index, request in enumerate(requests):
            handle = engine.submit(request, functools.partial(self._on_chunk, index))
            self._handles.append(handle)
            if self._cancelled:
                handle.cancel()

    async def chunks(self) -> AsyncIterator[tuple[int, TextChunk]]:
        """Yield the chunks of all completions with the index of their completion, until all have finished.

        Raises:
            Exception: if the engine failed.
            ApiError: 504 if the engine does not finish in time.
        """
        num_running = len(self._handles)
        timer = self._loop.call_later(self._seconds + GRACE, self._time_out)
        try:
            while num_running:
                await self._wakeup.wait()
                self._wakeup.clear()
                while self._received:
                    index, chunk = self._received.popleft()
                    if chunk.finish == "error":
                        self._handles[index].result()  # raises the engine's error
                    num_running -= chunk.finish is not None
                    yield index, chunk
                if self._timed_out:
                    raise ApiError(504, "the engine did not finish in time", code="timeout")
        finally:
            timer.cancel()
            self.cancel()

    def cancel(self) -> None:
        """Cancel all unfinished completions."""
        self._cancelled = True
        for handle in list(self._handles):
            handle.cancel()

    def abandon(self) -> None:
        """Cancel the group after the engine rejected one of its requests."""
        self.cancel()
        self._finish(self._num_unfinished)

    def _time_out(self) -> None:
        self._timed_out = True
        self.cancel()
        self._wakeup.set()

    def _on_chunk(self, index: int, chunk: TextChunk) -> None:
        """Receive a chunk. Called on the engine's thread."""
        self._received.append((index, chunk))
        # One wakeup is enough for all chunks until the event loop reads them.
        if not self._wakeup.is_set():
            # If the event loop is closed, no reader is waiting.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._wakeup.set)
        if chunk.finish is not None:
            self._finish(1)

    def _finish(self, count: int) -> None:
        with self._lock:
            count = min(count, self._num_unfinished)
            self._num_unfinished -= count
        self._on_finish(count)


class RequestQueue:
    """Admits requests up to a limit and submits them to the engine.

    Args:
        engine: Engine that generates the text.
        limits: Limits of the server.

    Attributes:
        pending: Number of completions that are being prepared, queued or running.
        closing: True if no new requests are accepted.
    """

    def __init__(self, engine: TextEngine, limits: Limits) -> None:
        self._engine = engine
        self._limits = limits
        self._lock = threading.Lock()
        self._groups: set[RequestGroup] = set()
        self.pending = 0
        self.closing = False
        self._tokenizer_pool = ThreadPoolExecutor(4, "deltaw-prepare")
        # One thread. With several threads, images could be removed before their prompt is complete.
        self._image_pool = ThreadPoolExecutor(1, "deltaw-images")
        # Each thread may wait for the compilation of a constraint.
        self._submitting = ThreadPoolExecutor(limits.queue, "deltaw-submit")
        self._submitted: set[asyncio.Future[None]] = set()

    def check_capacity(self, count: int) -> None:
        """Reject requests that would exceed the limit, before any work is done.

        Raises:
            ApiError: 429 if the queue is full, 503 during shutdown.
        """
        if self.closing:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
        if self.pending + count > self._limits.queue:
            message = f"too many requests: {self.pending} pending, limit {self._limits.queue}; retry later"
            raise ApiError(429, message, code="queue_full", retry_after=1)

    async def prepare(self, count: int, has_images: bool, build: Callable[[], list[Request]]) -> list[Request]:
        """Build ``count`` requests on another thread. They are pending until they are submitted and have finished.

        Raises:
            ApiError: 429 if the queue is full, 503 during shutdown.
            Exception: of ``build``. The requests are no longer pending then.
        """
        with self._lock:
            self.check_capacity(count)
            self.pending += count
        pool = self._image_pool if has_images else self._tokenizer_pool
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, build)
        except BaseException:
            self._release_slots(count)
            raise

    async def submit(self, requests: Sequence[Request]) -> RequestGroup:
        """Submit prepared requests to the engine.

        Raises:
            ApiError: 503 during shutdown.
            UserError: if the engine rejects a request. All of them are cancelled then.
        """
        group = RequestGroup(len(requests), self._release_slots, self._limits.seconds)
        if self.closing:
            group.abandon()
            self.check_capacity(0)
        submission = asyncio.get_running_loop().run_in_executor(self._submitting, group.submit, self._engine, requests)
        self._submitted.add(submission)
        try:
            await submission
        except BaseException:
            group.abandon()
            if self.closing:
                self.check_capacity(0)
            raise
        finally:
            self._submitted.discard(submission)
        self._groups.add(group)
        return group

    def release(self, group: RequestGroup) -> None:
        """Cancel the unfinished completions of a group, and forget it."""
        group.cancel()
        self._groups.discard(group)

    def reject_new(self) -> None:
        """Stop accepting requests, and cancel those that wait for constraints."""
        self.closing = True
        self._engine.cancel_slow()
        for submission in self._submitted:
            submission.cancel()

    def cancel_all(self) -> None:
        """Cancel all completions. Their requests receive an error."""
        for group in list(self._groups):
            group.cancel()

    def close(self) -> None:
        """Stop the threads. The engine must be closed already."""
        for pool in (self._tokenizer_pool, self._image_pool):
            pool.shutdown(wait=True, cancel_futures=True)
        self._submitting.shutdown(wait=True)

    def _release_slots(self, count: int) -> None:
        with self._lock:
            self.pending -= count
