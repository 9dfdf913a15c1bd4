"""The two layers around all routes: one that sees every request's end and writes it into metrics and log, and one
that lets in who may ask.

Plain ASGI, so that streams pass through without being held up.
"""

from __future__ import annotations

import asyncio
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

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltaw.host.memory import trim_memory
from deltaw.serving.http.errors import GONE, ApiError, error_response
from deltaw.serving.http.requests import FAILURE, KEY, LARGE, Bodies, Record, record_of
from deltaw.serving.http.settings import ServerSettings, is_loopback
from deltaw.serving.request import EngineLoad

# ---- Numbers for Prometheus, in a registry of the application's own.
#
# Labels are bounded: routes are those of the application, models those that it serves.


CONTENT_TYPE = CONTENT_TYPE_LATEST
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


class _Gauges(Collector):
    """What an engine is doing, asked for when somebody looks."""

    def __init__(self, load: Callable[[], EngineLoad], in_hand: Callable[[], int]) -> None:
        self._load = load
        self._in_hand = in_hand

    def collect(self) -> Iterator[GaugeMetricFamily]:
        load = self._load()
        for name, told in _GAUGES.items():
            yield GaugeMetricFamily(f"deltaw_{name}", told, getattr(load, name))
        yield GaugeMetricFamily("deltaw_in_hand", "Texts in hand, waiting or running", self._in_hand())


class Metrics:
    """Counts requests and tokens, and how long they take.

    Args:
        load: what the engine is doing. in_hand: texts that the server has taken in.
    """

    def __init__(self, load: Callable[[], EngineLoad], in_hand: Callable[[], int]) -> None:
        registry = self._registry = CollectorRegistry(auto_describe=True)
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
        registry.register(_Gauges(load, in_hand))

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

    def shown(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self._registry)


# ---- Logs as lines of JSON: one for each request, and one for each thing that goes wrong.
#
# Lines are written by a thread of their own; where their reader does not keep up, they are dropped and counted,
# rather than to wait for him. Prompts are left out unless asked for; keys never appear.


LOGGER = logging.getLogger("deltaw.serve")
# Lines that wait for the writer.
MOST_WAITING = 10_000
# Of uvicorn, told in the same way.
_OTHERS = ("uvicorn", "uvicorn.error")


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

    dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1


class RequestLog:
    """Writes the log of a server to a stream while it is open.

    Args:
        stream: such as standard error; None for no lines at all.
    """

    def __init__(self, stream: TextIO | None) -> None:
        waiting: queue.Queue[logging.LogRecord] = queue.Queue(MOST_WAITING)
        self._handler: logging.Handler = logging.NullHandler() if stream is None else _Dropping(waiting)
        self._listener: logging.handlers.QueueListener | None = None
        if stream is not None:
            shown = logging.StreamHandler(stream)
            shown.setFormatter(_Lines())
            self._listener = logging.handlers.QueueListener(waiting, shown)
        self._before: list[tuple[logging.Logger, int, bool]] = []

    def __enter__(self) -> RequestLog:
        levels = {LOGGER.name: logging.INFO} | dict.fromkeys(_OTHERS, logging.WARNING)
        for name, level in levels.items():
            logger = logging.getLogger(name)
            self._before.append((logger, logger.level, logger.propagate))
            logger.setLevel(level)
            # Children of uvicorn's logger pass their lines up to it.
            logger.propagate = name == "uvicorn.error"
            if name != "uvicorn.error":
                logger.addHandler(self._handler)
        if self._listener is not None:
            self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        for logger, level, propagate in self._before:
            logger.removeHandler(self._handler)
            logger.setLevel(level)
            logger.propagate = propagate
        if self._listener is not None:
            self._listener.stop()

    @property
    def dropped(self) -> int:
        """Lines that were not written."""
        return getattr(self._handler, "dropped", 0)


# ---- The two layers.


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
            record.ended()
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
        client = scope.get("client")
        line: dict[str, object] = {
            "event": "request",
            "id": record.id,
            "client": client[0] if client else None,
            "method": scope["method"][:16],
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
        }
        if record.model:
            first = None if record.first_token is None else round(record.first_token - record.began, 4)
            line |= {
                "model": record.model,
                "stream": record.stream,
                "prompt_tokens": record.prompt_tokens,
                "cached_tokens": record.cached_tokens,
                "completion_tokens": record.completion_tokens,
                "first_token_seconds": first,
                "finish": record.finishes,
            }
        if record.error is not None:
            line["error"] = record.error
        if record.asked is not None:
            line["asked"] = record.asked
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
        if refusal is not None:
            await error_response(refusal)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if self._check_hosts and not self._known_host(headers.get("host", "")):
            return ApiError(
                403, "the Host header names another host: start the server with --allow-host", code="wrong_host"
            )
        if self._keys and scope["path"] not in self._open:
            number = self._key_of(headers)
            if not number:
                return ApiError(
                    401, "the API key is missing or wrong: send 'Authorization: Bearer KEY'", code="invalid_api_key"
                )
            if self._apart:
                record_of(scope).owner = number
        return None

    def _known_host(self, told: str) -> bool:
        name = told.lower()
        if name.startswith("["):
            name = name.partition("]")[0] + "]"
        else:
            name = name.partition(":")[0]
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
