"""Build the FastAPI application: routes, authentication and metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from deltaw.errors import UserError
from deltaw.serving.http.answers import generation_router
from deltaw.serving.http.errors import (
    COMMON_REFUSALS,
    ApiError,
    error_responses,
    json_response,
    on_error,
    success_response,
)
from deltaw.serving.http.guard import Guard, RequestMetrics, RequestObserver
from deltaw.serving.http.queue import RequestQueue
from deltaw.serving.http.served import Served, adapters_router, models_router
from deltaw.serving.http.settings import ServerSettings
from deltaw.version import __version__

# Health probes have no key, and these paths reveal no information.
PUBLIC_PATHS = frozenset({"/health", "/ready"})


def operations_router(request_queue: RequestQueue | None, metrics: RequestMetrics) -> APIRouter:
    """Return the operational routes: ``/health`` (liveness), ``/ready`` (readiness) and ``/metrics``."""
    router = APIRouter()

    @router.get("/health", summary="Liveness check", responses=success_response("The process is running"))
    async def health() -> Response:
        return json_response({"status": "ok"})

    @router.get("/ready", summary="Readiness check", responses=success_response("Ready") | error_responses(403, 503))
    async def ready() -> Response:
        if request_queue is not None and request_queue.closing:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        return json_response({"status": "ready"})

    @router.get("/metrics", summary="Metrics", responses=success_response("Metrics", "text/plain") | COMMON_REFUSALS)
    async def metrics_text() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def create_app(served: Served, settings: ServerSettings) -> tuple[FastAPI, RequestQueue | None]:
    """Build the application and the request queue, or None for the queue if the model does not generate text.

    Raises:
        UserError: if ``adapters_from`` is set and the model does not support loading adapters.
    """
    request_queue = None if served.engine is None else RequestQueue(served.engine, settings.limits)
    metrics = RequestMetrics(served.load, lambda: 0 if request_queue is None else request_queue.pending)
    guard = Middleware(Guard, settings=settings, open_paths=PUBLIC_PATHS | served.open_paths)
    layers = [Middleware(RequestObserver, metrics=metrics), guard]
    if settings.origins:
        # Outside the guard, because CORS preflight requests have no key.
        allowed: dict[str, Any] = {"allow_origins": list(settings.origins), "allow_methods": ["GET", "POST"]}
        layers.insert(1, Middleware(CORSMiddleware, allow_headers=["Authorization", "Content-Type"], **allowed))
    app = FastAPI(
        title="deltaw",
        version=__version__,
        description="The OpenAI API for a base model and its adapters.",
        middleware=layers,
        docs_url=None,  # the documentation pages load scripts from a CDN
        redoc_url=None,
        exception_handlers=dict.fromkeys((ApiError, UserError, HTTPException), on_error),
    )
    app.include_router(operations_router(request_queue, metrics))
    app.include_router(models_router(served))
    if settings.adapters_from is not None:
        if served.adapter_store is None:
            raise UserError("adapters cannot be loaded for this model", location="--adapters-from")
        app.include_router(adapters_router(served, served.adapter_store, settings))
    if request_queue is not None:
        app.include_router(generation_router(served, request_queue, settings))
    for router in served.routers:
        app.include_router(router)
    return app, request_queue
