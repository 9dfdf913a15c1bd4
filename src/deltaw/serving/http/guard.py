"""Middleware: request log and metrics, and authentication.

Implemented as plain ASGI, so that streams are not buffered.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import hashlib
import hmac
import json
import logging
import logging.handlers
import queue
import time
from collections.abc import Callable, Collection, Iterator
from typing import TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltaw.decoding.request import EngineLoad
from deltaw.machine.memory import trim_memory
from deltaw.serving.http.errors import CLIENT_CLOSED_REQUEST, ApiError, error_response
from deltaw.serving.http.requests import FAILURE, KEY, LARGE, Bodies, Record, record_of
from deltaw.serving.http.settings import ServerSettings, known_host

# Histogram buckets in seconds: per token, to the first token, and per request.
_TOKEN_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_REQUEST_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_GAUGES = {
    "running": "Completions that are being generated",
    "waiting": "Completions that are queued",
    "pages_used": "Pages of keys and values in use",
    "pages": "Total pages of keys and values",
    "adapters_loaded": "Adapters in memory",
}


class RequestMetrics:
    """Prometheus metrics of requests and tokens, in a separate registry.

    Labels are bounded: routes of the application and served models.

    Args:
        load: Returns the load of the engine.
        pending: Returns the number of completions that are queued or running.
    """

    def __init__(self, load: Callable[[], EngineLoad], pending: Callable[[], int]) -> None:
        registry = self.registry = CollectorRegistry(auto_describe=True)
        counter = functools.partial(Counter, registry=registry)
        histogram = functools.partial(Histogram, registry=registry)
        self._requests = counter("deltaw_requests", "Requests", ("route", "status", "model"))
        self._prompt = counter("deltaw_prompt_tokens", "Tokens of prompts", ("model",))
        self._cached = counter("deltaw_cached_prompt_tokens", "Tokens of prompts that were reused", ("model",))
        self._completion_tokens = counter("deltaw_completion_tokens", "Tokens that were generated", ("model",))
        self._finished = counter("deltaw_completions", "Completions by finish reason", ("model", "finish"))
        self._seconds = histogram("deltaw_request_seconds", "Time of a request", ("route",), buckets=_REQUEST_BUCKETS)
        first = "Time from a request's arrival to its first token"
        token = "Time per token of a request after its first"
        self._first = histogram("deltaw_first_token_seconds", first, buckets=_FIRST_TOKEN_BUCKETS)
        self._token = histogram("deltaw_token_seconds", f"{token}, over its completions", buckets=_TOKEN_BUCKETS)
        Gauge("deltaw_pending", "Completions that are queued or running", registry=registry).set_function(pending)
        for name, description in _GAUGES.items():
            gauge = Gauge(f"deltaw_{name}", description, registry=registry)
            gauge.set_function(lambda name=name: float(getattr(load(), name)))  # type: ignore[misc]

    def count(self, record: Record, route: str, status: int, seconds: float) -> None:
        """Record a completed request."""
        self._requests.labels(route, str(status), record.model).inc()
        self._seconds.labels(route).observe(seconds)
        if record.prompt_tokens and record.finishes:
            self._prompt.labels(record.model).inc(record.prompt_tokens)
            self._cached.labels(record.model).inc(record.cached_tokens)
        if record.completion_tokens:
            self._completion_tokens.labels(record.model).inc(record.completion_tokens)
        for finish in record.finishes:
            self._finished.labels(record.model, finish).inc()
        if record.first_token is None or record.last_token is None:
            return
        self._first.observe(record.first_token - record.started_at)
        if record.completion_tokens > 1:
            self._token.observe((record.last_token - record.first_token) / (record.completion_tokens - 1))


LOGGER = logging.getLogger("deltaw.serve")
# Maximum number of queued log lines.
MAX_QUEUED_LINES = 10_000
# Loggers and minimum levels of the request log. uvicorn's child loggers propagate to "uvicorn".
_LEVELS = {LOGGER.name: logging.INFO, "uvicorn": logging.WARNING, "uvicorn.error": logging.WARNING}


class _AccessLog(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        line: dict[str, object] = {"time": moment.isoformat(timespec="milliseconds"), "level": record.levelname.lower()}
        fields = getattr(record, "fields", None)
        line |= fields if isinstance(fields, dict) else {"event": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


class _Dropping(logging.handlers.QueueHandler):
    """Puts log records into a queue. Drops them if the queue is full."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(queue.Full):
            self.queue.put_nowait(record)


