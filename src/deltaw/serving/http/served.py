"""What an application serves: one value that holds the engine and what goes with it, and the routes that name it.

It is the seam to the rest of deltaw: a test makes it of a toy, the command line of a real model.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import Field

from deltaw.contained import of_host
from deltaw.errors import UserError
from deltaw.serving.http.errors import TOLD, ApiError, answer, json_response, no_model, refusals, refused
from deltaw.serving.http.requests import Fields, described, read_json, record_of
from deltaw.serving.http.settings import NAME, ServerSettings
from deltaw.serving.http.tool_calls import CallForm
from deltaw.serving.request import EngineLoad, TextEngine


class Prompts(Protocol):
    """Prompts of one adapter, or of the base model, as tokens; may be called from any thread."""

    @property
    def call_form(self) -> CallForm | None:
        """How its chat template lets a model write calls of tools; None where it has no tools."""

    def chat(self, messages: Sequence[dict[str, object]], tools: Sequence[dict[str, object]]) -> np.ndarray:
        """A conversation through what opens the assistant's turn: (length,) token ids.

        Raises:
            UserError: the template does not take it.
        """

    def text(self, text: str) -> np.ndarray:
        """Plain text with the tokens that open every text: (length,) token ids."""

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for in a text."""


class Shelf(Protocol):
    """Adapters that come and go while an engine runs."""

    def add(self, name: str, folder: Path) -> object:
        """Make an adapter known.

        Raises:
            UserError: the folder holds no adapter, or none for this model, or the name is taken.
        """

    def swap(self, name: str, folder: Path) -> object:
        """Let a known name stand for another folder's adapter; texts in hand are written to their end.

        Raises:
            UserError: as ``add``; the adapter from before then stays.
        """

    def remove(self, name: str) -> object:
        """Forget an adapter; texts in hand are written to their end.

        Raises:
            UserError: there is none of that name.
        """


@dataclass(frozen=True)
class Served:
    """All that an application knows of what it serves.

    Args:
        name: of the base model in requests. reference: what it was loaded from, as a person named it.
        engine: writes texts; None where the model writes none, and only ``routers`` answer.
        prompts: of an adapter by its name, or of the base model for None.
        positions: the most tokens of a prompt and its text; None where the engine alone knows.
        shelf: where adapters are added and removed; None where they are fixed.
        load: what the engine is doing.
        close: ends what is still being written, and lets go of what it took.
        routers: more routes: embeddings, classes, a page. open_paths: those of them that need no key.
        others: names besides the base model's where there is no engine, such as a classifier's adapters.
    """

    name: str
    engine: TextEngine | None
    prompts: Callable[[str | None], Prompts]
    reference: str = ""
    positions: int | None = None
    shelf: Shelf | None = None
    load: Callable[[], EngineLoad] = EngineLoad
    close: Callable[[], None] = field(default=lambda: None)
    routers: tuple[APIRouter, ...] = ()
    open_paths: frozenset[str] = frozenset()
    others: tuple[str, ...] = ()

    def adapters(self) -> tuple[str, ...]:
        """The names that requests may give besides the base model's."""
        return self.others if self.engine is None else self.engine.adapters()


class UnloadAdapter(Fields):
    """The body of ``/v1/unload_lora_adapter``."""

    lora_name: str = Field(pattern=f"^{NAME.pattern}$")


class LoadAdapter(UnloadAdapter):
    """The body of ``/v1/load_lora_adapter``."""

    lora_path: str = Field(min_length=1, max_length=1024)
    load_inplace: bool = Field(default=False, description="take the place of the adapter of this name")


def models_router(served: Served) -> APIRouter:
    """The routes that list models."""
    router = APIRouter()
    started = int(time.time())

    def entry(name: str) -> dict[str, object]:
        told = {"id": name, "object": "model", "created": started, "owned_by": "deltaw"}
        if name == served.name:
            return {**told, "root": served.reference or name, "parent": None}
        return {**told, "root": name, "parent": served.name}

    @router.get("/v1/models", summary="List the base model and its adapters", responses=answer("Models") | TOLD)
    async def models() -> Response:
        names = [served.name, *sorted(served.adapters())]
        return json_response({"object": "list", "data": [entry(name) for name in names]})

    @router.get("/v1/models/{model:path}", summary="One model", responses=answer("The model") | TOLD | refusals(404))
    async def model(model: str) -> Response:
        if model != served.name and model not in served.adapters():
            raise no_model(model)
        return json_response(entry(model))

    return router


def adapters_router(served: Served, shelf: Shelf, settings: ServerSettings) -> APIRouter:
    """vLLM's routes that load and unload adapters, from below ``settings.adapters_from`` alone."""
    assert settings.adapters_from is not None
    root, limits = settings.adapters_from, settings.limits
    told = answer("What was done", "text/plain") | TOLD | refusals(404, 408, 413, 415, 500)
    router = APIRouter(responses=told, default_response_class=PlainTextResponse)
    changing = asyncio.Lock()

    @router.post("/v1/load_lora_adapter", summary="Load an adapter", openapi_extra=described(LoadAdapter))
    async def load(request: Request) -> Response:
        asked = await read_json(request, LoadAdapter, limits)
        name, folder = asked.lora_name, folder_below(root, asked.lora_path)
        async with changing:
            known = served.adapters()
            if name == served.name:
                raise ApiError(400, f"'{name}' is the base model", param="lora_name")
            if name not in known and len(known) >= settings.max_adapters:
                message = f"{len(known)} adapters are loaded, and {settings.max_adapters} may be: unload one first"
                raise ApiError(400, message, param="lora_path")
            put = shelf.swap if asked.load_inplace and name in known else shelf.add
            try:
                await asyncio.get_running_loop().run_in_executor(None, put, name, folder)
            except UserError as error:
                # Where it lies on this machine is not for everybody.
                raise refused(UserError(error.what, hint=error.hint), param="lora_path") from error
        record_of(request.scope).model = name
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", summary="Unload an adapter", openapi_extra=described(UnloadAdapter))
    async def unload(request: Request) -> Response:
        name = (await read_json(request, UnloadAdapter, limits)).lora_name
        async with changing:
            if name not in served.adapters():
                raise ApiError(404, f"there is no adapter '{name}'", param="lora_name", code="model_not_found")
            await asyncio.get_running_loop().run_in_executor(None, shelf.remove, name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    return router


def folder_below(root: Path, path: str) -> Path:
    """The folder that a request names, which lies below ``root`` when all links are followed.

    What leads out of ``root`` is refused like what does not exist, so that nobody learns what lies elsewhere.

    Args:
        path: relative to ``root``, or absolute.

    Raises:
        ApiError: 404, there is no such folder there.
    """
    missing = ApiError(404, "there is no such folder below the one for adapters", param="lora_path", code="not_found")
    if not path.isprintable() or of_host(path):
        raise missing
    top = os.path.realpath(root)
    try:
        found = os.path.realpath(os.path.join(top, path), strict=True)
    except (OSError, ValueError):
        raise missing from None
    if found == top or not Path(found).is_relative_to(top) or not os.path.isdir(found):
        raise missing
    return Path(found)
