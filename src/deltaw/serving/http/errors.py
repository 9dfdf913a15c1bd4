"""Errors in the format of the OpenAI API: ``{"error": {"message", "type", "param", "code"}}`` with an HTTP status."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from deltaw.decoding.request import BusyError, UnknownAdapterError, UnsupportedError
from deltaw.errors import UserError, nearest
from deltaw.settings.expectations import expectation

# Error types of the OpenAI API. Other 4xx are "invalid_request_error", other 5xx "server_error".
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# The client disconnected before the response. Used only in logs and metrics.
CLIENT_CLOSED_REQUEST = 499
_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
# Status and code by subclass of UserError. Other UserErrors are a 400.
_USER_ERRORS: dict[type[UserError], tuple[int, str]] = {
    UnknownAdapterError: (404, "model_not_found"),  # removed after the request was validated
    UnsupportedError: (501, "not_supported"),
    BusyError: (429, "busy"),
}


class ApiError(Exception):
    """Error response to a request.

    Args:
        status: HTTP status.
        message: Description of the error and its solution.
        param: Field that caused the error, for example ``messages.0.content``.
        code: Machine-readable code. "invalid_value" by default for status 400.
        retry_after: Seconds after which a retry may succeed.
        close: Close the connection after the response.
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
        self.status = status
        self.message = message
        self.param = param
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


def to_api_error(error: UserError, *, param: str | None = None) -> ApiError:
    """Convert a UserError to an API error."""
    text = f"{error.message} ({error.location})" if error.location else error.message
    text = f"{text}: {error.hint}" if error.hint else text
    status, code = _USER_ERRORS.get(type(error), (400, None))
    param = "model" if status == 404 else param
    return ApiError(status, text, param=param, code=code, retry_after=1 if status == 429 else None)


def unknown_model_error(name: str) -> ApiError:
    """Return the error for an unknown model name."""
    message = f"there is no model '{name[:128]}': /v1/models lists the available models"
    return ApiError(404, message, param="model", code="model_not_found")


@contextlib.contextmanager
def blame_field(param: str) -> Iterator[None]:
    """Convert UserErrors inside the context to API errors of this request field."""
    try:
        yield
    except UserError as error:
        raise to_api_error(error, param=param) from error


def validation_error(error: ValidationError, fields: Mapping[str, object]) -> ApiError:
    """Convert the first validation error of a request body."""
    errors = error.errors(include_url=False, include_input=False)
    first = next((other for other in errors if other["type"] == "union_tag_invalid"), errors[0])
    # Pydantic adds type names of union members to the location. Field names are identifiers.
    parts = [str(part) for part in first["loc"] if str(part).isdecimal() or str(part).isidentifier()]
    param = ".".join(parts) or first.get("ctx", {}).get("param")
    kind = first["type"]
    message = str(first["msg"])
    if kind == "extra_forbidden":
        name = str(first["loc"][-1])[:80]
        suggestions = nearest(name, fields, 1)
        message = f"unknown field '{name}'" + (f": did you mean '{suggestions[0]}'?" if suggestions else "")
    elif kind == "union_tag_invalid":
        message = f"'{param}': '{first['ctx']['tag'][:80]}' is not supported: use {first['ctx']['expected_tags']}"
    elif kind == "missing":
        message = f"the field '{param}' is missing"
    elif param and (phrase := expectation(message)) is not None:
        message = f"'{param}' should {phrase[:500]}"
    elif param and param not in message:
        message = f"'{param}': {message[:500]}"
    code = _CODES.get(kind, "invalid_type" if kind.endswith("_type") else "invalid_value")
    return ApiError(400, message, param=param[:200] if param else None, code=code)


def json_response(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response with a JSON body."""
    return Response(as_json(body), status, dict(headers or {}), "application/json")


def as_json(value: object) -> bytes:
    """Serialize a value as JSON. NaN is not allowed."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def error_response(error: ApiError) -> Response:
    """Return the response for an error."""
    return json_response(error.body, error.status, error.headers)


async def on_error(request: Request, error: Exception) -> Response:
    """Exception handler of FastAPI: API errors, UserErrors, and unknown paths and methods."""
    if isinstance(error, UserError):
        error = to_api_error(error)
    elif isinstance(error, HTTPException):
        path = request.url.path[:200]
        messages = {404: f"no route {path}; see /openapi.json", 405: f"{request.method} is not allowed on {path}"}
        headers = error.headers or {}
        error = ApiError(error.status_code, messages.get(error.status_code, str(error.detail)))
        error.headers.update(headers)
    assert isinstance(error, ApiError)
    return error_response(error)


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


# OpenAPI schema of responses: the error object and the statuses of the routes.
_KINDS = {"message": "string", "type": "string", "param": ["string", "null"], "code": ["string", "null"]}
ERROR = _object({"error": _object({name: {"type": kind} for name, kind in _KINDS.items()})})
_DESCRIPTIONS = {
    400: "The request is malformed, or a value is out of range",
    401: "The API key is missing or wrong",
    403: "The host or origin of the request is not allowed",
    404: "The model does not exist",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The body is not application/json",
    429: "Too many pending requests or constraints: retry after the time in Retry-After",
    500: "Internal server error",
    501: "The model or this installation does not support the request",
    503: "The server is shutting down",
    504: "The text was not finished in time",
}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of error responses with these statuses."""
    content = {"application/json": {"schema": ERROR}}
    return {status: {"description": _DESCRIPTIONS[status], "content": content} for status in statuses}


def success_response(description: str, *kinds: str) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of a successful response with these media types."""
    return {200: {"description": description, "content": {kind: {} for kind in kinds or ("application/json",)}}}


# Responses of routes that generate text.
_COMPLETION = success_response("The completion, or a stream of events", "application/json", "text/event-stream")
GENERATION_RESPONSES = _COMPLETION | error_responses(*_DESCRIPTIONS)
# Error responses of informational routes.
COMMON_REFUSALS = error_responses(400, 401, 403, 503)
