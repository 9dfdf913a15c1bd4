"""Run an application with uvicorn, with graceful shutdown.

On SIGTERM or Ctrl-C the server stops accepting connections and finishes pending requests. Requests that are still
running after ``shutdown_seconds`` are cancelled and receive an error.
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
from typing import TYPE_CHECKING, Any, ClassVar

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from deltaw import platforms
from deltaw.errors import UserError
from deltaw.machine.memory import share_heaps
from deltaw.serving.http.errors import ApiError
from deltaw.serving.http.settings import Limits, ServerSettings

if TYPE_CHECKING:
    from deltaw.serving.http.queue import RequestQueue

Ready = Callable[[], None]
# Seconds at shutdown for a client to read sent data.
SHUTDOWN_WRITE_SECONDS = 2.0


class _LimitedConnection(H11Protocol):
    """HTTP connection with limits on the number of connections and on slow clients.

    uvicorn waits without limit for a request's header and for a client to read. This class adds timeouts. At shutdown,
    requests with an incomplete body are rejected instead of awaited.
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
            self._reject(ApiError(503, "too many connections", code="too_many_connections", retry_after=1))
            return
        self._await_header()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._cancel_timer(self._header_timer)
            self._header_timer = None
        elif (before is None or before.response_complete) and not self.transport.is_closing():
            # First part of a header on an idle connection.
            self._await_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer(self._header_timer)
        self._cancel_timer(self._write_timer)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_timer(self._write_timer)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_reader()  # a small response does not cause pause_writing

    def shutdown(self) -> None:
        super().shutdown()
        self._write_seconds = min(self._write_seconds, SHUTDOWN_WRITE_SECONDS)
        self._await_reader()
        if self.cycle is not None and self.cycle.more_body and not self.cycle.response_started:
            self._reject(ApiError(503, "the server is shutting down", code="shutting_down"))

    def send_400_response(self, msg: str) -> None:
        self._reject(ApiError(400, "this is not an HTTP request", code="invalid_http"))

    def _await_header(self) -> None:
        if self._header_timer is None:
            late = ApiError(408, "the request's header did not arrive in time", code="timeout")
            self._header_timer = self.loop.call_later(self.limits.body_seconds, self._reject, late)

    def _await_reader(self) -> None:
        """Start the timeout for the client to read pending data."""
        self._cancel_timer(self._write_timer)
        if self.transport.get_write_buffer_size():
            self._write_timer = self.loop.call_later(self._write_seconds, self._abort_if_unread)

    def _abort_if_unread(self) -> None:
        if (self.flow.write_paused or self.cycle.response_complete) and self.transport.get_write_buffer_size():
            self.transport.abort()

    def _reject(self, error: ApiError) -> None:
        """Send an error without calling the application, and close the connection."""
        if self.transport.is_closing():
            return
        body = json.dumps(error.body).encode()
        headers = {**error.headers, "Content-Type": "application/json", "Content-Length": str(len(body))}
        lines = [f"HTTP/1.1 {error.status} Refused", *(f"{k}: {v}" for k, v in headers.items()), "Connection: close"]
        self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        self.transport.close()

    @staticmethod
    def _cancel_timer(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


# Seconds for cancelled completions to finish and their clients to be notified.
CANCEL_SECONDS = 5


def listening_socket(settings: ServerSettings) -> socket.socket:
    """Bind a socket to the server's address. Called before models are loaded, to fail early.

    Raises:
        UserError: if the address does not exist on this machine or is in use.
    """
    host = settings.host
    port = settings.port
    try:
        addresses = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = addresses[0]
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio then sets TCP_NODELAY
    except (OSError, UnicodeError) as error:
        raise UserError(f"the address {host} does not exist", location="--host", hint=str(error)) from error
    try:
        # On Windows, SO_REUSEADDR would let a second server take the same port.
        bound.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR), 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        message = f"cannot listen on {host}:{port}: {error.strerror or error}"
        raise UserError(message, location="--port", hint="use another --port, or 0 for any free port") from error
    return bound


def server_url(settings: ServerSettings, bound: socket.socket) -> str:
    """Return the URL of the server."""
    host, port = bound.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.certificate else 'http'}://{address}:{port}"


class Server(uvicorn.Server):
    """uvicorn server for one application on one socket.

    Args:
        app: The application.
        request_queue: Queue of generation requests, or None.
        settings: Settings of the server.
        ready: Called once when the server accepts requests.
    """

    def __init__(self, app: FastAPI, queue: RequestQueue | None, settings: ServerSettings, ready: Ready) -> None:
        limits = settings.limits
        options: dict[str, Any] = {"ws": "none", "lifespan": "off", "log_config": None}
        options |= dict.fromkeys(("access_log", "proxy_headers", "server_header"), False)
        options |= {"ssl_certfile": settings.certificate, "ssl_keyfile": settings.certificate_key}
        options |= {"http": type("LimitedConnection", (_LimitedConnection,), {"limits": limits})}
        wait = int(limits.shutdown_seconds) + CANCEL_SECONDS
        options |= {"timeout_keep_alive": limits.keep_alive, "timeout_graceful_shutdown": wait}
        super().__init__(uvicorn.Config(app, **options))
        self._queue = queue
        self._seconds = limits.shutdown_seconds
        self._ready = ready
        self.interrupted = False
        self._signals = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish pending requests, and cancel those that take too long."""
        timer = None
        if self._queue is not None:
            self._queue.reject_new()
            timer = asyncio.get_running_loop().call_later(self._seconds, self._queue.cancel_all)
        await super().shutdown(sockets)
        if timer is not None:
            timer.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle stop signals while the context is active."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {sig: signal.signal(sig, self.handle_exit) for sig in platforms.stop_signals()}
        try:
            yield
        finally:
            for sig, handler in previous.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal. The first rejects new requests, the second cancels pending ones, and the third exits
        immediately.
        """
        self._signals += 1
        self.interrupted = self.interrupted or sig == signal.SIGINT
        self.should_exit = True
        if self._queue is not None:
            self._queue.closing = True
            if self._signals == 2 and self._loop is not None:
                self._loop.call_soon_threadsafe(self._queue.cancel_all)
        self.force_exit = self._signals > 2


def run(app: FastAPI, queue: RequestQueue | None, settings: ServerSettings, bound: socket.socket, ready: Ready) -> bool:
    """Serve until a signal arrives.

    Returns:
        True if the server was interrupted from the keyboard.
    """
    server = Server(app, queue, settings, ready)
    share_heaps()
    # Exclude loaded objects from garbage collection, because they live until the process exits.
    gc.collect()
    gc.freeze()
    server.run([bound])
    return server.interrupted
