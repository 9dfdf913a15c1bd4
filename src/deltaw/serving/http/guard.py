"""The two layers around all routes: one that sees every request's end and writes it into metrics and log, and one
that lets in who may ask.

Plain ASGI, so that streams pass through without being held up.
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

from deltaw.machine.memory import trim_memory
from deltaw.serving.http.errors import GONE, ApiError, error_response
from deltaw.serving.http.requests import FAILURE, KEY, LARGE, Bodies, Record, record_of
from deltaw.serving.http.settings import ServerSettings, is_loopback
from deltaw.serving.request import EngineLoad

# Seconds: from a token of a small model to an answer of a large one.
_TOKEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_FIRST = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_WHOLE = (0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_GAUGES = {
    "running": "Texts that are being written",
    "waiting": "Texts that are not yet begun",
    "pages_used": "Pages of keys and values in use",
    "pages": "Pages of keys and values there are",
    "adapters_loaded": "Adapters in memory",
}


def _number(load: Callable[[], EngineLoad], name: str) -> float:
    return float(getattr(load(), name))


class Metrics:
    """Counts requests and tokens, and how long they take: numbers for Prometheus, in a registry of their own.

    Labels are bounded: routes are those of the application, models those that it serves.

    Args:
        load: what the engine is doing. in_hand: texts that the server has taken in.
    """

    def __init__(self, load: Callable[[], EngineLoad], in_hand: Callable[[], int]) -> None:
        registry = self.registry = CollectorRegistry(auto_describe=True)
        counter = functools.partial(Counter, registry=registry)
        histogram = functools.partial(Histogram, registry=registry)
        self._requests = counter("deltaw_requests", "Requests", ("route", "status", "model"))
        self._prompt = counter("deltaw_prompt_tokens", "Tokens of prompts", ("model",))
        self._cached = counter("deltaw_cached_prompt_tokens", "Tokens of prompts that were reused", ("model",))
        self._written = counter("deltaw_completion_tokens", "Tokens that were written", ("model",))
        self._finished = counter("deltaw_texts", "Texts by why they ended", ("model", "finish"))
        self._seconds = histogram("deltaw_request_seconds", "Time of a request", ("route",), buckets=_WHOLE)
        first, token = "Time from a request's arrival to its first token", "Time per token of a request after its first"
        self._first = histogram("deltaw_first_token_seconds", first, buckets=_FIRST)
        self._token = histogram("deltaw_token_seconds", f"{token}, over its texts", buckets=_TOKEN)
        Gauge("deltaw_in_hand", "Texts in hand, waiting or running", registry=registry).set_function(in_hand)
        for name, told in _GAUGES.items():
            Gauge(f"deltaw_{name}", told, registry=registry).set_function(functools.partial(_number, load, name))

    def count(self, record: Record, route: str, status: int, seconds: float) -> None:
        """Count a request that has been answered."""
        self._requests.labels(route, str(status), record.model).inc()
        self._seconds.labels(route).observe(seconds)
        if record.prompt_tokens and record.finishes:
            self._prompt.labels(record.model).inc(record.prompt_tokens)
            self._cached.labels(record.model).inc(record.cached_tokens)
        if record.completion_tokens:
            self._written.labels(record.model).inc(record.completion_tokens)
        for finish in record.finishes:
            self._finished.labels(record.model, finish).inc()
        if record.first_token is None or record.last_token is None:
            return
        self._first.observe(record.first_token - record.began)
        if record.completion_tokens > 1:
            self._token.observe((record.last_token - record.first_token) / (record.completion_tokens - 1))


LOGGER = logging.getLogger("deltaw.serve")
# Lines that wait for the writer.
MOST_WAITING = 10_000
# Whose lines the log has, and from which level on. Children of uvicorn's logger pass their lines up to it.
_LEVELS = {LOGGER.name: logging.INFO, "uvicorn": logging.WARNING, "uvicorn.error": logging.WARNING}


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        line: dict[str, object] = {"time": moment.isoformat(timespec="milliseconds"), "level": record.levelname.lower()}
        fields = getattr(record, "fields", None)
        line |= fields if isinstance(fields, dict) else {"event": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


class _Dropping(logging.handlers.QueueHandler):
    """Puts lines into a queue while there is room."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(queue.Full):
            self.queue.put_nowait(record)


