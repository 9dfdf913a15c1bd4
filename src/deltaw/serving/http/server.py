"""Runs an application with uvicorn until it is told to stop, and then lets its texts end.

At SIGTERM or Ctrl-C no connection is accepted any more, and texts in hand are written to their end; what is
still open after ``shutdown_seconds`` is cancelled, and told so.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, ClassVar

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from deltaw import platforms
from deltaw.errors import UserError
from deltaw.machine.memory import share_heaps
from deltaw.serving.http.errors import ApiError
from deltaw.serving.http.preparing import Desk
from deltaw.serving.http.settings import Limits, ServerSettings

# At shutdown, seconds for a client to read what was written for it.
LAST_SECONDS = 2.0


class _LimitedConnection(H11Protocol):
    """Ends connections whose clients are too slow, or too many, which uvicorn's own protocol leaves open.

    uvicorn waits without limit for a request's header, and for a client to read. Each of the two gets a time
    here. At shutdown it waits for bodies too; here they are refused.
    """

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
            late = ApiError(408, "the request's header did not arrive in time", code="timeout")
            self._header_timer = self.loop.call_later(self.limits.body_seconds, self._refuse, late)

    def _await_reader(self) -> None:
        """Give a client its time to read what waits for it."""
        self._stop(self._write_timer)
        if self.transport.get_write_buffer_size():
            self._write_timer = self.loop.call_later(self._write_seconds, self._not_read)

    def _not_read(self) -> None:
        waits = self.flow.write_paused or self.cycle.response_complete
        if waits and self.transport.get_write_buffer_size():
            self.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        """Answer without the application, and close."""
        if self.transport.is_closing():
            return
        body = json.dumps(error.body).encode()
        headers = {**error.headers, "Content-Type": "application/json", "Content-Length": str(len(body))}
        lines = [f"HTTP/1.1 {error.status} Refused", *(f"{k}: {v}" for k, v in headers.items()), "Connection: close"]
        self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        self.transport.close()

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


# Seconds for cancelled texts to end, and their clients to be told.
LAST = 5


def listening_socket(settings: ServerSettings) -> socket.socket:
    """A socket on the server's address, taken before anything long begins.

    Raises:
        UserError: the address is not this machine's, or taken.
    """
    host, port = settings.host, settings.port
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio tells by it to send at once
    except (OSError, UnicodeError) as error:
        raise UserError(f"there is no address {host}", where="--host", hint=str(error)) from error
    try:
        # On Windows, SO_REUSEADDR would let a second server take the same port.
        made.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR), 1)
        made.bind(address)
    except OSError as error:
        made.close()
        what = f"{host}:{port} cannot be listened on: {error.strerror or error}"
        raise UserError(what, where="--port", hint="give another --port, or 0 for any free one") from error
    return made


def url_of(settings: ServerSettings, bound: socket.socket) -> str:
    """Where clients find the server."""
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.certificate else 'http'}://{shown}:{port}"


class Server(uvicorn.Server):
    """One application on one socket.

    Args:
        ready: called once when requests are taken.
    """

    def __init__(self, app: FastAPI, desk: Desk | None, settings: ServerSettings, ready: Callable[[], None]) -> None:
        limits = settings.limits
        how: dict[str, Any] = {"ws": "none", "lifespan": "off", "log_config": None}
        how |= dict.fromkeys(("access_log", "proxy_headers", "server_header"), False)
        how |= {"ssl_certfile": settings.certificate, "ssl_keyfile": settings.certificate_key}
        how |= {"http": type("LimitedConnection", (_LimitedConnection,), {"limits": limits})}
        wait = int(limits.shutdown_seconds) + LAST
        how |= {"timeout_keep_alive": limits.keep_alive, "timeout_graceful_shutdown": wait}
        super().__init__(uvicorn.Config(app, **how))
        self._desk, self._seconds, self._ready = desk, limits.shutdown_seconds, ready
        self.interrupted, self._signals = False, 0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let texts end, and cancel those that take too long."""
        timer = None
        if self._desk is not None:
            self._desk.turn_away()
            timer = asyncio.get_running_loop().call_later(self._seconds, self._desk.cancel_all)
        await super().shutdown(sockets)
        if timer is not None:
            timer.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """While open, signals end the server in good order, and nothing else."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in platforms.stop_signals()}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came: no new texts; at the second, none that are in hand; at the third, no waiting."""
        self._signals += 1
        self.interrupted = self.interrupted or sig == signal.SIGINT
        self.should_exit = True
        if self._desk is not None:
            self._desk.closing = True
            if self._signals == 2 and self._loop is not None:
                self._loop.call_soon_threadsafe(self._desk.cancel_all)
        self.force_exit = self._signals > 2


def run(
    app: FastAPI, desk: Desk | None, settings: ServerSettings, bound: socket.socket, ready: Callable[[], None]
) -> bool:
    """Serve until a signal comes.

    Returns:
        whether it was an interruption from the keyboard.
    """
    server = Server(app, desk, settings, ready)
    share_heaps()
    # What has been loaded stays to the end: the garbage collector need not look through it again and again.
    gc.collect()
    gc.freeze()
    server.run([bound])
    return server.interrupted
