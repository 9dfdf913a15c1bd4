"""Runs an application with uvicorn until it is told to stop, and then lets its texts end.

At SIGTERM or Ctrl-C no connection is accepted any more, and texts in hand are written to their end; what is
still open after ``shutdown_seconds`` is cancelled, and told so.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from deltaw.errors import UserError
from deltaw.host.memory import share_heaps
from deltaw.serving.http.connection import protocol_of
from deltaw.serving.http.settings import ServerSettings
from deltaw.serving.http.texts import Desk

# Seconds for cancelled texts to end, and their clients to be told.
LAST = 5


def listening_socket(settings: ServerSettings) -> socket.socket:
    """A socket on the server's address, taken before anything long begins.

    Raises:
        UserError: the address is not this machine's, or taken.
    """
    try:
        found = socket.getaddrinfo(
            settings.host.strip("[]"), settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = found[0]
        made = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"there is no address {settings.host}", where="--host", hint=str(error)) from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise UserError(
            f"{settings.host}:{settings.port} cannot be listened on: {error.strerror or error}",
            where="--port",
            hint="give another --port, or 0 for any free one",
        ) from error
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

    def __init__(
        self, app: FastAPI, desk: Desk | None, settings: ServerSettings, ready: Callable[[], None]
    ) -> None:
        limits = settings.limits
        config = uvicorn.Config(
            app,
            http=protocol_of(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=limits.keep_alive,
            timeout_graceful_shutdown=int(limits.shutdown_seconds) + LAST,
            ssl_certfile=settings.certificate,
            ssl_keyfile=settings.certificate_key,
        )
        super().__init__(config)
        self._desk = desk
        self._seconds = limits.shutdown_seconds
        self._ready = ready
        self.interrupted = False
        self._signals = 0
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
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
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
    app: FastAPI,
    desk: Desk | None,
    settings: ServerSettings,
    bound: socket.socket,
    ready: Callable[[], None],
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
