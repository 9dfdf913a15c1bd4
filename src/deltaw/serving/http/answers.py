"""Routes and responses of chat completions and text completions, complete or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from deltaw.decoding.request import Request as TextRequest
from deltaw.decoding.request import TextChunk, TokenLogprob
from deltaw.errors import UserError
from deltaw.serving.http.build_requests import build_requests
from deltaw.serving.http.errors import (
    CLIENT_CLOSED_REQUEST,
    GENERATION_RESPONSES,
    ApiError,
    as_json,
    to_api_error,
    unknown_model_error,
)
from deltaw.serving.http.queue import RequestGroup, RequestQueue
from deltaw.serving.http.requests import (
    FAILURE,
    ChatRequest,
    CompletionRequest,
    Record,
    read_json,
    record_of,
    request_body_schema,
)
from deltaw.serving.http.served import Served, TokenizedPrompts
from deltaw.serving.http.settings import ServerSettings
from deltaw.serving.http.tool_calls import FORCED, CallScan

# Replaces the logarithm of a zero probability, which JSON cannot represent.
MIN_LOGPROB = -9999.0
TokenBytes = Callable[[int], bytes]
RequestFields = TypeVar("RequestFields", ChatRequest, CompletionRequest)


def chat_logprobs(logprobs: Sequence[TokenLogprob], token_bytes: TokenBytes) -> dict[str, object]:
    """Convert log-probabilities to the format of ``/v1/chat/completions``."""

    def entry(token: int, logprob: float) -> dict[str, object]:
        raw = token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(raw)}

    content = [{**entry(i.token, i.logprob), "top_logprobs": [entry(*top) for top in i.top]} for i in logprobs]
    return {"content": content, "refusal": None}


def completion_logprobs(
    logprobs: Sequence[TokenLogprob], token_bytes: TokenBytes, *, offset: int = 0, first: int | None = None
) -> dict[str, object]:
    """Convert log-probabilities to the format of ``/v1/completions``.

    Args:
        logprobs: Log-probabilities of consecutive tokens.
        token_bytes: Returns the bytes of a token.
        offset: Number of characters of the text before these tokens.
        first: Preceding token without a log-probability: the first token of the prompt.
    """
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []

    def add_token(token: int, value: float | None, top: dict[str, float] | None) -> None:
        nonlocal offset
        tokens.append(_token_name(token_bytes(token)))
        values.append(value)
        tops.append(top)
        offsets.append(offset)
        offset += len(token_bytes(token).decode("utf-8", "ignore"))

    if first is not None:
        add_token(first, None, None)
    for item in logprobs:
        likely = {_token_name(token_bytes(t)): _finite(value) for t, value in item.top}
        likely.setdefault(_token_name(token_bytes(item.token)), _finite(item.logprob))
        add_token(item.token, _finite(item.logprob), likely if item.top else None)
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _token_name(raw: bytes) -> str:
    """Return the text of a token. An incomplete character is named by its bytes, so that names are unique."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(value: float) -> float:
    return max(float(value), MIN_LOGPROB) if value == value else MIN_LOGPROB


# From this number of log-probabilities on, a response is serialized on a worker thread.
THREADED_LOGPROBS = 200
DONE = b"data: [DONE]\n\n"
Object = dict[str, object]
_FAILURES = {
    "timeout": (504, "the text was not finished in time", "timeout"),
    "cancelled": (503, "the text was cancelled: the server is shutting down", "shutting_down"),
    "error": (500, "the engine failed", "engine_failed"),
}


