"""Page of the rows: task, columns, findings and tokens."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deltaw.studio.rendering import page
from deltaw.studio.state import Studio


def router(studio: Studio) -> APIRouter:
    """Return the routes of the page of the rows."""
    routes = APIRouter()

    @routes.get("/drafts/{identity}/data")
    def show(request: Request, identity: str) -> Response:
        return page(request, "data.html", draft=studio.workspace.draft(identity))

    return routes
