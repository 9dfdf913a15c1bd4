"""Connections that end when their clients are too slow, or too many: what uvicorn's own protocol leaves open.

uvicorn waits without limit for a request's header, and for a client to read. Each of the two gets a time
here. At shutdown it waits for bodies too; here they are refused.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from deltaw.serving.http.errors import ApiError
from deltaw.serving.http.settings import Limits

# At shutdown, seconds for a client to read what was written for it.
LAST_SECONDS = 2.0


def protocol_of(limits: Limits) -> type[asyncio.Protocol]:
    """uvicorn's protocol with these limits."""
    return type("LimitedConnection", (_LimitedConnection,), {"limits": limits})


class _LimitedConnection(H11Protocol):
    limits: ClassVar[Limits]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._write_seconds = self.limits.write_seconds

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse(ApiError(503, "too many connections", code="too_many_connections", retry_after=1))
            return
        self._await_header()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._stop(self._header_timer)
            self._header_timer = None
        elif (before is None or before.response_complete) and not self.transport.is_closing():
            # The first part of a header, on a connection that was idle.
            self._await_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self._header_timer)
        self._stop(self._write_timer)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop(self._write_timer)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_reader()  # what is written may be too little for writing to pause

    def shutdown(self) -> None:
        super().shutdown()
        self._write_seconds = min(self._write_seconds, LAST_SECONDS)
        self._await_reader()
        if self.cycle is not None and self.cycle.more_body and not self.cycle.response_started:
            self._refuse(ApiError(503, "the server is shutting down", code="shutting_down"))

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "this is no HTTP request", code="invalid_http"))

    def _await_header(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self.limits.body_seconds, self._too_slow)

    def _await_reader(self) -> None:
        """Give a client its time to read what waits for it."""
        self._stop(self._write_timer)
        if self.transport.get_write_buffer_size():
            self._write_timer = self.loop.call_later(self._write_seconds, self._not_read)

    def _not_read(self) -> None:
        waits = self.flow.write_paused or self.cycle.response_complete
        if waits and self.transport.get_write_buffer_size():
            self.transport.abort()

    def _too_slow(self) -> None:
        self._refuse(ApiError(408, "the request's header did not arrive in time", code="timeout"))

    def _refuse(self, error: ApiError) -> None:
        """Answer without the application, and close."""
        if self.transport.is_closing():
            return
        body = json.dumps(error.body).encode()
        headers = {**error.headers, "Content-Type": "application/json", "Content-Length": str(len(body))}
        lines = [
            f"HTTP/1.1 {error.status} Refused",
            *(f"{k}: {v}" for k, v in headers.items()),
            "Connection: close",
        ]
        self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        self.transport.close()

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()
