"""Access to the studio: a session cookie obtained with a single-use token, checks of host and origin, and headers."""

from __future__ import annotations

import hmac
import secrets
import traceback
from collections.abc import Callable
from pathlib import Path

from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltaw.atomic_files import write_text
from deltaw.errors import UserError
from deltaw.serving.http.guard import SECURITY_HEADERS
from deltaw.serving.http.settings import MIN_KEY_LENGTH, ServerSettings, known_host
from deltaw.studio.rendering import error_response

COOKIE_SECONDS = 30 * 24 * 3600
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "frame-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
# Default headers of every response. Browsers send "Origin: null" with forms if the referrer policy is no-referrer.
HEADERS = SECURITY_HEADERS | {"Content-Security-Policy": _POLICY, "Referrer-Policy": "same-origin"}


class Token:
    """Token in the address that opens the studio in a browser. Each token can be used once.

    Args:
        announce: Called with a new token when the last used one is opened again.

    Attributes:
        value: Current token, or '' if it was used.
    """

    def __init__(self, announce: Callable[[str], None]) -> None:
        self._announce = announce
        self._used = ""
        self.value = secrets.token_urlsafe(32)

    def use(self, text: str) -> bool:
        """Return True if a token is valid. Announce a new one if the token is the last one that was used."""
        if self.value and hmac.compare_digest(text.encode(), self.value.encode()):
            self._used = self.value
            self.value = ""
            return True
        if self._used and not self.value and hmac.compare_digest(text.encode(), self._used.encode()):
            self.value = secrets.token_urlsafe(32)
            self._announce(self.value)
        return False


def session_secret(folder: Path) -> str:
    """Return the secret of the cookie, which is stored in a file, so that open pages survive a restart."""
    file = folder / "session"
    secret = file.read_text(encoding="ascii") if file.is_file() else ""
    if len(secret) < MIN_KEY_LENGTH:
        secret = secrets.token_urlsafe(32)
        write_text(file, secret)
        file.chmod(0o600)
    return secret


class SessionGuard:
    """Middleware that checks host, origin and cookie, and sets headers.

    Args:
        app: The application.
        settings: Address of the server. ``port`` is the bound port.
        token: Token that sets the cookie.
        secret: Value of the cookie.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, token: Token, secret: str) -> None:
        self._app = app
        self._settings = settings
        self._token = token
        self._secret = secret
        self._cookie = f"deltaw-studio-{settings.port}"
        self._hosts = frozenset(name.lower() for name in (settings.host, *settings.hosts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request (ASGI application)."""
        if scope["type"] != "http":
            return
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        request = Request(scope, receive)
        try:
            await (self._guard_response(request) or self._app)(scope, receive, send_with_headers)
        except ClientDisconnect:
            pass
        except Exception:
            traceback.print_exc()
            if not started:
                error = UserError("something went wrong", hint="the terminal shows the details")
                await error_response(request, error, 500)(scope, receive, send_with_headers)

    def _guard_response(self, request: Request) -> Response | None:
        """Return a rejection or a redirect, or None if the application handles the request."""
        # Host is part of url in older Starlette
        path = request.scope["path"]
        host = request.headers.get("host", "")
        if not known_host(host, self._hosts):
            hint = "start the studio with --allow-host NAME"
            return error_response(
                request, UserError("this address is not allowed", location=host[:200], hint=hint), 403
            )
        if path.startswith("/static/"):
            return None
        is_read = request.method in ("GET", "HEAD")
        if not (_is_permitted_read(request) if is_read else _is_same_origin(request)):
            return error_response(request, UserError("another page sent this request"), 403)
        if self._has_cookie(request):
            return RedirectResponse("/", 303) if "token" in request.query_params and path == "/" else None
        hint = "open the address that the terminal shows, or start deltaw studio again"
        token = request.query_params.get("token", "")
        if path != "/" or not token or request.method != "GET":
            return error_response(request, UserError("this browser is not connected to the studio", hint=hint), 401)
        if not self._token.use(token):
            message = "this address was used before, or it is wrong"
            hint = "open the new address that the terminal shows, or start deltaw studio again"
            return error_response(request, UserError(message, hint=hint), 403)
        # Browsers do not send the cookie with a redirect if another site or a file opened the address.
        response = HTMLResponse('<!doctype html><meta http-equiv="refresh" content="0; url=/">')
        is_secure = self._settings.certificate is not None
        options = {"httponly": True, "samesite": "strict", "secure": is_secure, "max_age": COOKIE_SECONDS}
        response.set_cookie(self._cookie, self._secret, **options)  # type: ignore[arg-type]
        return response

    def _has_cookie(self, request: Request) -> bool:
        value = request.cookies.get(self._cookie, "")
        return hmac.compare_digest(value.encode("utf-8", "replace"), self._secret.encode())


def _is_permitted_read(request: Request) -> bool:
    """Return False if a page of another site or port fetches or embeds the address. Links are permitted."""
    headers = request.headers
    is_foreign = headers.get("sec-fetch-site") in ("same-site", "cross-site")
    return not is_foreign or (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")


def _is_same_origin(request: Request) -> bool:
    headers = request.headers
    origin = headers.get("origin", "")
    site = headers.get("sec-fetch-site", "same-origin")
    return origin == f"{request.scope['scheme']}://{headers.get('host', '')}" and site == "same-origin"
