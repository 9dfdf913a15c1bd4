"""Page of the model: local models, license, memory and time."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deltaw.studio.rendering import page
from deltaw.studio.state import Studio


def router(studio: Studio) -> APIRouter:
    """Return the routes of the page of the model."""
    routes = APIRouter()

    @routes.get("/drafts/{identity}/model")
    def show(request: Request, identity: str) -> Response:
        return page(request, "model.html", draft=studio.workspace.draft(identity))

    return routes
