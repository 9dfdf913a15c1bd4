"""Build the HTML pages as single documents with a strict Content-Security-Policy.

HTML, styles and scripts are files next to this module. The policy permits only the style and script with these hashes,
and connections to the same server.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Callable
from importlib import resources
from typing import NamedTuple

from fastapi import APIRouter, Request, Response

from deltaw.inference.prompting import Prompting
from deltaw.serving.http.errors import json_response

# In dependency order.
SCRIPTS = ("stream.js", "difference.js", "tokens.js", "answers.js", "chat.js")
# Supported only in a header. Browsers ignore it in a document.
FRAME_POLICY = "frame-ancestors 'none'"
BASE_POLICY = "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"


# In addition to those of every response (:data:`deltaw.serving.http.guard.SECURITY_HEADERS`).
HEADERS = {"Cache-Control": "no-cache", "Cross-Origin-Opener-Policy": "same-origin"}


class HTMLPage(NamedTuple):
    """Complete page.

    Attributes:
        content: HTML in UTF-8.
        policy: Value of the header Content-Security-Policy.
        tag: Entity tag of the content.
    """

    content: bytes
    policy: str
    tag: str


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the hash source of an inline style or script (Content Security Policy Level 3, section 2.3.1)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def chat_page() -> HTMLPage:
    """Return the chat page."""
    return _document("page.html", ("style.css",), SCRIPTS)


def trial_page(kind: str) -> HTMLPage:
    """Return the page to try texts with a classifier, an embedding model or a reranker.

    Args:
        kind: "classes", "numbers", "vectors" or "scores".
    """
    return _document("try.html", ("style.css", "try.css"), ("stream.js", "try.js"), kind)


@functools.cache
def _document(html: str, style_files: tuple[str, ...], script_files: tuple[str, ...], kind: str = "") -> HTMLPage:
    """Build a page."""
    style = "".join(map(_read, style_files))
    script = "".join(['"use strict";\n(() => {\n', *map(_read, script_files), "})();\n"])
    sources = f"style-src {_hash(style)}; script-src {_hash(script)}"
    policy = f"default-src 'none'; {sources}; connect-src 'self'; img-src data:; {BASE_POLICY}"
    page = _read(html)
    for name, text in (("policy", policy), ("kind", kind), ("style", style), ("script", script)):
        page = page.replace("{{ " + name + " }}", text, 1)
    content = page.encode()
    return HTMLPage(content, f"{policy}; {FRAME_POLICY}", f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def page_router(
    prompting: Callable[[str], Prompting] = lambda model: Prompting(),
    document: HTMLPage | None = None,
    *,
    images: bool = False,
) -> APIRouter:
    """Return the routes of a page: ``GET /`` and ``GET /prompting/NAME``, the initial prompt of a model.

    ``GET /`` needs no API key. The page requests it from the user if the server requires one.

    Args:
        prompting: Returns the prompting of a model's training rows by the name of the model.
        document: The page, or None for the chat page.
        images: True if the model reads images.
    """
    router = APIRouter()
    document = document or chat_page()

    @router.get("/prompting/{model:path}", include_in_schema=False)
    def of_model(model: str) -> Response:
        initial = prompting(model)
        return json_response({"system": initial.system, "examples": list(initial.examples), "images": images})

    @router.get("/", include_in_schema=False)
    def page(request: Request) -> Response:
        headers = {**HEADERS, "Content-Security-Policy": document.policy, "ETag": document.tag}
        if request.headers.get("if-none-match") == document.tag:
            return Response(status_code=304, headers=headers)
        return Response(document.content, media_type="text/html; charset=utf-8", headers=headers)

    return router
