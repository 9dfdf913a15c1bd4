"""Page of the settings: four of them, all others, the file and the command."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deltaw.studio.rendering import page
from deltaw.studio.state import Studio


def router(studio: Studio) -> APIRouter:
    """Return the routes of the page of the settings."""
    routes = APIRouter()

    @routes.get("/drafts/{identity}/settings")
    def show(request: Request, identity: str) -> Response:
        return page(request, "settings.html", draft=studio.workspace.draft(identity))

    return routes
