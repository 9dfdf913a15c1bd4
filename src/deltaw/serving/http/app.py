"""Puts the application together: routes over what is served, inside the layers that guard and observe."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from deltaw.errors import UserError
from deltaw.serving.http.answers import texts_router
from deltaw.serving.http.errors import TOLD, ApiError, answer, json_response, on_error, refusals
from deltaw.serving.http.guard import Guard, Metrics, Observed
from deltaw.serving.http.preparing import Desk
from deltaw.serving.http.served import Served, adapters_router, models_router
from deltaw.serving.http.settings import ServerSettings
from deltaw.version import __version__

# They answer without a key: probes have none, and learn nothing.
OPEN = frozenset({"/health", "/ready"})


def operations_router(desk: Desk | None, metrics: Metrics) -> APIRouter:
    """For those who run the server: `/health` (it is there), `/ready` (it takes requests) and `/metrics`."""
    router = APIRouter()

    @router.get("/health", summary="Whether the process answers", responses=answer("It does"))
    async def health() -> Response:
        return json_response({"status": "ok"})

    @router.get("/ready", summary="Whether requests are taken", responses=answer("They are") | refusals(403, 503))
    async def ready() -> Response:
        if desk is not None and desk.closing:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        return json_response({"status": "ready"})

    @router.get("/metrics", summary="Metrics for Prometheus", responses=answer("Metrics", "text/plain") | TOLD)
    async def shown() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def create_app(served: Served, settings: ServerSettings) -> tuple[FastAPI, Desk | None]:
    """The application, and the desk that holds its texts; None for the desk where no text is written.

    Raises:
        UserError: adapters are to be loaded by request, and what is served cannot load any.
    """
    desk = None if served.engine is None else Desk(served.engine, settings.limits)
    metrics = Metrics(served.load, lambda: 0 if desk is None else desk.in_hand)
    layers = [
        Middleware(Observed, metrics=metrics),
        Middleware(Guard, settings=settings, open_paths=OPEN | served.open_paths),
    ]
    if settings.origins:
        # Outside the guard, since a browser asks beforehand without a key.
        allowed: dict[str, Any] = {"allow_origins": list(settings.origins), "allow_methods": ["GET", "POST"]}
        headers = ["Authorization", "Content-Type"]
        layers.insert(1, Middleware(CORSMiddleware, allow_headers=headers, **allowed))
    app = FastAPI(
        title="deltaw",
        version=__version__,
        description="The OpenAI API for a base model and its adapters.",
        middleware=layers,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        exception_handlers=dict.fromkeys((ApiError, UserError, HTTPException), on_error),
    )
    app.include_router(operations_router(desk, metrics))
    app.include_router(models_router(served))
    if settings.adapters_from is not None:
        if served.shelf is None:
            raise UserError("adapters cannot be loaded for this model", where="--adapters-from")
        app.include_router(adapters_router(served, served.shelf, settings))
    if desk is not None:
        app.include_router(texts_router(served, desk, settings))
    for router in served.routers:
        app.include_router(router)
    return app, desk