@dataclass
class CompletionResponse(Generic[RequestFields]):
    """Response to one API request. Subclasses implement the format of their API.

    Args:
        fields: Fields of the API request.
        requests: Engine requests of its completions.
        prompts: Tokenizer of its adapter.
        record: Record of the API request.

    Attributes:
        prefix: Prefix of the response id.
        response_type: Object type of a complete response.
        chunk_type: Object type of an event.
    """

    prefix: ClassVar[str]
    response_type: ClassVar[str]
    chunk_type: ClassVar[str]

    fields: RequestFields
    requests: Sequence[TextRequest]
    prompts: TokenizedPrompts
    record: Record
    created: int = field(init=False, default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        """Initialize the state of a subclass."""

    def initial_choices(self) -> Iterable[Object]:
        """Return the choices of events before the first chunk."""
        return ()

    def chunk_choices(self, index: int, chunk: TextChunk) -> Iterator[Object]:
        """Yield the choices of the events for a chunk."""
        raise NotImplementedError

    def complete_choice(self, index: int, chunks: Sequence[TextChunk]) -> Object:
        """Return the choice of a complete response, from all chunks of a completion."""
        raise NotImplementedError

    def header(self, kind: str) -> Object:
        """Return the common fields of response objects."""
        identity = f"{self.prefix}-{self.record.id}"
        return {"id": identity, "object": kind, "created": self.created, "model": self.fields.model}

    async def response(self, request: Request, group: RequestGroup, request_queue: RequestQueue) -> Response:
        """Return the response: a stream of events if requested, otherwise the complete completions."""
        if self.fields.stream:
            return EventStream(self.events(group), group, request_queue, self.record)
        chunks: list[list[TextChunk]] = [[] for _ in self.requests]
        async with _cancel_on_disconnect(request.receive, self.record, group, request_queue):
            async for index, chunk in group.chunks():
                chunks[index].append(chunk)
                self._count(index, chunk)

        def build_response() -> Response:
            # Serialize choices separately: each may have megabytes of log-probabilities, and the GIL is held meanwhile.
            choices = [as_json(self.complete_choice(index, parts)) for index, parts in enumerate(chunks)]
            body = as_json({**self.header(self.response_type), "usage": self.record.usage()})
            body = body[:-1] + b',"choices":[' + b",".join(choices) + b"]}"
            return Response(body, media_type="application/json")

        if sum(len(chunk.logprobs) for choice_chunks in chunks for chunk in choice_chunks) < THREADED_LOGPROBS:
            return build_response()
        return await asyncio.get_running_loop().run_in_executor(None, build_response)

    async def events(self, group: RequestGroup) -> AsyncIterator[Object]:
        """Yield the response objects of a stream."""
        no_usage = {"usage": None} if self.fields.with_usage else {}
        for choice in self.initial_choices():
            yield {**self.header(self.chunk_type), "choices": [choice], **no_usage}
        async for index, chunk in group.chunks():
            self._count(index, chunk)
            for choice in self.chunk_choices(index, chunk):
                yield {**self.header(self.chunk_type), "choices": [choice], **no_usage}
        if self.fields.with_usage:
            yield {**self.header(self.chunk_type), "choices": [], "usage": self.record.usage()}

    def _count(self, index: int, chunk: TextChunk) -> None:
        """Update the record by a chunk.

        Raises:
            ApiError: if the completion was cancelled, timed out or failed.
        """
        record = self.record
        if chunk.tokens:
            record.last_token = time.perf_counter()
            record.first_token = record.first_token or record.last_token
            record.completion_tokens += len(chunk.tokens)
        if index % self.fields.choices == 0:  # count cached tokens once per prompt
            record.cached_tokens += chunk.reused
        if chunk.finish is None:
            return
        record.finishes.append(chunk.finish)
        if chunk.finish == "cancelled" and record.disconnected:
            raise ApiError(CLIENT_CLOSED_REQUEST, "the client disconnected", code="cancelled")
        if chunk.finish in _FAILURES:
            status, message, code = _FAILURES[chunk.finish]
            raise ApiError(status, message, code=code)


class EventStream(Response):
    """Server-sent events of running completions. An error is sent as the last event.

    Args:
        events: Objects to send as JSON.
        group: Completions to cancel if the client disconnects.
        request_queue: Queue of the group.
        record: Record of the request. Receives the error.
    """

    def __init__(self, events: AsyncIterator[Object], group: RequestGroup, queue: RequestQueue, record: Record) -> None:
        super().__init__(None, 200, media_type="text/event-stream")
        self._events = events
        self._group = group
        self._queue = queue
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response (ASGI application)."""
        kind = (b"content-type", b"text/event-stream; charset=utf-8")
        headers = [kind, (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with _cancel_on_disconnect(receive, self._record, self._group, self._queue):
            try:
                async for event in self._events:
                    await send({"type": "http.response.body", "body": as_event(event), "more_body": True})
                last = DONE
            except Exception as error:
                api_error = to_api_error(error) if isinstance(error, UserError) else error
                if not isinstance(api_error, ApiError):
                    api_error = ApiError(500, f"the engine failed ({type(error).__name__})")
                    scope[FAILURE] = error
                self._record.error = api_error.message
                last = as_event(api_error.body)
        # After the last event the server reports a disconnect, which must not be treated as the client's.
        await send({"type": "http.response.body", "body": last, "more_body": False})


def as_event(value: Object) -> bytes:
    """Serialize a JSON object as a server-sent event."""
    return b"data: " + as_json(value) + b"\n\n"


@contextlib.asynccontextmanager
async def _cancel_on_disconnect(
    receive: Receive, record: Record, group: RequestGroup, request_queue: RequestQueue
) -> AsyncIterator[None]:
    """Cancel the completions as soon as the client disconnects, and release the group on exit."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        record.disconnected = True
        group.cancel()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        request_queue.release(group)


class CompletionEndpoint(CompletionResponse[CompletionRequest]):
    """Responses of ``/v1/completions``."""

    prefix = "cmpl"
    response_type = "text_completion"
    chunk_type = "text_completion"

    def __post_init__(self) -> None:
        self._lengths: dict[int, int] = {}  # emitted characters by completion

    def chunk_choices(self, index: int, chunk: TextChunk) -> Iterator[Object]:
        first = index not in self._lengths
        text = (self._echo_text(index) if first else "") + chunk.text
        logprobs = self._logprobs(index, chunk, self._lengths.get(index, 0), first=first) if chunk.logprobs else None
        self._lengths[index] = self._lengths.get(index, 0) + len(text)
        if text or logprobs or chunk.finish is not None:
            yield {"index": index, "text": text, "logprobs": logprobs, "finish_reason": chunk.finish}

    def complete_choice(self, index: int, chunks: Sequence[TextChunk]) -> Object:
        joined = TextChunk.join(chunks)
        text = self._echo_text(index) + joined.text
        logprobs = self._logprobs(index, joined, 0, first=True)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": joined.finish}

    def _echo_text(self, index: int) -> str:
        """Return the prompt if ``echo`` is requested, otherwise an empty string."""
        prompt = self.fields.prompts[index // self.fields.choices] if self.fields.echo else ""
        if isinstance(prompt, str):
            return prompt
        return b"".join(map(self.prompts.token_bytes, prompt)).decode("utf-8", "replace")

    def _logprobs(self, index: int, chunk: TextChunk, offset: int, *, first: bool) -> Object | None:
        if self.fields.logprobs is None:
            return None
        # With echo, log-probabilities of the prompt are first. Its first token has no log-probability.
        has_prompt = len(chunk.logprobs) > len(chunk.tokens) or self.fields.max_tokens == 0
        add_first = self.fields.echo and first and has_prompt
        token = int(self.requests[index].tokens[0]) if add_first else None
        return completion_logprobs(chunk.logprobs, self.prompts.token_bytes, offset=offset, first=token)


class ChatEndpoint(CompletionResponse[ChatRequest]):
    """Responses of ``/v1/chat/completions``, with tool calls."""

    prefix = "chatcmpl"
    response_type = "chat.completion"
    chunk_type = "chat.completion.chunk"

    def __post_init__(self) -> None:
        names = [tool.function.name for tool in self.fields.offered_tools]
        form = FORCED if self.fields.forced_functions else self.prompts.call_form if names else None
        self._scans = [None if form is None else CallScan(form, names) for _ in self.requests]

    def header(self, kind: str) -> Object:
        return {**super().header(kind), "system_fingerprint": None}

    def initial_choices(self) -> Iterable[Object]:
        return [_delta(index, {"role": "assistant", "content": ""}) for index in range(len(self.requests))]

    def chunk_choices(self, index: int, chunk: TextChunk) -> Iterator[Object]:
        text, calls = self._split_calls(index, chunk)
        logprobs = chat_logprobs(chunk.logprobs, self.prompts.token_bytes) if chunk.logprobs else None
        if text or logprobs:
            yield _delta(index, {"content": text}, logprobs=logprobs)
        for call_index, call in enumerate(calls):
            yield _delta(index, {"tool_calls": [{"index": call_index, **call}]})
        if chunk.finish is not None:
            yield _delta(index, {}, finish="tool_calls" if calls else chunk.finish)

    def complete_choice(self, index: int, chunks: Sequence[TextChunk]) -> Object:
        joined = TextChunk.join(chunks)
        finish: str | None = joined.finish
        message: Object = {"role": "assistant", "content": joined.text, "refusal": None}
        parts = [self._split_calls(index, chunk) for chunk in chunks]
        if parts and (calls := parts[-1][1]):
            finish = "tool_calls"
            message["content"] = "".join(text for text, _ in parts).strip() or None
            message["tool_calls"] = calls
        logprobs = chat_logprobs(joined.logprobs, self.prompts.token_bytes) if self.fields.logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def _split_calls(self, index: int, chunk: TextChunk) -> tuple[str, list[Object]]:
        """Return the new text of a chunk, and after the last chunk the tool calls."""
        scan = self._scans[index]
        if scan is None:
            return chunk.text, []
        text = scan.feed(chunk.text, chunk.tokens)
        if chunk.finish is None:
            return text, []
        rest, calls = scan.end()
        max_calls = 1 if self.fields.parallel_tool_calls is False else None
        return text + rest, [call.as_dict() for call in calls[:max_calls]]


def _delta(index: int, delta: Object, *, finish: str | None = None, logprobs: object = None) -> Object:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def generation_router(served: Served, request_queue: RequestQueue, settings: ServerSettings) -> APIRouter:
    """Return the routes ``/v1/chat/completions`` and ``/v1/completions``."""
    router = APIRouter(responses=GENERATION_RESPONSES, default_response_class=Response)
    limits = settings.limits

    def route(
        path: str, name: str, title: str, fields: type[RequestFields], endpoint: type[CompletionResponse[RequestFields]]
    ) -> None:
        async def respond(request: Request) -> Response:
            body: RequestFields = await read_json(request, fields, limits)
            record = record_of(request.scope)
            adapter = None if body.model == served.name else body.model
            if adapter is not None and adapter not in served.adapters():
                raise unknown_model_error(body.model)
            record.model = body.model
            record.stream = bool(body.stream)
            if settings.log_prompts:
                record.asked = body.log_value
            count = body.choices * len(body.prompts)
            if count > limits.choices:
                raise ApiError(400, f"{count} completions are requested, and {limits.choices} are allowed", param="n")
            prompts = served.prompts(adapter)
            has_images = isinstance(body, ChatRequest) and body.num_images > 0
            build = functools.partial(build_requests, body, adapter, served, limits, record.owner)
            requests = await request_queue.prepare(count, has_images, build)
            record.prompt_tokens = sum(len(r.tokens) for r in requests[:: body.choices])
            response = endpoint(body, requests, prompts, record)
            return await response.response(request, await request_queue.submit(requests), request_queue)

        router.post(path, name=name, summary=title, openapi_extra=request_body_schema(fields))(respond)

    route("/v1/chat/completions", "chat", "Answer a conversation", ChatRequest, ChatEndpoint)
    route("/v1/completions", "completions", "Continue prompts", CompletionRequest, CompletionEndpoint)
    return router
