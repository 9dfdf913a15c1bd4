"""Clients of Ollama and LM Studio on this machine: detect the program, import a GGUF file, and query the model.

Responses are limited in size and validated. Proxies are not used, because the programs are local.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from deltaw.cache.results import file_digest
from deltaw.errors import UserError, first_line
from deltaw.export.formats import OllamaTemplate
from deltaw.hub.app_stores import StoredModel, lm_studio_folder

_NAME = r"[A-Za-z0-9][\w.-]{0,79}"
_MAX_RESPONSE_BYTES = 1 << 24  # maximum size of a response in bytes
_SECONDS = 600.0  # the first request loads the model
_PUBLISHER = "deltaw"
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerUnreachable(Exception):
    """The server cannot be reached or does not respond."""


class Program:
    """Program that runs GGUF files and serves the OpenAI API.

    Attributes:
        title: Name of the program.
        url: Address of its server.
        folder: Required folder of model files, if any.
    """

    title: str
    names: re.Pattern[str]
    folder: Path | None = None
    # True if its models store a system prompt.
    stores_system_prompt = False
    # True if it can apply an adapter to a model in its store.
    applies_adapters = False

    def __init__(self, url: str, port: int) -> None:
        self.url = _address(url, port)

    def check(self, name: str, *, overwrite: bool) -> None:
        """Raise a UserError if the program is not available or the model name cannot be used."""
        if not self.names.fullmatch(name):
            hint = "use letters, digits, '-', '_' and '.', as in --name my-model"
            raise UserError(f"'{name}' is not a valid model name", location="--name", hint=hint)
        if self.has(name) and not overwrite:
            hint = "choose another --name, or replace it with --overwrite"
            raise UserError(f"{self.title} already has a model '{name}'", location="--name", hint=hint)

    def has(self, name: str) -> bool:
        """Return True if the model exists.

        Raises:
            UserError: if the program is not available.
        """
        raise NotImplementedError

    def base_problem(self, base: StoredModel, chat: OllamaTemplate) -> str | None:
        """Return the reason why an adapter with the settings ``chat`` cannot be applied to ``base``, or None.

        Raises:
            UserError: if the program is not available.
        """
        raise NotImplementedError

    def create(self, name: str, file: Path, chat: OllamaTemplate, base: str | None = None) -> str:
        """Import ``file`` as a model, and return a line that describes its location.

        Args:
            name: Name of the model.
            file: GGUF file of the model, or of an adapter if ``base`` is given.
            chat: Chat settings of the model.
            base: Name of a model of the program that the adapter is applied to.

        Raises:
            UserError: if the program rejects the model.
        """
        raise NotImplementedError

    def query(self, name: str, prompt: str, chat: OllamaTemplate, max_tokens: int, *, plain: bool) -> str:
        """Return the greedy answer with at most ``max_tokens`` tokens. ``plain`` continues the prompt without a chat
        template.

        Raises:
            ServerUnreachable: if the program does not respond.
            UserError: if the program rejects the request.
        """
        request: dict[str, Any] = {"model": name, "temperature": 0, "seed": 0, "repeat_penalty": 1.0}
        request["max_tokens"] = max_tokens
        if plain:
            return canonical_json(self._call("/v1/completions", {**request, "prompt": prompt}), "choices", 0, "text")
        system = [{"role": "system", "content": chat.system}] if chat.system and not self.stores_system_prompt else []
        request["messages"] = [*system, {"role": "user", "content": prompt}]
        return canonical_json(self._call("/v1/chat/completions", request), "choices", 0, "message", "content")

    def _call(
        self, path: str, value: object = None, *, method: str | None = None, file: Path | None = None, absent: int = 0
    ) -> dict[str, Any] | None:
        """Send a request and return the JSON object of the response, which is empty without content.

        Args:
            path: Path of the endpoint.
            value: Value to send as JSON.
            method: HTTP method.
            file: File to send instead of a value.
            absent: Status for which None is returned.

        Raises:
            UserError: if the program rejects the request.
            ServerUnreachable: if the program does not respond.
        """
        url = f"{self.url}{path}"
        headers = {"Content-Type": "application/json" if file is None else "application/octet-stream"}
        data: Any = None if value is None else json.dumps(value).encode()
        try:
            with file.open("rb") if file is not None else open(os.devnull, "rb") as stream:
                if file is not None:
                    data = stream
                    headers["Content-Length"] = str(file.stat().st_size)
                request = urllib.request.Request(url, data, headers, method=method)
                with _OPENER.open(request, timeout=_SECONDS) as response:
                    content = response.read(_MAX_RESPONSE_BYTES + 1)
            parsed = json.loads(content) if content.strip() and len(content) <= _MAX_RESPONSE_BYTES else {}
        except urllib.error.HTTPError as error:
            if error.code == absent:
                return None
            detail = " ".join(error.read(2000).decode("utf-8", "replace").split())[:300]
            message = f"{self.title} rejected the request (status {error.code}): {detail}"
            raise UserError(message, location=url, hint=f"see {self.title}'s log") from error
        except (OSError, ValueError, RecursionError) as error:
            raise ServerUnreachable(first_line(error)) from error
        return parsed if isinstance(parsed, dict) else {}


class Ollama(Program):
    """Client of Ollama.

    Args:
        url: Address of the server, or None for ``OLLAMA_HOST`` or the default address.
    """

    title = "Ollama"
    stores_system_prompt = True
    applies_adapters = True
    names = re.compile(rf"{_NAME}(?:/{_NAME})?(?::{_NAME})?")

    def __init__(self, url: str | None = None) -> None:
        super().__init__(url or os.environ.get("OLLAMA_HOST") or "127.0.0.1", 11434)

    def has(self, name: str) -> bool:
        return self._show(name) is not None

    def base_problem(self, base: StoredModel, chat: OllamaTemplate) -> str | None:
        shown = self._show(base.name)
        if shown is None:
            return f"Ollama at {self.url} has no model '{base.name}'"
        # FROM names the blob, whose name contains the digest.
        if base.digest.removeprefix("sha256:") not in str(shown.get("modelfile")):
            return f"'{base.name}' of Ollama at {self.url} has other weights"
        if shown.get("messages") or (shown.get("system") and not chat.system):
            return f"'{base.name}' contains messages that the run was not trained with"
        return None

    def _show(self, name: str) -> dict[str, Any] | None:
        """Return the description of a model, or None if it does not exist.

        Raises:
            UserError: if Ollama does not respond.
        """
        try:
            return self._call("/api/show", {"model": name}, absent=404)
        except ServerUnreachable as error:
            is_installed = shutil.which("ollama") is not None
            hint = "start it: ollama serve" if is_installed else "install it from ollama.com/download, or set --server"
            raise UserError(f"Ollama does not respond at {self.url}: {error}", location="ollama", hint=hint) from error

    def create(self, name: str, file: Path, chat: OllamaTemplate, base: str | None = None) -> str:
        blob = f"sha256:{file_digest(file)}"
        # Ollama's default penalizes repetition, unlike training.
        parameters = {"repeat_penalty": 1.0, **({"stop": list(chat.stops)} if chat.stops else {})}
        texts = {key: text for key, text in (("template", chat.template), ("system", chat.system)) if text}
        request = {"model": name, "parameters": parameters, "stream": False, **texts}
        files = {file.name: blob}
        request |= {"files": files} if base is None else {"from": base, "adapters": files}
        try:
            if self._call(f"/api/blobs/{blob}", method="HEAD", absent=404) is None:
                self._call(f"/api/blobs/{blob}", file=file)
            self._call("/api/create", request)
        except ServerUnreachable as error:
            message = f"Ollama stopped responding: {error}"
            raise UserError(message, location=self.url, hint="restart Ollama and deploy again") from error
        adapted = "" if base is None else f", an adapter of '{base}'"
        return f"Ollama has the model '{name}'{adapted}: ollama run {name}"


class LMStudio(Program):
    """Client of LM Studio: its model folder and its local server.

    Args:
        url: Address of the server. The default is LM Studio's.
        models: Model folder, or None for the default folder.
    """

    title = "LM Studio"
    names = re.compile(_NAME)
    folder: Path

    def __init__(self, url: str | None = None, models: str | Path | None = None) -> None:
        super().__init__(url or "127.0.0.1", 1234)
        self.folder = Path(models) if models is not None else lm_studio_folder()

    def has(self, name: str) -> bool:
        if not self.folder.is_dir():
            hint = "install it from lmstudio.ai and start it once, or set its model folder with --models"
            raise UserError("LM Studio's model folder does not exist", location=str(self.folder), hint=hint)
        return (self.folder / _PUBLISHER / name).exists()

    def create(self, name: str, file: Path, chat: OllamaTemplate, base: str | None = None) -> str:
        target = self.folder / _PUBLISHER / name / f"{name}.gguf"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        except OSError as error:
            message = f"the file cannot be moved there: {error.strerror or error}"
            raise UserError(message, location=str(target), hint="set a writable folder with --models") from error
        return f"LM Studio has the model '{_PUBLISHER}/{name}': {target}"

    def query(self, name: str, prompt: str, chat: OllamaTemplate, max_tokens: int, *, plain: bool) -> str:
        models = (self._call("/v1/models") or {}).get("data")
        model_ids = [str(e.get("id")) for e in models if isinstance(e, Mapping)] if isinstance(models, list) else []
        model = next((entry for entry in model_ids if name.lower() in re.split(r"[/@:]", entry.lower())), None)
        if model is None:
            raise ServerUnreachable(f"its server does not list '{name}' yet")
        return super().query(model, prompt, chat, max_tokens, plain=plain)


def _address(address: str, port: int) -> str:
    """Return the URL of an address given as ``host``, ``host:port`` or URL, the forms that both programs accept."""
    try:
        parts = urlsplit(address if "://" in address else f"http://{address}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("it is not an HTTP address")
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(parts.hostname, parts.hostname)
        return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{parts.port or port}"
    except ValueError as error:
        hint = f"use host:port, for example 127.0.0.1:{port}"
        raise UserError(f"'{address}' is not an address: {error}", location="--server", hint=hint) from error


def canonical_json(value: Any, *path: str | int) -> str:
    """Return the text at a path in a response, or an empty string."""
    for key in path:
        exists = isinstance(value, Mapping) or (isinstance(value, list) and isinstance(key, int) and key < len(value))
        value = (value.get(key) if isinstance(value, Mapping) else value[key]) if exists else None
    return value if isinstance(value, str) else ""
