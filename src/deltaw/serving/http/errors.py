"""Refusals as the OpenAI API words them: ``{"error": {"message", "type", "param", "code"}}`` with a status.

Knows statuses and their words; not what was asked.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from deltaw.errors import UserError, nearest
from deltaw.serving.request import BusyError, UnknownAdapterError, UnsupportedError

# Types of errors as clients know them; other 4xx are "invalid_request_error", other 5xx "server_error".
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# A client went away before its answer: in logs and metrics only, since nobody reads it.
GONE = 499
_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
# What a UserError of each class becomes; any other is a 400.
_REFUSED: dict[type[UserError], tuple[int, str]] = {
    UnknownAdapterError: (404, "model_not_found"),  # it was removed after the request came
    UnsupportedError: (501, "not_supported"),
    BusyError: (429, "busy"),
}


class ApiError(Exception):
    """A request that gets no answer.

    Args:
        status: of HTTP. message: what is wrong, and what helps.
        param: the field that it concerns, as ``messages.0.content``.
        code: a word for programs; of a 400, "invalid_value" if none is given.
        retry_after: seconds after which asking again may help.
        close: whether the connection ends with the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = "invalid_value" if code is None and status == 400 else code
        self.headers: dict[str, str] = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"
        if close:
            self.headers["Connection"] = "close"

    @property
    def body(self) -> dict[str, object]:
        """The error object."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refused(error: UserError, *, param: str | None = None) -> ApiError:
    """A user's mistake that code below HTTP found."""
    text = f"{error.what} ({error.where})" if error.where else error.what
    text = f"{text}: {error.hint}" if error.hint else text
    status, code = _REFUSED.get(type(error), (400, None))
    param = "model" if status == 404 else param
    return ApiError(status, text, param=param, code=code, retry_after=1 if status == 429 else None)


def no_model(name: str) -> ApiError:
    """The error of a name that no model has."""
    message = f"there is no model '{name[:128]}': /v1/models lists those there are"
    return ApiError(404, message, param="model", code="model_not_found")


@contextlib.contextmanager
def concerning(param: str) -> Iterator[None]:
    """While open, a user's mistake is one in this field of the request."""
    try:
        yield
    except UserError as error:
        raise refused(error, param=param) from error


def wrong_field(error: ValidationError, known: Mapping[str, object]) -> ApiError:
    """The first mistake that the check of a request's fields found."""
    first = error.errors(include_url=False, include_input=False)[0]
    # Members of unions add names of types to the place; fields have plain names.
    parts = [str(part) for part in first["loc"] if str(part).isdecimal() or str(part).isidentifier()]
    param = ".".join(parts) or first.get("ctx", {}).get("param")
    kind, message = first["type"], str(first["msg"])
    if kind == "extra_forbidden":
        name = str(first["loc"][-1])[:80]
        near = nearest(name, known, 1)
        message = f"unknown field '{name}'" + (f": did you mean '{near[0]}'?" if near else "")
    elif kind == "missing":
        message = f"the field '{param}' is missing"
    elif param and param not in message:
        message = f"'{param}': {message[:500]}"
    code = _CODES.get(kind, "invalid_type" if kind.endswith("_type") else "invalid_value")
    return ApiError(400, message, param=param[:200] if param else None, code=code)


def json_response(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response with a JSON body."""
    return Response(as_json(body), status, dict(headers or {}), "application/json")


def as_json(value: object) -> bytes:
    """A value as JSON; it must hold no NaN."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def error_response(error: ApiError) -> Response:
    """The response that says what is wrong."""
    return json_response(error.body, error.status, error.headers)


async def on_error(request: Request, error: Exception) -> Response:
    """FastAPI's way to answer a refusal, a user's mistake from below, and paths and methods that there are not."""
    if isinstance(error, UserError):
        error = refused(error)
    elif isinstance(error, HTTPException):
        path = request.url.path[:200]
        told = {
            404: f"there is no {path}; the routes are listed in /openapi.json",
            405: f"{request.method} is not possible on {path}",
        }
        headers = error.headers or {}
        error = ApiError(error.status_code, told.get(error.status_code, str(error.detail)))
        error.headers.update(headers)
    assert isinstance(error, ApiError)
    return error_response(error)


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


# What the OpenAPI schema says of answers: the error object, and the statuses that routes give.
_KINDS = {"message": "string", "type": "string", "param": ["string", "null"], "code": ["string", "null"]}
ERROR = _object({"error": _object({name: {"type": kind} for name, kind in _KINDS.items()})})
_TOLD = {
    400: "The request is not understood, or a value is out of range",
    401: "The API key is missing or wrong",
    403: "The request came by a name or from a place that may not ask",
    404: "There is no such model",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The body is not application/json",
    429: "Too many texts are in hand, or constraints compiled: ask again after Retry-After",
    500: "A fault of the server",
    501: "The model or this installation cannot do what is asked",
    503: "The server is shutting down",
    504: "The text was not finished in time",
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The answers with an error object that a route may give."""
    content = {"application/json": {"schema": ERROR}}
    return {status: {"description": _TOLD[status], "content": content} for status in statuses}


def answer(description: str, *kinds: str) -> dict[int | str, dict[str, Any]]:
    """The answer of a request that succeeds, by its media types."""
    return {200: {"description": description, "content": {kind: {} for kind in kinds or ("application/json",)}}}


# Of the routes that write text.
ANSWERS = answer("The text, at once or in events", "application/json", "text/event-stream") | refusals(*_TOLD)
# Of the routes that only tell.
TOLD = refusals(400, 401, 403, 503)
