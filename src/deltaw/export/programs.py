"""Ollama and LM Studio on this machine: whether one is there, how a GGUF file becomes a model of it, and asking it.

Knows their HTTP APIs and LM Studio's folder of models; no runs. What they answer is bounded and checked like anything
from outside. No proxy is used, since the programs run here.
"""

from __future__ import annotations

import hashlib
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

from deltaw.errors import UserError, first_line
from deltaw.export.formats import Chat

_NAME = r"[A-Za-z0-9][\w.-]{0,79}"
_MOST = 1 << 24  # bytes of an answer
_SECONDS = 600.0  # a model is read when it is first asked
_PUBLISHER = "deltaw"
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Unreachable(Exception):
    """Nobody listens at an address, or what listens there does not answer."""


class Program:
    """A program that runs GGUF files and has the OpenAI API.

    Attributes:
        title: its name. url: where it listens. folder: where a file has to be in the end; None for anywhere.
    """

    title: str
    names: re.Pattern[str]
    folder: Path | None = None
    # Whether its models hold a system prompt of their own.
    keeps_system = False

    def __init__(self, url: str, port: int) -> None:
        self.url = _address(url, port)

    def check(self, name: str, *, overwrite: bool) -> None:
        """Raise a UserError unless the program is here and a model of this name can be made."""
        if not self.names.fullmatch(name):
            hint = "use letters, digits, '-', '_' and '.', as in --name my-model"
            raise UserError(f"'{name}' cannot be a model's name", where="--name", hint=hint)
        if self.has(name) and not overwrite:
            hint = "give another --name, or replace it with --overwrite"
            raise UserError(f"{self.title} has a model '{name}' already", where="--name", hint=hint)

    def has(self, name: str) -> bool:
        """Whether there is such a model.

        Raises:
            UserError: the program is not here.
        """
        raise NotImplementedError

    def create(self, name: str, file: Path, chat: Chat) -> str:
        """Make ``file`` a model; a line on where it is.

        Raises:
            UserError: the program refuses it.
        """
        raise NotImplementedError

    def ask(self, name: str, prompt: str, chat: Chat, tokens: int, *, plain: bool) -> str:
        """The likeliest answer, of at most so many tokens; ``plain`` continues the prompt, without a chat template.

        Raises:
            Unreachable: the program does not answer. UserError: it refuses.
        """
        asked: dict[str, Any] = {
            "model": name,
            "temperature": 0,
            "seed": 0,
            "max_tokens": tokens,
            "repeat_penalty": 1.0,
        }
        if plain:
            return _text(self._call("/v1/completions", {**asked, "prompt": prompt}), "choices", 0, "text")
        system = [{"role": "system", "content": chat.system}] if chat.system and not self.keeps_system else []
        asked["messages"] = [*system, {"role": "user", "content": prompt}]
        return _text(self._call("/v1/chat/completions", asked), "choices", 0, "message", "content")

    def _call(self, path: str, value: object = None, **how: Any) -> dict[str, Any] | None:
        return _call(f"{self.url}{path}", value, title=self.title, **how)


class Ollama(Program):
    """Ollama, by its API.

    Args:
        url: where it listens; None for ``OLLAMA_HOST`` or its usual address.
    """

    title, keeps_system = "Ollama", True
    names = re.compile(rf"{_NAME}(?:/{_NAME})?(?::{_NAME})?")

    def __init__(self, url: str | None = None) -> None:
        super().__init__(url or os.environ.get("OLLAMA_HOST") or "127.0.0.1", 11434)

    def has(self, name: str) -> bool:
        try:
            return self._call("/api/show", {"model": name}, none_if=404) is not None
        except Unreachable as error:
            here = shutil.which("ollama") is not None
            hint = "start it: ollama serve" if here else "install it from ollama.com/download, or give its --server"
            raise UserError(f"Ollama does not answer at {self.url}: {error}", where="ollama", hint=hint) from error

    def create(self, name: str, file: Path, chat: Chat) -> str:
        digest = hashlib.sha256()
        with file.open("rb") as opened:
            for block in iter(lambda: opened.read(1 << 20), b""):
                digest.update(block)
        blob = f"sha256:{digest.hexdigest()}"
        # Ollama's own default is a penalty on what was written before, with which no model is trained.
        parameters = {"repeat_penalty": 1.0, **({"stop": list(chat.stops)} if chat.stops else {})}
        told = {key: text for key, text in (("template", chat.template), ("system", chat.system)) if text}
        made = {"model": name, "files": {file.name: blob}, "parameters": parameters, "stream": False, **told}
        try:
            if self._call(f"/api/blobs/{blob}", method="HEAD", none_if=404) is None:
                self._call(f"/api/blobs/{blob}", file=file)
            self._call("/api/create", made)
        except Unreachable as error:
            what = f"Ollama does not answer any more: {error}"
            raise UserError(what, where=self.url, hint="start it, and deploy again") from error
        return f"Ollama has the model '{name}': ollama run {name}"


