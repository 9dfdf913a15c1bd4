"""Puts the application together: routes over what is served, inside the layers that guard and observe."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from deltaw.errors import UserError
from deltaw.serving.http.chat import chat_router
from deltaw.serving.http.completions import completions_router
from deltaw.serving.http.errors import ApiError, on_api_error, on_http_error, on_user_error
from deltaw.serving.http.guard import Guard, Observed
from deltaw.serving.http.metrics import Metrics
from deltaw.serving.http.models import adapters_router, models_router
from deltaw.serving.http.operations import OPEN, operations_router
from deltaw.serving.http.served import Served
from deltaw.serving.http.settings import ServerSettings
from deltaw.serving.http.texts import Desk
from deltaw.version import __version__


def create_app(served: Served, settings: ServerSettings) -> tuple[FastAPI, Desk | None]:
    """The application, and the desk that holds its texts; None for the desk where no text is written.

    Raises:
        UserError: adapters are to be loaded by request, and what is served cannot load any.
    """
    limits = settings.limits
    desk = None
    if served.engine is not None:
        desk = Desk(served.engine, most=limits.queue, seconds=limits.seconds)
    metrics = Metrics(served.load, lambda: 0 if desk is None else desk.in_hand)
    layers = [
        Middleware(Observed, metrics=metrics),
        Middleware(Guard, settings=settings, open_paths=OPEN | served.open_paths),
    ]
    if settings.origins:
        # Outside the guard, since a browser asks beforehand without a key.
        cross_origin = Middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
        layers.insert(1, cross_origin)
    app = FastAPI(
        title="deltaw",
        version=__version__,
        description="The OpenAI API for a base model and its adapters.",
        middleware=layers,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        exception_handlers={
            ApiError: on_api_error,
            UserError: on_user_error,
            HTTPException: on_http_error,
        },
    )
    app.include_router(operations_router(served, desk, metrics))
    app.include_router(models_router(served))
    if settings.adapters_from is not None:
        if served.shelf is None:
            raise UserError("adapters cannot be loaded for this model", where="--adapters-from")
        app.include_router(adapters_router(served, served.shelf, settings))
    if desk is not None:
        app.include_router(chat_router(served, desk, settings))
        app.include_router(completions_router(served, desk, settings))
    for router in served.routers:
        app.include_router(router)
    return app, desk
