"""Pages, parts of pages and forms."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from urllib.parse import parse_qsl

from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from deltaw.errors import UserError
from deltaw.hub import packages
from deltaw.hub.app_stores import LM_STUDIO, OLLAMA
from deltaw.reports.svg import templates
from deltaw.reports.tables import count, duration, format_time, gigabytes, metric_name, metric_value, short

MAX_FORM_BYTES = 2**20
MAX_FIELDS = 500
# Addresses and names of the navigation.
NAVIGATION = {"/": "Start", "/jobs": "Jobs", "/runs": "Results"}


@functools.lru_cache(maxsize=1)
def environment() -> Environment:
    """Return the environment of the studio's templates. They may also import the templates of reports."""
    reports = templates()[0]
    assert reports.loader is not None
    loader = ChoiceLoader([PackageLoader("deltaw.studio"), reports.loader])
    result = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    result.globals |= reports.globals
    filters = (count, duration, format_time, gigabytes, metric_name, metric_value, model_name, short)
    result.filters |= {f.__name__: f for f in filters}
    return result


def model_name(reference: str) -> str:
    """Return the short name of a model, without its owner, its version and its path."""
    name = reference.removeprefix(packages.SCHEME).partition("==")[0].rstrip("/").rpartition("/")[2]
    return name.removeprefix(OLLAMA).removeprefix(LM_STUDIO)


def page(request: Request, template: str, *, status: int = 200, **values: object) -> HTMLResponse:
    """Return a page with the navigation."""
    num_jobs = len(request.app.state.studio.queue.active())
    frame = {"address": request.url.path, "navigation": NAVIGATION, "num_jobs": num_jobs}
    return HTMLResponse(environment().get_template(template).render(frame | values), status)


def part(template: str, *, status: int = 200, **values: object) -> HTMLResponse:
    """Return a part of a page, without the navigation. A status of 202 means that the client asks again."""
    return HTMLResponse(environment().get_template(template).render(values), status)


def error_part(error: UserError) -> HTMLResponse:
    """Return an error as a part of a page."""
    return part("error_part.html", error=error)


def error_response(request: Request, error: UserError, status: int = 400) -> Response:
    """Return an error as a page, or as JSON for scripts."""
    if wants_json(request):
        values: Mapping[str, object] = {"message": error.message, "location": error.location, "hint": error.hint}
        return JSONResponse({"error": values}, status)
    return page(request, "error.html", status=status, error=error)


async def form(request: Request) -> dict[str, list[str]]:
    """Return the fields of a form.

    Raises:
        UserError: if the form is too large or malformed.
    """
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM_BYTES:
            raise UserError("the form is too large")
    try:
        pairs = parse_qsl(body.decode("utf-8"), keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="strict")
    except ValueError as error:
        raise UserError("the form is malformed") from error
    fields: dict[str, list[str]] = {}
    for name, value in pairs:
        fields.setdefault(name, []).append(value)
    return fields


def wants_json(request: Request) -> bool:
    """Return True if the client is a script."""
    return "application/json" in request.headers.get("accept", "")