@contextlib.contextmanager
def request_log(stream: TextIO | None) -> Iterator[None]:
    """Write the log of a server to a stream while open: a line of JSON for each request, and for each thing
    that goes wrong.

    A thread of its own writes the lines; if their reader does not keep up, they are dropped. Prompts are left
    out unless asked for; keys never appear.

    Args:
        stream: such as standard error; None for no lines at all.
    """
    waiting: queue.Queue[logging.LogRecord] = queue.Queue(MOST_WAITING)
    handler = logging.NullHandler() if stream is None else _Dropping(waiting)
    shown = logging.StreamHandler(stream)
    shown.setFormatter(_Lines())
    listener = logging.handlers.QueueListener(waiting, shown)
    loggers = [logging.getLogger(name) for name in _LEVELS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(_LEVELS[logger.name])
        logger.propagate = logger.name == "uvicorn.error"
        if not logger.propagate:
            logger.addHandler(handler)
    listener.start()
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
        listener.stop()


# After a large request; others that end within this time need no trimming of their own.
TRIM_SECONDS = 2.0
# Said with every answer that does not say otherwise itself.
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Observed:
    """Gives each request a record, and writes it into the log and the metrics when it has been answered.

    What no route expected is answered with 500 and goes to the log, never to the client. After large requests
    and answers, memory that they leave behind is given back.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._bodies = Bodies()
        self._trimming: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as an ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = scope[KEY] = Record(bodies=self._bodies)
        status = written = 0

        async def told(message: Message) -> None:
            nonlocal status, written
            written += len(message.get("body", b""))
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                headers["x-request-id"] = record.id
            await send(message)

        failure: BaseException | None = None
        try:
            await self._app(scope, receive, told)
        except Exception as error:
            failure = error
            if not status:
                fault = ApiError(500, f"a fault of the server; it is in its log as {record.id}")
                await error_response(fault)(scope, receive, told)
        finally:
            record.bodies.bytes -= record.body  # nothing holds its body any more
            if record.body + written > LARGE:
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
        seconds = time.perf_counter() - record.began
        status = GONE if record.gone else status
        self._metrics.count(record, route, status, seconds)
        client, method = (scope.get("client") or [None])[0], scope["method"][:16]
        line: dict[str, object] = {"event": "request", "id": record.id, "client": client, "method": method}
        line |= {"route": route, "status": status, "seconds": round(seconds, 4)}
        if record.model:
            first = None if record.first_token is None else round(record.first_token - record.began, 4)
            told = ("model", "stream", "prompt_tokens", "cached_tokens", "completion_tokens")
            line |= {name: getattr(record, name) for name in told}
            line |= {"first_token_seconds": first, "finish": record.finishes}
        line |= {name: value for name in ("error", "asked") if (value := getattr(record, name)) is not None}
        level = logging.ERROR if failure is not None else logging.INFO
        LOGGER.log(level, "request", extra={"fields": line}, exc_info=failure)


class Guard:
    """Lets in requests that bring a key, where there are keys, and that name the server as it is known.

    Args:
        settings: keys and names. open_paths: paths that need no key.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, open_paths: Collection[str]) -> None:
        self._app = app
        self._keys = [_digest(key.encode()) for key in settings.keys]
        self._apart = len(self._keys) > 1 and not settings.share_cache
        self._open = frozenset(open_paths)
        self._hosts = frozenset(name.lower() for name in settings.hosts)
        self._check_hosts = settings.loopback or bool(settings.hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as an ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        answering = self._app if refusal is None else error_response(refusal)
        await answering(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if self._check_hosts and not self._known_host(headers.get("host", "")):
            hint = "start the server with --allow-host"
            return ApiError(403, f"the Host header names another host: {hint}", code="wrong_host")
        if self._keys and scope["path"] not in self._open:
            number = self._key_of(headers)
            if not number:
                hint = "send 'Authorization: Bearer KEY'"
                return ApiError(401, f"the API key is missing or wrong: {hint}", code="invalid_api_key")
            if self._apart:
                record_of(scope).owner = number
        return None

    def _known_host(self, told: str) -> bool:
        name = told.lower()
        name = name.partition("]")[0] + "]" if name.startswith("[") else name.partition(":")[0]
        return is_loopback(name) or name in self._hosts

    def _key_of(self, headers: Headers) -> int:
        """Which key a request brings, from 1; 0 for none."""
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            return 0
        digest = _digest(given.strip().encode("utf-8", "replace"))
        # All keys are compared, each in a time that does not tell how much of it is right.
        return sum(n * hmac.compare_digest(digest, key) for n, key in enumerate(self._keys, start=1))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
