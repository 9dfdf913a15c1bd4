"""Page on which a run is tried: a proxy of its server, and scores of files."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deltaw.studio.rendering import page
from deltaw.studio.state import Studio


def router(studio: Studio) -> APIRouter:
    """Return the routes of the page of trials."""
    routes = APIRouter()

    @routes.get("/runs/try/{path:path}")
    def show(request: Request, path: str) -> Response:
        return page(request, "trial.html", run=studio.workspace.path(path, location="run"))

    return routes