@contextlib.contextmanager
def request_log(stream: TextIO | None) -> Iterator[None]:
    """Write one JSON line per request and per error to a stream while the context is open.

    A background thread writes the lines. If the reader of the stream is too slow, lines are dropped. Prompts are logged
    only if enabled. Keys are never logged.

    Args:
        stream: Output stream, for example standard error. None disables the log.
    """
    log_queue: queue.Queue[logging.LogRecord] = queue.Queue(MAX_QUEUED_LINES)
    handler = logging.NullHandler() if stream is None else _Dropping(log_queue)
    stream_handler = logging.StreamHandler(stream)
    stream_handler.setFormatter(_AccessLog())
    listener = logging.handlers.QueueListener(log_queue, stream_handler)
    loggers = [logging.getLogger(name) for name in _LEVELS]
    previous = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(_LEVELS[logger.name])
        logger.propagate = logger.name == "uvicorn.error"
        if not logger.propagate:
            logger.addHandler(handler)
    listener.start()
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, previous, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
        listener.stop()


# Delay between a large request and the release of free memory, shared by all requests in this time.
TRIM_SECONDS = 2.0
# Default headers of every response.
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class RequestObserver:
    """Middleware that creates a record per request and writes it to the log and the metrics.

    Unexpected exceptions are answered with status 500 and logged, but not sent to the client. After large requests and
    responses, free memory is returned to the system.
    """

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self._app = app
        self._metrics = metrics
        self._bodies = Bodies()
        self._trimming: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request (ASGI application)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = scope[KEY] = Record(bodies=self._bodies)
        status = body_bytes = 0

        async def observed_send(message: Message) -> None:
            nonlocal status, body_bytes
            body_bytes += len(message.get("body", b""))
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                headers["x-request-id"] = record.id
            await send(message)

        failure: BaseException | None = None
        try:
            await self._app(scope, receive, observed_send)
        except Exception as error:
            failure = error
            if not status:
                fault = ApiError(500, f"internal server error; see request {record.id} in the server's log")
                await error_response(fault)(scope, receive, observed_send)
        finally:
            record.bodies.bytes -= record.body
            if record.body + body_bytes > LARGE:
                self._trim_soon()
            self._end(scope, record, status, scope.get(FAILURE, failure))

    def _trim_soon(self) -> None:
        if self._trimming is None:
            loop = asyncio.get_running_loop()

            def trim() -> None:
                self._trimming = None
                loop.run_in_executor(None, trim_memory)

            self._trimming = loop.call_later(TRIM_SECONDS, trim)

    def _end(self, scope: Scope, record: Record, status: int, failure: BaseException | None) -> None:
        route = getattr(scope.get("route"), "path", "other")
        seconds = time.perf_counter() - record.started_at
        status = CLIENT_CLOSED_REQUEST if record.disconnected else status
        self._metrics.count(record, route, status, seconds)
        client = (scope.get("client") or [None])[0]
        method = scope["method"][:16]
        line: dict[str, object] = {"event": "request", "id": record.id, "client": client, "method": method}
        line |= {"route": route, "status": status, "seconds": round(seconds, 4)}
        if record.model:
            first = None if record.first_token is None else round(record.first_token - record.started_at, 4)
            fields = ("model", "stream", "prompt_tokens", "cached_tokens", "completion_tokens")
            line |= {name: getattr(record, name) for name in fields}
            line |= {"first_token_seconds": first, "finish": record.finishes}
        line |= {name: value for name in ("error", "asked") if (value := getattr(record, name)) is not None}
        level = logging.ERROR if failure is not None else logging.INFO
        LOGGER.log(level, "request", extra={"fields": line}, exc_info=failure)


class Guard:
    """Middleware that checks the API key and the Host header.

    Args:
        app: The application.
        settings: Keys and host names.
        open_paths: Paths that need no key.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, open_paths: Collection[str]) -> None:
        self._app = app
        self._keys = [_digest(key.encode()) for key in settings.keys]
        self._separate_caches = len(self._keys) > 1 and not settings.share_cache
        self._open = frozenset(open_paths)
        self._hosts = frozenset(name.lower() for name in settings.hosts)
        self._check_hosts = settings.loopback or bool(settings.hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request (ASGI application)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        await (self._app if refusal is None else error_response(refusal))(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if self._check_hosts and not known_host(headers.get("host", ""), self._hosts):
            message = "the Host header names another host: start the server with --allow-host"
            return ApiError(403, message, code="wrong_host")
        if self._keys and scope["path"] not in self._open:
            number = self._key_of(headers)
            if not number:
                hint = "send 'Authorization: Bearer KEY'"
                return ApiError(401, f"the API key is missing or wrong: {hint}", code="invalid_api_key")
            if self._separate_caches:
                record_of(scope).owner = number
        return None

    def _key_of(self, headers: Headers) -> int:
        """Return the number of a request's key, counted from 1, or 0 if it has no valid key."""
        kind, _, key_text = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            return 0
        digest = _digest(key_text.strip().encode("utf-8", "replace"))
        # Compare all keys in constant time.
        return sum(n * hmac.compare_digest(digest, key) for n, key in enumerate(self._keys, start=1))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
