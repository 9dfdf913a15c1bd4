"""The two layers around all routes: one that sees every request's end, and one that lets in who may ask.

Plain ASGI, so that streams pass through without being held up.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltaw.host.memory import trim_memory
from deltaw.serving.http.body import LARGE
from deltaw.serving.http.errors import GONE, ApiError, error_response
from deltaw.serving.http.logs import LOGGER
from deltaw.serving.http.metrics import Metrics
from deltaw.serving.http.record import FAILURE, KEY, Bodies, Record, record_of
from deltaw.serving.http.settings import ServerSettings, is_loopback

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
                403,
                "the Host header names another host: start the server with --allow-host",
                code="wrong_host",
            )
        if self._keys and scope["path"] not in self._open:
            number = self._key_of(headers)
            if not number:
                return ApiError(
                    401,
                    "the API key is missing or wrong: send 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
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
