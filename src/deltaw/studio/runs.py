"""Pages of the runs: list, comparison, report, download, deletion and export."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deltaw.studio.rendering import page
from deltaw.studio.state import Studio


def router(studio: Studio) -> APIRouter:
    """Return the routes of the pages of the runs."""
    routes = APIRouter()

    @routes.get("/runs")
    def show(request: Request) -> Response:
        return page(request, "runs.html", runs=[])

    return routes
