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
from typing import Any, Protocol
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


class Program(Protocol):
    """A program that runs GGUF files."""

    title: str

    def check(self, name: str, *, overwrite: bool) -> None:
        """Raise a UserError unless a model of this name can be made."""

    def folder(self) -> Path | None:
        """Where a file is to be written so that it need not be copied; None for anywhere."""

    def create(self, name: str, file: Path, chat: Chat) -> str:
        """Make ``file`` a model; a line on where it is.

        Raises:
            UserError: the program refuses it.
        """

    def ask(self, name: str, prompt: str, chat: Chat, tokens: int, *, plain: bool) -> str:
        """The likeliest answer, of at most so many tokens; ``plain`` continues the prompt, without a chat template.

        Raises:
            Unreachable: the program does not run. UserError: it refuses.
        """


class Ollama:
    """Ollama, by its API.

    Args:
        url: where it listens; None for ``OLLAMA_HOST`` or its usual address.
    """

    title = "Ollama"
    _names = re.compile(rf"{_NAME}(?:/{_NAME})?(?::{_NAME})?")

    def __init__(self, url: str | None = None) -> None:
        self._url = _address(url or os.environ.get("OLLAMA_HOST") or "127.0.0.1", 11434)

    def check(self, name: str, *, overwrite: bool) -> None:
        _require_name(name, self._names)
        try:
            _call(f"{self._url}/api/version", title=self.title)
        except Unreachable as error:
            here = shutil.which("ollama") is not None
            hint = "start it: ollama serve" if here else "install it from ollama.com/download, or give its --server"
            raise UserError(f"Ollama does not answer at {self._url}: {error}", where="ollama", hint=hint) from error
        try:
            there = bool(_call(f"{self._url}/api/show", {"model": name}, title=self.title, none_if=404))
        except Unreachable as error:
            raise _gone(self.title, error) from error
        if there and not overwrite:
            hint = "give another --name, or replace it with --overwrite"
            raise UserError(f"Ollama has a model '{name}' already", where="--name", hint=hint)

    def folder(self) -> Path | None:
        return None

    def create(self, name: str, file: Path, chat: Chat) -> str:
        digest = hashlib.sha256()
        with file.open("rb") as opened:
            for block in iter(lambda: opened.read(1 << 20), b""):
                digest.update(block)
        blob = f"sha256:{digest.hexdigest()}"
        made: dict[str, Any] = {"model": name, "files": {file.name: blob}, "stream": False}
        made |= {"template": chat.template} if chat.template else {}
        made |= {"system": chat.system} if chat.system else {}
        made |= {"parameters": {"stop": list(chat.stops)}} if chat.stops else {}
        try:
            if _call(f"{self._url}/api/blobs/{blob}", method="HEAD", title=self.title, none_if=404) is None:
                _call(f"{self._url}/api/blobs/{blob}", file=file, title=self.title)
            _call(f"{self._url}/api/create", made, title=self.title)
        except Unreachable as error:
            raise _gone(self.title, error) from error
        return f"Ollama has the model '{name}': ollama run {name}"

    def ask(self, name: str, prompt: str, chat: Chat, tokens: int, *, plain: bool) -> str:
        # Ollama's own default is a penalty on what was written before.
        options = {"temperature": 0, "repeat_penalty": 1.0, "seed": 0, "num_predict": tokens}
        asked: dict[str, Any] = {"model": name, "stream": False, "options": options}
        if plain:
            found = _call(f"{self._url}/api/generate", {**asked, "prompt": prompt, "raw": True}, title=self.title)
            return _text(found, "response")
        messages = [{"role": "user", "content": prompt}]  # the model has the system prompt
        return _text(_call(f"{self._url}/api/chat", {**asked, "messages": messages}, title=self.title), "message", "content")


