"""What chats and completions share in answering: collecting texts, streaming events, clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from deltaw.errors import UserError
from deltaw.serving.http.errors import GONE, ApiError, as_json, refused
from deltaw.serving.http.record import FAILURE, Record, record_of
from deltaw.serving.http.texts import Desk, Texts
from deltaw.serving.request import FinishReason, Piece, TokenLogprob

# Tokens with log-probabilities whose writing would keep the event loop from other requests.
MANY_LOGPROBS = 200
DONE = b"data: [DONE]\n\n"


@dataclass
class Choice:
    """A text so far: its pieces."""

    pieces: list[Piece] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Its tokens."""
        return tuple(token for piece in self.pieces for token in piece.tokens)

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """The log-probabilities that came with it."""
        return tuple(one for piece in self.pieces for one in piece.logprobs)

    @property
    def finish(self) -> FinishReason | None:
        """Why it ended."""
        return self.pieces[-1].finish if self.pieces else None


class Counted:
    """Counts what comes into a request's record.

    Args:
        each: choices of one prompt, of which the first counts for what was reused of it.
    """

    def __init__(self, record: Record, desk: Desk, each: int) -> None:
        self._record = record
        self._desk = desk
        self._each = each

    def count(self, index: int, piece: Piece) -> None:
        """Count a piece of the text at this place.

        Raises:
            ApiError: the text ended before its end.
        """
        if piece.tokens:
            self._record.token()
            self._record.completion_tokens += len(piece.tokens)
        if piece.reused and index % self._each == 0:
            self._record.cached_tokens += piece.reused
        if piece.finish is None:
            return
        self._record.finishes.append(piece.finish)
        if piece.finish == "timeout":
            raise ApiError(504, "the text was not finished in time", code="timeout")
        if piece.finish == "cancelled":
            if self._record.gone:
                raise ApiError(GONE, "the client went away", code="cancelled")
            raise ApiError(503, "the text was cancelled: the server is shutting down", code="shutting_down")
        if piece.finish == "error":
            raise ApiError(500, "the engine failed", code="engine_failed")


async def collected(request: Request, texts: Texts, count: int, counted: Counted, desk: Desk) -> list[Choice]:
    """All of the texts, once they are written.

    Raises:
        ApiError: one of them was not written to its end.
    """
    choices = [Choice() for _ in range(count)]
    try:
        async with _watching(request.receive, request.scope, texts):
            async for index, piece in texts.pieces():
                choices[index].pieces.append(piece)
                counted.count(index, piece)
    finally:
        desk.done(texts)
    return choices


class Answer(Protocol):
    """What a route makes of texts."""

    def events(self, texts: Texts, counted: Counted) -> AsyncIterator[dict[str, object]]:
        """The events of a stream, as its texts are written."""

    def whole(self) -> dict[str, object]:
        """The answer once all texts have ended, without its choices."""

    def choice(self, index: int, choice: Choice) -> dict[str, object]:
        """One of its choices."""


async def whole_response(answer: Answer, choices: Sequence[Choice]) -> Response:
    """The response with an answer; made in another thread where that takes its time."""

    def made() -> Response:
        # One after another, since each may have megabytes of log-probabilities, and Python's lock is held
        # while one is written.
        written = [as_json(answer.choice(index, choice)) for index, choice in enumerate(choices)]
        text = as_json(answer.whole())[:-1] + b',"choices":[' + b",".join(written) + b"]}"
        return Response(text, media_type="application/json")

    if sum(len(piece.logprobs) for choice in choices for piece in choice.pieces) < MANY_LOGPROBS:
        return made()
    return await asyncio.get_running_loop().run_in_executor(None, made)


async def answered(
    request: Request, answer: Answer, texts: Texts, count: int, counted: Counted, desk: Desk, *, stream: bool
) -> Response:
    """The response to a request for ``count`` texts, as events while they are written or whole."""
    if stream:
        record = record_of(request.scope)

        def failed(error: ApiError) -> None:
            record.error = error.message

        return EventStream(answer.events(texts, counted), texts, desk, failed)
    choices = await collected(request, texts, count, counted, desk)
    return await whole_response(answer, choices)


class EventStream(Response):
    """Server-sent events while texts are written; a failure becomes the last event.

    Args:
        events: each a JSON object. texts: that they are made of, let go when the client has gone.
        failed: told what the stream ended with instead of its end.
    """

    def __init__(
        self,
        events: AsyncIterator[dict[str, object]],
        texts: Texts,
        desk: Desk,
        failed: Callable[[ApiError], None],
    ) -> None:
        super().__init__(None, 200, media_type="text/event-stream")
        self._events = events
        self._texts = texts
        self._desk = desk
        self._failed = failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as an ASGI application."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async with _watching(receive, scope, self._texts):
                try:
                    async for event in self._events:
                        await send({"type": "http.response.body", "body": as_event(event), "more_body": True})
                    last = DONE
                except ApiError as error:
                    last = self._end(error)
                except UserError as error:
                    last = self._end(refused(error))
                except Exception as error:
                    last = self._end(ApiError(500, f"the engine failed ({type(error).__name__})"))
                    scope[FAILURE] = error
            # From here on the client is not watched: a server reports the end of an answer like a client that
            # has gone.
            await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            self._desk.done(self._texts)

    def _end(self, error: ApiError) -> bytes:
        self._failed(error)
        return as_event(error.body)


def as_event(value: dict[str, object]) -> bytes:
    """A JSON object as one event of a stream."""
    return b"data: " + as_json(value) + b"\n\n"


@contextlib.asynccontextmanager
async def _watching(receive: Receive, scope: Scope, texts: Texts) -> AsyncIterator[None]:
    """While open, texts are let go as soon as the client is gone."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        record_of(scope).gone = True
        texts.cancel()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