class LMStudio(Program):
    """LM Studio: its folder of models, and its local server where that runs.

    Args:
        url: where the server listens; None for its usual address.
        models: the folder of models; None for the usual one.
    """

    title, names = "LM Studio", re.compile(_NAME)
    folder: Path

    def __init__(self, url: str | None = None, models: str | Path | None = None) -> None:
        super().__init__(url or "127.0.0.1", 1234)
        self.folder = Path(models) if models is not None else Path.home() / ".lmstudio" / "models"

    def has(self, name: str) -> bool:
        if not self.folder.is_dir():
            hint = "install it from lmstudio.ai and start it once, or give the folder of its models with --models"
            raise UserError("LM Studio has no folder of models here", where=str(self.folder), hint=hint)
        return (self.folder / _PUBLISHER / name).exists()

    def create(self, name: str, file: Path, chat: Chat) -> str:
        to = self.folder / _PUBLISHER / name / f"{name}.gguf"
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, to)
        except OSError as error:
            what = f"the file cannot be put there: {error.strerror or error}"
            raise UserError(what, where=str(to), hint="choose a folder that you may write to with --models") from error
        return f"LM Studio has the model '{_PUBLISHER}/{name}': {to}"

    def ask(self, name: str, prompt: str, chat: Chat, tokens: int, *, plain: bool) -> str:
        listed = (self._call("/v1/models") or {}).get("data")
        known = [str(one.get("id")) for one in listed if isinstance(one, Mapping)] if isinstance(listed, list) else []
        model = next((one for one in known if name.lower() in re.split(r"[/@:]", one.lower())), None)
        if model is None:
            raise Unreachable(f"its server does not list '{name}' yet")
        return super().ask(model, prompt, chat, tokens, plain=plain)


def _address(given: str, port: int) -> str:
    """An address as both programs take it, ``host``, ``host:port`` or a URL, as a URL."""
    try:
        found = urlsplit(given if "://" in given else f"http://{given}")
        if found.scheme not in ("http", "https") or not found.hostname:
            raise ValueError("it is no address of HTTP")
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(found.hostname, found.hostname)
        return f"{found.scheme}://{f'[{host}]' if ':' in host else host}:{found.port or port}"
    except ValueError as error:
        hint = f"write host:port, as 127.0.0.1:{port}"
        raise UserError(f"'{given}' is not an address: {error}", where="--server", hint=hint) from error


def _call(
    url: str,
    value: object = None,
    *,
    title: str,
    method: str | None = None,
    file: Path | None = None,
    none_if: int | None = None,
) -> dict[str, Any] | None:
    """What a program answers: a JSON object, empty for no content; None at the status ``none_if``.

    Args:
        value: sent as JSON. file: sent as it is.
    """
    headers = {"Content-Type": "application/json" if file is None else "application/octet-stream"}
    data: Any = None if value is None else json.dumps(value).encode()
    try:
        with file.open("rb") if file is not None else open(os.devnull, "rb") as opened:
            if file is not None:
                data, headers["Content-Length"] = opened, str(file.stat().st_size)
            request = urllib.request.Request(url, data, headers, method=method)
            with _OPENER.open(request, timeout=_SECONDS) as answer:
                content = answer.read(_MOST + 1)
        found = json.loads(content) if content.strip() and len(content) <= _MOST else {}
    except urllib.error.HTTPError as error:
        if error.code == none_if:
            return None
        said = " ".join(error.read(2000).decode("utf-8", "replace").split())[:300]
        raise UserError(
            f"{title} refuses (status {error.code}): {said}", where=url, hint=f"see {title}'s log"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise Unreachable(first_line(error)) from error
    return found if isinstance(found, dict) else {}


def _text(value: Any, *path: str | int) -> str:
    """The text at a place of an answer; empty where there is none."""
    for key in path:
        found = isinstance(value, Mapping) or (isinstance(value, list) and isinstance(key, int) and key < len(value))
        value = (value.get(key) if isinstance(value, Mapping) else value[key]) if found else None
    return value if isinstance(value, str) else ""