class LMStudio:
    """LM Studio: its folder of models, and its local server where that runs.

    Args:
        url: where the server listens; None for its usual address.
        models: the folder of models; None for the usual one.
    """

    title = "LM Studio"
    _names = re.compile(_NAME)

    def __init__(self, url: str | None = None, models: str | Path | None = None) -> None:
        self._url = _address(url or "127.0.0.1", 1234)
        self._models = Path(models) if models is not None else Path.home() / ".lmstudio" / "models"

    def check(self, name: str, *, overwrite: bool) -> None:
        _require_name(name, self._names)
        if not self._models.is_dir():
            hint = "install it from lmstudio.ai and start it once, or give the folder of its models with --models"
            raise UserError("LM Studio has no folder of models here", where=str(self._models), hint=hint)
        there = self._models / _PUBLISHER / name
        if there.exists() and not overwrite:
            hint = "give another --name, or replace it with --overwrite"
            raise UserError(f"LM Studio has a model '{name}' already", where=str(there), hint=hint)

    def folder(self) -> Path | None:
        return self._models

    def create(self, name: str, file: Path, chat: Chat) -> str:
        to = self._models / _PUBLISHER / name / f"{name}.gguf"
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, to)
        except OSError as error:
            what = f"the file cannot be put there: {error.strerror or error}"
            raise UserError(what, where=str(to), hint="choose a folder that you may write to with --models") from error
        return f"LM Studio has the model '{_PUBLISHER}/{name}': {to}"

    def ask(self, name: str, prompt: str, chat: Chat, tokens: int, *, plain: bool) -> str:
        listed = _call(f"{self._url}/v1/models", title=self.title)
        known = [str(one.get("id")) for one in (listed or {}).get("data") or () if isinstance(one, Mapping)]
        model = next((one for one in known if name.lower() in re.split(r"[/@:]", one.lower())), None)
        if model is None:
            raise Unreachable(f"its server does not list '{name}' yet")
        asked: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": tokens, "repeat_penalty": 1.0}
        if plain:
            found = _call(f"{self._url}/v1/completions", {**asked, "prompt": prompt}, title=self.title)
            return _text(found, "choices", 0, "text")
        system = [{"role": "system", "content": chat.system}] if chat.system else []
        messages = [*system, {"role": "user", "content": prompt}]
        found = _call(f"{self._url}/v1/chat/completions", {**asked, "messages": messages}, title=self.title)
        return _text(found, "choices", 0, "message", "content")


def _address(given: str, port: int) -> str:
    """An address as both programs take it, ``host``, ``host:port`` or a URL, as a URL."""
    try:
        found = urlsplit(given if "://" in given else f"http://{given}")
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(found.hostname or "", found.hostname)
        if found.scheme not in ("http", "https") or not host:
            raise ValueError("it is no address of HTTP")
        shown = f"[{host}]" if ":" in host else host
        return f"{found.scheme}://{shown}:{found.port or port}"
    except ValueError as error:
        hint = f"write host:port, as 127.0.0.1:{port}"
        raise UserError(f"'{given}' is not an address: {error}", where="--server", hint=hint) from error


def _require_name(name: str, names: re.Pattern[str]) -> None:
    if not names.fullmatch(name):
        hint = "use letters, digits, '-', '_' and '.', as in --name my-model"
        raise UserError(f"'{name}' cannot be a model's name", where="--name", hint=hint)


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
        raise UserError(f"{title} refuses (status {error.code}): {said}", where=url, hint=f"see {title}'s log") from error
    except (OSError, ValueError, RecursionError) as error:
        raise Unreachable(first_line(error)) from error
    return found if isinstance(found, dict) else {}


def _text(value: Any, *path: str | int) -> str:
    """The text at a place of an answer; empty where there is none."""
    for key in path:
        found = isinstance(value, Mapping) or (isinstance(value, list) and isinstance(key, int) and key < len(value))
        value = (value.get(key) if isinstance(value, Mapping) else value[key]) if found else None
    return value if isinstance(value, str) else ""


def _gone(title: str, error: Exception) -> UserError:
    return UserError(f"{title} does not answer any more: {error}", where=title, hint="start it, and deploy again")
