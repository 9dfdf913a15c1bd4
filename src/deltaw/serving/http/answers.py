"""What chats and completions share in answering: collecting texts, streaming events, clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from deltaw.errors import UserError
from deltaw.serving.http.errors import ANSWERS, GONE, ApiError, as_json, refused
from deltaw.serving.http.preparing import Desk, Texts, adapter_named, chat_requests, check_choices, completion_requests
from deltaw.serving.http.requests import (
    FAILURE,
    ChatRequest,
    CompletionRequest,
    Record,
    described,
    read_json,
    record_of,
)
from deltaw.serving.http.served import Prompts, Served
from deltaw.serving.http.settings import ServerSettings
from deltaw.serving.http.tool_calls import FORCED, CallForm, CallScan
from deltaw.serving.request import FinishReason, Piece, TokenLogprob
from deltaw.serving.request import Request as TextRequest

# ---- Log-probabilities of tokens as the two APIs write them.


# What stands for a probability of zero, whose logarithm JSON cannot write.
LEAST = -9999.0
TokenBytes = Callable[[int], bytes]


def chat_logprobs(told: Sequence[TokenLogprob], token_bytes: TokenBytes) -> dict[str, object]:
    """As in an answer of ``/v1/chat/completions``."""

    def entry(token: int, logprob: float) -> dict[str, object]:
        raw = token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(raw)}

    content = []
    for one in told:
        top = [entry(token, logprob) for token, logprob in one.top]
        content.append({**entry(one.token, one.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(
    told: Sequence[TokenLogprob], token_bytes: TokenBytes, *, offset: int = 0, first: int | None = None
) -> dict[str, object]:
    """As in an answer of ``/v1/completions``.

    Args:
        offset: characters of the text before these tokens.
        first: a token before them that has no log-probability, since nothing precedes it.
    """
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []

    def place(token: int) -> str:
        nonlocal offset
        text = _name_of(token_bytes(token))
        tokens.append(text)
        offsets.append(offset)
        offset += len(token_bytes(token).decode("utf-8", "ignore"))
        return text

    if first is not None:
        place(first)
        values.append(None)
        tops.append(None)
    for one in told:
        text = place(one.token)
        values.append(_finite(one.logprob))
        likely = {_name_of(token_bytes(t)): _finite(value) for t, value in one.top}
        likely.setdefault(text, _finite(one.logprob))
        tops.append(likely if one.top else None)
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _name_of(raw: bytes) -> str:
    """A token's text; one that is a part of a character is named by its bytes, so that names differ."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(value: float) -> float:
    return max(float(value), LEAST) if value == value else LEAST


# ---- answers


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
        self, events: AsyncIterator[dict[str, object]], texts: Texts, desk: Desk, failed: Callable[[ApiError], None]
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


# ---- `/v1/completions`: plain prompts, continued whole or as a stream.


