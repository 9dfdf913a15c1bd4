"""A request's body becomes checked values: read within bounds of size and time, parsed, and validated.

Nothing is parsed before all of it has arrived within its bounds. Knows JSON and pydantic; not what the fields
mean.
"""

from __future__ import annotations

import asyncio
import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from deltaw.serving.http.errors import GONE, ApiError, wrong_field
from deltaw.serving.http.record import record_of
from deltaw.serving.http.settings import Limits

Model = TypeVar("Model", bound=BaseModel)
_ONE_THREAD = ThreadPoolExecutor(1, "deltaw-parse")
# Bytes from which on parsing would keep the event loop from other requests.
LARGE = 64 << 10
# Those that keep it from them in any thread, by Python's lock: they are parsed one after another.
HUGE = 1 << 20
# Keys of one object: each that is wrong is an error of its own, which takes a kilobyte.
MOST_KEYS = 4096


async def read_json(request: Request, model: type[Model], limits: Limits) -> Model:
    """The body of a request as the fields of ``model``.

    Raises:
        ApiError: 400 it is not JSON, or not these fields; 408 it did not arrive in time; 413 it is too large;
            415 it does not say that it is JSON, so that no other site's form can send it.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send the header 'Content-Type: application/json'", code="unsupported_media_type")
    body = await read_body(request, limits)
    if len(body) < LARGE:
        return _checked(body, model, limits)
    threads = _ONE_THREAD if len(body) > HUGE else None
    return await asyncio.get_running_loop().run_in_executor(threads, _checked, body, model, limits)


async def read_body(request: Request, limits: Limits) -> bytes:
    """All bytes of a body.

    Raises:
        ApiError: 408, 413, or 429 where those of all requests together are too large.
    """
    told = request.headers.get("content-length", "0")
    too_large = ApiError(413, f"the body has more than {limits.body:,} bytes", code="request_too_large")
    too_many = ApiError(429, "too many requests are arriving", code="busy", retry_after=1)
    for error in (too_large, too_many):
        error.headers["Connection"] = "close"
    if told.isdecimal() and (len(told) > 18 or int(told) > limits.body):
        raise too_large

    async def arrived() -> bytes:
        parts: list[bytes] = []
        record = record_of(request.scope)
        async for part in request.stream():
            record.arrived(len(part))
            if record.body > limits.body:
                raise too_large
            if record.bodies.bytes > max(limits.bodies, limits.body):
                raise too_many
            parts.append(part)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(arrived(), limits.body_seconds)
    except ClientDisconnect:
        record_of(request.scope).gone = True
        raise ApiError(GONE, "the client went away in its body", code="cancelled") from None
    except asyncio.TimeoutError:
        late = ApiError(408, f"the body did not arrive within {limits.body_seconds:g} s", code="timeout")
        late.headers["Connection"] = "close"
        raise late from None


def parse(body: bytes, limits: Limits) -> Any:
    """JSON as values, without NaN, without halves of surrogate pairs, and not deeper than allowed.

    Raises:
        ApiError: 400.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except RecursionError:
        raise _too_deep(limits) from None
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}"[:300], code="invalid_json") from None
    _check(value, limits)
    return value


def described(model: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI says of a body: for FastAPI's ``openapi_extra``."""
    schema = _inlined(model.model_json_schema())
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _checked(body: bytes, model: type[Model], limits: Limits) -> Model:
    value = parse(body, limits)
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_type")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise wrong_field(error, model.model_fields) from None


def _check(value: Any, limits: Limits) -> None:
    """Refuse what is too deep, or has text that cannot be written as UTF-8."""
    level = [value]
    for _ in range(limits.depth + 1):
        below: list[Any] = []
        for part in level:
            if isinstance(part, str):
                if not part.isascii() and not _is_text(part):
                    raise ApiError(400, "a text holds half of a surrogate pair", code="invalid_value")
            elif isinstance(part, float):
                if not math.isfinite(part):
                    raise ApiError(400, "a number is too large", code="invalid_value")
            elif isinstance(part, dict):
                if len(part) > MOST_KEYS:
                    raise ApiError(400, f"an object has more than {MOST_KEYS:,} keys", code="invalid_value")
                below += part.keys()
                below += part.values()
            elif isinstance(part, list):
                below += part
        if not below:
            return
        level = below
    raise _too_deep(limits)


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _too_deep(limits: Limits) -> ApiError:
    return ApiError(400, f"the JSON is nested more than {limits.depth} deep", code="invalid_json")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with its definitions where they are used, since a body has no place for them in OpenAPI."""
    definitions = schema.pop("$defs", {})

    def put(part: Any) -> Any:
        if isinstance(part, list):
            return [put(p) for p in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            beside = {key: value for key, value in part.items() if key != "$ref"}
            return put({**definitions[part["$ref"].rpartition("/")[2]], **beside})
        return {key: put(value) for key, value in part.items()}

    inlined: dict[str, Any] = put(schema)
    return inlined
