"""Answers to chats and completions, whole or as a stream of events: one road, and a rendering for each API.

Knows the texts of a request and the two forms of an answer; not how texts are written.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from deltaw.errors import UserError
from deltaw.serving.http.errors import ANSWERS, GONE, ApiError, as_json, no_model, refused
from deltaw.serving.http.preparing import Desk, Texts, text_requests
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
from deltaw.serving.http.tool_calls import FORCED, CallScan
from deltaw.serving.request import Piece, TokenLogprob
from deltaw.serving.request import Request as TextRequest

# What stands for a probability of zero, whose logarithm JSON cannot write.
LEAST = -9999.0
TokenBytes = Callable[[int], bytes]
Asked = TypeVar("Asked", ChatRequest, CompletionRequest)


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


# Tokens with log-probabilities whose writing would keep the event loop from other requests.
MANY_LOGPROBS = 200
DONE = b"data: [DONE]\n\n"
Object = dict[str, object]
_ENDS = {
    "timeout": (504, "the text was not finished in time", "timeout"),
    "cancelled": (503, "the text was cancelled: the server is shutting down", "shutting_down"),
    "error": (500, "the engine failed", "engine_failed"),
}


class Answer(Generic[Asked]):
    """One request that is being answered; the two APIs render its texts in their own ways.

    Args:
        asked: its fields. requests: the texts that the engine writes for it. prompts: of its adapter.

    Attributes:
        prefix: of its id. whole, part: the kinds of objects that an answer and an event are.
    """

    prefix: ClassVar[str]
    whole: ClassVar[str]
    part: ClassVar[str]

    def __init__(self, asked: Asked, requests: Sequence[TextRequest], prompts: Prompts, record: Record) -> None:
        self.asked: Asked = asked
        self.requests, self.prompts, self.record = requests, prompts, record
        self.created = int(time.time())

    def opening(self) -> Iterable[Object]:
        """Choices of events that come before all texts."""
        return ()

    def parts(self, index: int, piece: Piece) -> Iterator[Object]:
        """Choices of the events that a piece of a text makes."""
        raise NotImplementedError

    def choice(self, index: int, pieces: Sequence[Piece]) -> Object:
        """A choice of a whole answer: all pieces of one text."""
        raise NotImplementedError

    def head(self, kind: str) -> Object:
        """What begins each object of the answer."""
        identity = f"{self.prefix}-{self.record.id}"
        return {"id": identity, "object": kind, "created": self.created, "model": self.asked.model}

    async def response(self, request: Request, texts: Texts, desk: Desk) -> Response:
        """The response, as events while the texts are written or whole."""
        if self.asked.stream:
            return EventStream(self.events(texts), texts, desk, self.record)
        pieces: list[list[Piece]] = [[] for _ in self.requests]
        async with _watching(request.receive, self.record, texts, desk):
            async for index, piece in texts.pieces():
                pieces[index].append(piece)
                self._count(index, piece)

        def made() -> Response:
            # One after another, since each may have megabytes of log-probabilities, and Python's lock is held
            # while one is written.
            written = [as_json(self.choice(index, own)) for index, own in enumerate(pieces)]
            text = as_json({**self.head(self.whole), "usage": self.record.usage()})
            text = text[:-1] + b',"choices":[' + b",".join(written) + b"]}"
            return Response(text, media_type="application/json")

        if sum(len(piece.logprobs) for own in pieces for piece in own) < MANY_LOGPROBS:
            return made()
        return await asyncio.get_running_loop().run_in_executor(None, made)

    async def events(self, texts: Texts) -> AsyncIterator[Object]:
        """The answer in events."""
        unsaid = {"usage": None} if self.asked.with_usage else {}
        for choice in self.opening():
            yield {**self.head(self.part), "choices": [choice], **unsaid}
        async for index, piece in texts.pieces():
            self._count(index, piece)
            for choice in self.parts(index, piece):
                yield {**self.head(self.part), "choices": [choice], **unsaid}
        if self.asked.with_usage:
            yield {**self.head(self.part), "choices": [], "usage": self.record.usage()}

    def _count(self, index: int, piece: Piece) -> None:
        """Count a piece of the text at this place.

        Raises:
            ApiError: the text ended before its end.
        """
        record = self.record
        if piece.tokens:
            record.last_token = time.perf_counter()
            record.first_token = record.first_token or record.last_token
            record.completion_tokens += len(piece.tokens)
        if index % self.asked.choices == 0:  # of one prompt's texts, the first counts for what was reused of it
            record.cached_tokens += piece.reused
        if piece.finish is None:
            return
        record.finishes.append(piece.finish)
        if piece.finish == "cancelled" and record.gone:
            raise ApiError(GONE, "the client went away", code="cancelled")
        if piece.finish in _ENDS:
            status, message, code = _ENDS[piece.finish]
            raise ApiError(status, message, code=code)


class EventStream(Response):
    """Server-sent events while texts are written; a failure becomes the last event.

    Args:
        events: each a JSON object. texts: that they are made of, let go when the client has gone.
        record: told what the stream ended with instead of its end.
    """

    def __init__(self, events: AsyncIterator[Object], texts: Texts, desk: Desk, record: Record) -> None:
        super().__init__(None, 200, media_type="text/event-stream")
        self._events, self._texts, self._desk, self._record = events, texts, desk, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as an ASGI application."""
        kind = (b"content-type", b"text/event-stream; charset=utf-8")
        headers = [kind, (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with _watching(receive, self._record, self._texts, self._desk):
            try:
                async for event in self._events:
                    await send({"type": "http.response.body", "body": as_event(event), "more_body": True})
                last = DONE
            except Exception as error:
                refusal = refused(error) if isinstance(error, UserError) else error
                if not isinstance(refusal, ApiError):
                    refusal = ApiError(500, f"the engine failed ({type(error).__name__})")
                    scope[FAILURE] = error
                self._record.error = refusal.message
                last = as_event(refusal.body)
        # From here on the client is not watched: a server reports the end of an answer like a client that has gone.
        await send({"type": "http.response.body", "body": last, "more_body": False})


def as_event(value: Object) -> bytes:
    """A JSON object as one event of a stream."""
    return b"data: " + as_json(value) + b"\n\n"


@contextlib.asynccontextmanager
async def _watching(receive: Receive, record: Record, texts: Texts, desk: Desk) -> AsyncIterator[None]:
    """While open, texts are let go as soon as the client is gone; afterwards nobody waits for them."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        record.gone = True
        texts.cancel()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        desk.done(texts)


class Completion(Answer[CompletionRequest]):
    """Plain prompts, continued."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._said: dict[int, int] = {}  # characters of each text that has begun

    def parts(self, index: int, piece: Piece) -> Iterator[Object]:
        first = index not in self._said
        text = (self._echoed(index) if first else "") + piece.text
        told = self._logprobs(index, piece, self._said.get(index, 0), first=first) if piece.logprobs else None
        self._said[index] = self._said.get(index, 0) + len(text)
        if text or told or piece.finish is not None:
            yield {"index": index, "text": text, "logprobs": told, "finish_reason": piece.finish}

    def choice(self, index: int, pieces: Sequence[Piece]) -> Object:
        all_of_it = Piece.joined(pieces)
        text = self._echoed(index) + all_of_it.text
        told = self._logprobs(index, all_of_it, 0, first=True)
        return {"index": index, "text": text, "logprobs": told, "finish_reason": all_of_it.finish}

    def _echoed(self, index: int) -> str:
        """What stands before a text: its prompt, where that is to be repeated."""
        if not self.asked.echo:
            return ""
        prompt = self.asked.prompts[index // self.asked.choices]
        if isinstance(prompt, str):
            return prompt
        return b"".join(map(self.prompts.token_bytes, prompt)).decode("utf-8", "replace")

    def _logprobs(self, index: int, piece: Piece, offset: int, *, first: bool) -> Object | None:
        if self.asked.logprobs is None:
            return None
        # With echo, log-probabilities of the prompt's tokens precede the text's; its first token has none.
        of_prompt = len(piece.logprobs) > len(piece.tokens) or self.asked.max_tokens == 0
        starts = self.asked.echo and first and of_prompt
        token = int(self.requests[index].tokens[0]) if starts else None
        return completion_logprobs(piece.logprobs, self.prompts.token_bytes, offset=offset, first=token)


class Chat(Answer[ChatRequest]):
    """Conversations, answered, with calls of tools."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        names = [tool.function.name for tool in self.asked.offered]
        form = FORCED if self.asked.forced else self.prompts.call_form if names else None
        self._scans = [None if form is None else CallScan(form, names) for _ in self.requests]

    def head(self, kind: str) -> Object:
        return {**super().head(kind), "system_fingerprint": None}

    def opening(self) -> Iterable[Object]:
        return [_delta(index, {"role": "assistant", "content": ""}) for index in range(len(self.requests))]

    def parts(self, index: int, piece: Piece) -> Iterator[Object]:
        text, calls = self._said(index, piece)
        logprobs = chat_logprobs(piece.logprobs, self.prompts.token_bytes) if piece.logprobs else None
        if text or logprobs:
            yield _delta(index, {"content": text}, logprobs=logprobs)
        for number, call in enumerate(calls):
            yield _delta(index, {"tool_calls": [{"index": number, **call}]})
        if piece.finish is not None:
            yield _delta(index, {}, finish="tool_calls" if calls else piece.finish)

    def choice(self, index: int, pieces: Sequence[Piece]) -> Object:
        all_of_it = Piece.joined(pieces)
        finish: str | None = all_of_it.finish
        message: Object = {"role": "assistant", "content": all_of_it.text, "refusal": None}
        said = [self._said(index, piece) for piece in pieces]
        if said and (calls := said[-1][1]):
            finish = "tool_calls"
            message["content"] = "".join(text for text, _ in said).strip() or None
            message["tool_calls"] = calls
        told = chat_logprobs(all_of_it.logprobs, self.prompts.token_bytes) if self.asked.logprobs else None
        return {"index": index, "message": message, "logprobs": told, "finish_reason": finish}

    def _said(self, index: int, piece: Piece) -> tuple[str, list[Object]]:
        """What a piece says, and the calls of tools that are whole at the text's end."""
        scan = self._scans[index]
        if scan is None:
            return piece.text, []
        text = scan.feed(piece.text, piece.tokens)
        if piece.finish is None:
            return text, []
        rest, calls = scan.end()
        most = 1 if self.asked.parallel_tool_calls is False else None
        return text + rest, [call.as_dict() for call in calls[:most]]


def _delta(index: int, delta: Object, *, finish: str | None = None, logprobs: object = None) -> Object:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def texts_router(served: Served, desk: Desk, settings: ServerSettings) -> APIRouter:
    """The routes that write text: ``/v1/chat/completions`` and ``/v1/completions``."""
    router = APIRouter(responses=ANSWERS, default_response_class=Response)
    limits = settings.limits

    def route(path: str, name: str, summary: str, fields: type[Asked], rendering: type[Answer[Asked]]) -> None:
        async def respond(request: Request) -> Response:
            asked: Asked = await read_json(request, fields, limits)
            record = record_of(request.scope)
            adapter = None if asked.model == served.name else asked.model
            if adapter is not None and adapter not in served.adapters():
                raise no_model(asked.model)
            record.model, record.stream = asked.model, bool(asked.stream)
            if settings.log_prompts:
                record.asked = asked.shown
            count = asked.choices * len(asked.prompts)
            if count > limits.choices:
                raise ApiError(400, f"{count} texts are asked for, and a request may have {limits.choices}", param="n")
            desk.check_room(count)
            requests = await asyncio.get_running_loop().run_in_executor(
                desk.preparing, text_requests, asked, adapter, served, limits, record.owner
            )
            record.prompt_tokens = sum(len(r.tokens) for r in requests[:: asked.choices])
            answer = rendering(asked, requests, served.prompts(adapter), record)
            return await answer.response(request, await desk.write(requests), desk)

        router.post(path, name=name, summary=summary, openapi_extra=described(fields))(respond)

    route("/v1/chat/completions", "chat", "Answer a conversation", ChatRequest, Chat)
    route("/v1/completions", "completions", "Continue prompts", CompletionRequest, Completion)
    return router
