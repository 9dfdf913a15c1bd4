"""For those who run the server: `/health` (it is there), `/ready` (it takes requests) and `/metrics`."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from deltaw.serving.http.documented import TOLD, answer, refusals
from deltaw.serving.http.errors import ApiError, json_response
from deltaw.serving.http.metrics import CONTENT_TYPE, Metrics
from deltaw.serving.http.served import Served
from deltaw.serving.http.texts import Desk

# They answer without a key: probes have none, and learn nothing.
OPEN = frozenset({"/health", "/ready"})


def operations_router(served: Served, desk: Desk | None, metrics: Metrics) -> APIRouter:
    """The three routes."""
    router = APIRouter()

    @router.get("/health", summary="Whether the process answers", responses=answer("It does"))
    async def health() -> Response:
        return json_response({"status": "ok"})

    @router.get(
        "/ready", summary="Whether requests are taken", responses=answer("They are") | refusals(403, 503)
    )
    async def ready() -> Response:
        if desk is not None and desk.closing:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        if not served.alive():
            raise ApiError(503, "the engine has failed", code="engine_failed")
        return json_response({"status": "ready"})

    @router.get(
        "/metrics", summary="Metrics for Prometheus", responses=answer("Metrics", "text/plain") | TOLD
    )
    async def shown() -> Response:
        return Response(metrics.shown(), media_type=CONTENT_TYPE)

    return router
