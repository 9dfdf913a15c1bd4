"""Description of a served model, and the routes that list models and load adapters."""

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

from deltaw.decoding.request import EngineLoad, TextEngine
from deltaw.errors import UserError
from deltaw.serving.http.errors import (
    COMMON_REFUSALS,
    ApiError,
    error_responses,
    json_response,
    success_response,
    to_api_error,
    unknown_model_error,
)
from deltaw.serving.http.requests import Fields, read_json, record_of, request_body_schema
from deltaw.serving.http.settings import NAME, ServerSettings
from deltaw.serving.http.tool_calls import CallForm
from deltaw.training.features.images import RowImages
from deltaw.untrusted_paths import is_remote_path


class TokenizedPrompts(Protocol):
    """Tokenizes prompts for one adapter or the base model. All methods are thread-safe."""

    @property
    def call_form(self) -> CallForm | None:
        """Tool call format of the chat template, or None if it does not support tools."""

    def chat(
        self, messages: Sequence[dict[str, object]], tools: Sequence[dict[str, object]], *, add_system: bool = True
    ) -> np.ndarray:
        """Return the (length,) token ids of a conversation, up to the start of the assistant's turn.

        Args:
            add_system: Add the system prompt of the training rows to a conversation without one.

        Raises:
            UserError: if the chat template rejects the messages.
        """

    def text(self, text: str) -> np.ndarray:
        """Return the (length,) token ids of a text, with initial special tokens."""

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token in a text."""


class AdapterStore(Protocol):
    """Adapters that can be loaded and unloaded while an engine is running."""

    def add(self, name: str, folder: Path) -> object:
        """Add an adapter.

        Raises:
            UserError: if the folder is not an adapter of this model, or the name is taken.
        """

    def swap(self, name: str, folder: Path) -> object:
        """Replace the adapter of a name. Running requests finish with the previous one.

        Raises:
            UserError: as :meth:`add`. The previous adapter remains then.
        """

    def remove(self, name: str) -> object:
        """Remove an adapter. Running requests finish with it.

        Raises:
            UserError: if no adapter has this name.
        """


@dataclass(frozen=True)
class Served:
    """Model that an application serves.

    Args:
        name: Name of the base model in requests.
        engine: Engine that generates text, or None if only ``routers`` serve the model.
        prompts: Returns the tokenizer of an adapter by name, or of the base model for None.
        reference: Reference from which the model was loaded.
        positions: Maximum number of tokens of a prompt and its completion, or None if unknown.
        adapter_store: Loads and unloads adapters, or None if the adapters are fixed.
        load: Returns the load of the engine.
        close: Stops the engine and releases its resources.
        routers: Additional routes, for example embeddings or a web page.
        open_paths: Paths in ``routers`` that need no API key.
        other_names: Names of adapters if there is no engine.
        images: Images in prompts of a vision-language model, or None if the model reads text only.
    """

    name: str
    engine: TextEngine | None
    prompts: Callable[[str | None], TokenizedPrompts]
    reference: str = ""
    positions: int | None = None
    adapter_store: AdapterStore | None = None
    load: Callable[[], EngineLoad] = EngineLoad
    close: Callable[[], None] = field(default=lambda: None)
    routers: tuple[APIRouter, ...] = ()
    open_paths: frozenset[str] = frozenset()
    other_names: tuple[str, ...] = ()
    images: RowImages | None = None

    def adapters(self) -> tuple[str, ...]:
        """Return the names of the adapters."""
        return self.other_names if self.engine is None else self.engine.adapters()


class UnloadRequest(Fields):
    """Body of ``/v1/unload_lora_adapter``."""

    lora_name: str = Field(pattern=f"^{NAME.pattern}$")


class LoadRequest(UnloadRequest):
    """Body of ``/v1/load_lora_adapter``."""

    lora_path: str = Field(min_length=1, max_length=1024)
    load_inplace: bool = Field(default=False, description="replace the adapter of this name")


def models_router(served: Served) -> APIRouter:
    """Return the routes that list models."""
    router = APIRouter()
    started = int(time.time())

    def entry(name: str) -> dict[str, object]:
        origin = (served.reference or name, None) if name == served.name else (name, served.name)
        fields = {"id": name, "object": "model", "created": started, "owned_by": "deltaw"}
        return {**fields, "root": origin[0], "parent": origin[1]}

    responses = success_response("Models") | COMMON_REFUSALS

    @router.get("/v1/models", summary="List base model and adapters", responses=responses)
    async def models() -> Response:
        names = [served.name, *sorted(served.adapters())]
        return json_response({"object": "list", "data": [entry(name) for name in names]})

    @router.get("/v1/models/{model:path}", summary="One model", responses=responses | error_responses(404))
    async def model(model: str) -> Response:
        if model != served.name and model not in served.adapters():
            raise unknown_model_error(model)
        return json_response(entry(model))

    return router


def adapters_router(served: Served, adapter_store: AdapterStore, settings: ServerSettings) -> APIRouter:
    """Return vLLM's routes that load and unload adapters. Folders must be below ``settings.adapters_from``."""
    assert settings.adapters_from is not None
    root = settings.adapters_from
    limits = settings.limits
    responses = success_response("Success", "text/plain") | COMMON_REFUSALS | error_responses(404, 408, 413, 415, 500)
    router = APIRouter(responses=responses, default_response_class=PlainTextResponse)
    changing = asyncio.Lock()

    @router.post("/v1/load_lora_adapter", summary="Load an adapter", openapi_extra=request_body_schema(LoadRequest))
    async def load(request: Request) -> Response:
        body = await read_json(request, LoadRequest, limits)
        name = body.lora_name
        folder = resolve_adapter_folder(root, body.lora_path)
        async with changing:
            names = served.adapters()
            if name == served.name:
                raise ApiError(400, f"'{name}' is the base model", param="lora_name")
            if name not in names and len(names) >= settings.max_adapters:
                message = f"{len(names)} adapters are loaded, the maximum is {settings.max_adapters}: unload one first"
                raise ApiError(400, message, param="lora_path")
            load_adapter = adapter_store.swap if body.load_inplace and name in names else adapter_store.add
            try:
                await asyncio.get_running_loop().run_in_executor(None, load_adapter, name, folder)
            except UserError as error:
                # Do not reveal paths of this machine.
                raise to_api_error(UserError(error.message, hint=error.hint), param="lora_path") from error
        record_of(request.scope).model = name
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @router.post(
        "/v1/unload_lora_adapter", summary="Unload an adapter", openapi_extra=request_body_schema(UnloadRequest)
    )
    async def unload(request: Request) -> Response:
        name = (await read_json(request, UnloadRequest, limits)).lora_name
        async with changing:
            if name not in served.adapters():
                raise ApiError(404, f"there is no adapter '{name}'", param="lora_name", code="model_not_found")
            await asyncio.get_running_loop().run_in_executor(None, adapter_store.remove, name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    return router


def resolve_adapter_folder(root: Path, path: str) -> Path:
    """Return the real path of a requested folder below ``root``.

    Paths outside ``root`` cause the same error as missing folders, so that requests cannot probe the file system.

    Args:
        root: Folder of the adapters.
        path: Path relative to ``root``, or absolute.

    Raises:
        ApiError: 404 if the folder does not exist below ``root``.
    """
    missing = ApiError(404, "no such folder below the folder for adapters", param="lora_path", code="not_found")
    if not path.isprintable() or is_remote_path(path):
        raise missing
    top = os.path.realpath(root)
    try:
        resolved = os.path.realpath(os.path.join(top, path), strict=True)
    except (OSError, ValueError):
        raise missing from None
    if resolved == top or not Path(resolved).is_relative_to(top) or not os.path.isdir(resolved):
        raise missing
    return Path(resolved)