class _Completion:
    """One completion that is being answered."""

    def __init__(
        self, asked: CompletionRequest, requests: Sequence[TextRequest], prompts: Prompts, record: Record
    ) -> None:
        self.asked = asked
        self.record = record
        self._requests = requests
        self._prompts = prompts
        self._created = int(time.time())

    def head(self) -> dict[str, object]:
        """What begins each object of the answer."""
        return {
            "id": f"cmpl-{self.record.id}",
            "object": "text_completion",
            "created": self._created,
            "model": self.asked.model,
        }

    def whole(self) -> dict[str, object]:
        """The answer at once, without its choices."""
        return {**self.head(), "usage": self.record.usage()}

    def choice(self, index: int, choice: Choice) -> dict[str, object]:
        """A choice of the answer."""
        text = self._echoed(index) + choice.text
        told = self._logprobs(index, Piece("", choice.tokens, choice.logprobs), 0, first=True)
        return {"index": index, "text": text, "logprobs": told, "finish_reason": choice.finish}

    async def events(self, texts: Texts, counted: Counted) -> AsyncIterator[dict[str, object]]:
        """The answer in events."""
        said = [0] * len(self._requests)
        begun = [False] * len(self._requests)
        async for index, piece in texts.pieces():
            counted.count(index, piece)
            text = piece.text if begun[index] else self._echoed(index) + piece.text
            told = None
            if piece.logprobs:
                told = self._logprobs(index, piece, said[index], first=not begun[index])
            begun[index] = True
            said[index] += len(text)
            if text or told or piece.finish is not None:
                choice = {"index": index, "text": text, "logprobs": told, "finish_reason": piece.finish}
                event = {**self.head(), "choices": [choice]}
                yield {**event, "usage": None} if self.asked.with_usage else event
        if self.asked.with_usage:
            yield {**self.head(), "choices": [], "usage": self.record.usage()}

    def _echoed(self, index: int) -> str:
        """What stands before a text: its prompt, where that is to be repeated."""
        if not self.asked.echo:
            return ""
        prompt = self.asked.prompts[index // self.asked.choices]
        if isinstance(prompt, str):
            return prompt
        return b"".join(map(self._prompts.token_bytes, prompt)).decode("utf-8", "replace")

    def _logprobs(self, index: int, piece: Piece, offset: int, *, first: bool) -> dict[str, object] | None:
        if self.asked.logprobs is None:
            return None
        # With echo, log-probabilities of the prompt's tokens precede the text's; its first token has none.
        of_prompt = len(piece.logprobs) > len(piece.tokens) or self.asked.max_tokens == 0
        starts = self.asked.echo and first and of_prompt
        token = int(self._requests[index].tokens[0]) if starts else None
        return completion_logprobs(piece.logprobs, self._prompts.token_bytes, offset=offset, first=token)


def completions_router(served: Served, desk: Desk, settings: ServerSettings) -> APIRouter:
    """The route of completions."""
    router = APIRouter()
    limits = settings.limits

    @router.post(
        "/v1/completions",
        summary="Continue prompts",
        openapi_extra=described(CompletionRequest),
        responses=ANSWERS,
        response_class=Response,
    )
    async def completions(request: Request) -> Response:
        asked = await read_json(request, CompletionRequest, limits)
        record = record_of(request.scope)
        adapter = adapter_named(served, asked.model)
        record.model, record.stream = asked.model, bool(asked.stream)
        if settings.log_prompts:
            record.asked = asked.prompt
        count = asked.choices * len(asked.prompts)
        check_choices(count, limits)
        desk.check_room(count)
        requests = await desk.elsewhere(lambda: completion_requests(asked, adapter, served, limits, record.owner))
        record.prompt_tokens = sum(len(r.tokens) for r in requests[:: asked.choices])
        answer = _Completion(asked, requests, served.prompts(adapter), record)
        counted = Counted(record, desk, asked.choices)
        texts = await desk.write(requests)
        stream = bool(asked.stream)
        return await answered(request, answer, texts, len(requests), counted, desk, stream=stream)

    return router


# ---- `/v1/chat/completions`: conversations, answered whole or as a stream, with calls of tools.


class _Chat:
    """One chat that is being answered."""

    def __init__(self, asked: ChatRequest, prompts: Prompts, record: Record) -> None:
        self.asked = asked
        self.record = record
        self._prompts = prompts
        self._created = int(time.time())
        self._names = [tool.function.name for tool in asked.offered]
        self._form: CallForm | None = None
        if asked.forced:
            self._form = FORCED
        elif self._names:
            self._form = prompts.call_form

    def head(self, kind: str) -> dict[str, object]:
        """What begins each object of the answer."""
        return {
            "id": f"chatcmpl-{self.record.id}",
            "object": kind,
            "created": self._created,
            "model": self.asked.model,
            "system_fingerprint": None,
        }

    def whole(self) -> dict[str, object]:
        """The answer at once, without its choices."""
        return {**self.head("chat.completion"), "usage": self.record.usage()}

    async def events(self, texts: Texts, counted: Counted) -> AsyncIterator[dict[str, object]]:
        """The answer in events."""
        scans = [self._scan() for _ in range(self.asked.choices)]
        called = [0] * self.asked.choices
        for index in range(self.asked.choices):
            yield self._event(index, {"role": "assistant", "content": ""})
        async for index, piece in texts.pieces():
            counted.count(index, piece)
            scan = scans[index]
            text = piece.text if scan is None else scan.feed(piece.text, piece.tokens)
            calls: list[dict[str, object]] = []
            if piece.finish is not None and scan is not None:
                rest, found = scan.end()
                text += rest
                calls = [call.as_dict() for call in found[: self._most_calls]]
                called[index] = len(calls)
            logprobs = None
            if piece.logprobs:
                logprobs = chat_logprobs(piece.logprobs, self._prompts.token_bytes)
            if text or logprobs:
                yield self._event(index, {"content": text}, logprobs=logprobs)
            for number, call in enumerate(calls):
                yield self._event(index, {"tool_calls": [{"index": number, **call}]})
            if piece.finish is not None:
                yield self._event(index, {}, finish="tool_calls" if called[index] else piece.finish)
        if self.asked.with_usage:
            yield {**self.head("chat.completion.chunk"), "choices": [], "usage": self.record.usage()}

    @property
    def _most_calls(self) -> int | None:
        return 1 if self.asked.parallel_tool_calls is False else None

    def _scan(self) -> CallScan | None:
        return None if self._form is None else CallScan(self._form, self._names)

    def _event(
        self, index: int, delta: dict[str, object], *, finish: str | None = None, logprobs: object = None
    ) -> dict[str, object]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        event = {**self.head("chat.completion.chunk"), "choices": [choice]}
        return {**event, "usage": None} if self.asked.with_usage else event

    def choice(self, index: int, choice: Choice) -> dict[str, object]:
        """A choice of the answer."""
        text: str | None = choice.text
        finish: str | None = choice.finish
        message: dict[str, object] = {"role": "assistant", "content": text, "refusal": None}
        if (scan := self._scan()) is not None:
            said = "".join(scan.feed(piece.text, piece.tokens) for piece in choice.pieces)
            rest, calls = scan.end()
            if calls:
                finish = "tool_calls"
                message["content"] = (said + rest).strip() or None
                message["tool_calls"] = [call.as_dict() for call in calls[: self._most_calls]]
        logprobs = None
        if self.asked.logprobs:
            logprobs = chat_logprobs(choice.logprobs, self._prompts.token_bytes)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}


def chat_router(served: Served, desk: Desk, settings: ServerSettings) -> APIRouter:
    """The route of chats."""
    router = APIRouter()
    limits = settings.limits

    @router.post(
        "/v1/chat/completions",
        summary="Answer a conversation",
        openapi_extra=described(ChatRequest),
        responses=ANSWERS,
        response_class=Response,
    )
    async def chat(request: Request) -> Response:
        asked = await read_json(request, ChatRequest, limits)
        record = record_of(request.scope)
        adapter = adapter_named(served, asked.model)
        record.model, record.stream = asked.model, bool(asked.stream)
        if settings.log_prompts:
            record.asked = [message.as_turn() for message in asked.messages]
        check_choices(asked.choices, limits)
        desk.check_room(asked.choices)
        requests = await desk.elsewhere(lambda: chat_requests(asked, adapter, served, limits, record.owner))
        record.prompt_tokens = len(requests[0].tokens)
        answer = _Chat(asked, served.prompts(adapter), record)
        counted = Counted(record, desk, asked.choices)
        texts = await desk.write(requests)
        stream = bool(asked.stream)
        return await answered(request, answer, texts, len(requests), counted, desk, stream=stream)

    return router
