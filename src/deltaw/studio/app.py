"""Application of the studio: routes, error pages, static files and the start page."""

from __future__ import annotations

import asyncio
import errno
import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException

from deltaw.errors import UserError
from deltaw.reports.svg import templates
from deltaw.serving.http.settings import ServerSettings
from deltaw.studio import data, live, models, runs, spreadsheets, try_page
from deltaw.studio import settings as settings_pages
from deltaw.studio.guard import SessionGuard, Token, session_secret
from deltaw.studio.rendering import error_response, form, page
from deltaw.studio.state import Studio
from deltaw.studio.workspace import TooLargeError

# Number of runs on the start page.
MAX_RUNS = 5


def create_app(studio: Studio, settings: ServerSettings, token: Token) -> FastAPI:
    """Create the application.

    Args:
        studio: Folder and processes.
        settings: Address of the server. ``port`` is the bound port.
        token: Token that opens the studio in a browser.
    """
    app = FastAPI(openapi_url=None)
    app.state.studio = studio
    app.include_router(router(studio))
    for module in (data, models, settings_pages, live, runs, try_page):
        app.include_router(module.router(studio))
    for kind in (UserError, OSError, HTTPException):
        app.add_exception_handler(kind, _on_error)
    secret = session_secret(studio.workspace.state)
    app.add_middleware(SessionGuard, settings=settings, token=token, secret=secret)
    return app


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        message = "this page does not exist" if error.status_code == 404 else "this request is not allowed here"
        return error_response(request, UserError(message), error.status_code)
    if isinstance(error, OSError):
        if error.errno != errno.ENOSPC:
            raise error
        error = UserError("the disk is full", hint="delete files that you do not need, and try again")
    assert isinstance(error, UserError)
    shown = request.app.state.studio.workspace.shorten(error)
    return error_response(request, shown, 413 if isinstance(error, TooLargeError) else 400)


def router(studio: Studio) -> APIRouter:
    """Return the routes of the start page and of static files."""
    routes = APIRouter()
    workspace = studio.workspace
    static = _static_files()

    def draft_of(file: Path, is_upload: bool = False) -> str:
        """Create a draft and return the address of its first page."""
        rows = spreadsheets.convert(workspace, file, is_upload=is_upload)
        draft = workspace.create_draft(rows.file, file, note=rows.note, sheet=rows.sheet, sheets=rows.sheets)
        return f"/drafts/{draft.identity}/data"

    @routes.get("/")
    def start(request: Request) -> Response:
        last_changed = sorted(runs.all_runs(workspace), key=lambda run: run.changed, reverse=True)
        jobs = studio.queue.active()
        paths = [(workspace.relative(run.path), run) for run in last_changed]
        recent_runs = [item for item in paths if item[0] not in {job.run for job in jobs}][:MAX_RUNS]
        files = [(name, name) for name in map(workspace.relative, workspace.data_files())]
        started = {job.draft for job in studio.queue.jobs() if job.verb == "train"}
        drafts = [draft for draft in workspace.drafts() if draft.identity not in started]
        values: dict[str, Any] = {"drafts": drafts, "runs": recent_runs, "jobs": jobs}
        return page(request, "start.html", workspace=workspace, files=files, **values)

    @routes.put("/files/{name}")
    async def upload(request: Request, name: str) -> Response:
        size = request.headers.get("content-length")
        file = await workspace.save_upload(name, request.stream(), None if size is None else int(size))
        return JSONResponse({"url": await asyncio.to_thread(draft_of, file, True)})

    @routes.post("/drafts")
    async def create(request: Request) -> Response:
        text = (await form(request)).get("file", [""])[0]
        return RedirectResponse(await asyncio.to_thread(draft_of, workspace.path(text, location="file")), 303)

    @routes.post("/drafts/{identity}/delete")
    def delete(identity: str) -> Response:
        workspace.draft(identity).path.unlink()
        return RedirectResponse("/", 303)

    @routes.get("/static/{name}")
    def static_file(request: Request, name: str) -> Response:
        if name not in static:
            raise HTTPException(404)
        content, kind, tag = static[name]
        headers = {"ETag": tag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    return routes


def _static_files() -> dict[str, tuple[bytes, str, str]]:
    """Return content, media type and entity tag of the style sheets and the script by name."""
    folder = resources.files("deltaw.studio") / "static"
    contents = {file.name: file.read_bytes() for file in folder.iterdir()} | {"report.css": templates()[1].encode()}
    kinds = {"css": "text/css", "js": "text/javascript"}
    return {
        name: (content, kinds[name.rpartition(".")[2]], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
        for name, content in contents.items()
    }
