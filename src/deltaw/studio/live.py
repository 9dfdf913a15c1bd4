"""Pages of the jobs: the queue, and the progress of one."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deltaw.studio.rendering import page
from deltaw.studio.state import Studio


def router(studio: Studio) -> APIRouter:
    """Return the routes of the pages of the jobs."""
    routes = APIRouter()

    @routes.get("/jobs")
    def show(request: Request) -> Response:
        return page(request, "jobs.html", jobs=studio.queue.jobs())

    return routes
