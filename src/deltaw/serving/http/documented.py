"""What the OpenAPI schema says of answers: the statuses that routes give, and the error object."""

from __future__ import annotations

from typing import Any

ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
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
    return {
        200: {"description": description, "content": {kind: {} for kind in kinds or ("application/json",)}}
    }


# Of the routes that write text.
ANSWERS = answer("The text, at once or in events", "application/json", "text/event-stream") | refusals(*_TOLD)
# Of the routes that only tell.
TOLD = refusals(400, 401, 403, 503)
