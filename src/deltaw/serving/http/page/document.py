"""The chat page as one document, and the policy under which a browser runs it.

The parts lie beside this module: a page, its style and its scripts. The policy names the style and the script
by their hashes and lets the page talk to its own server alone. Knows nothing of models or engines.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Callable
from importlib import resources
from typing import NamedTuple

from fastapi import APIRouter, Request, Response

from deltaw.serving.http.errors import json_response
from deltaw.training.prompting import Prompting

# In this order: each uses what those before it define.
SCRIPTS = ("stream.js", "difference.js", "tokens.js", "answers.js", "chat.js")
# What only a header can say; browsers pass over it in a document.
FRAMES = "frame-ancestors 'none'"
FORBIDDEN = "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"


HEADERS = {
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Document(NamedTuple):
    """The page as it is sent.

    Attributes:
        content: HTML in UTF-8. policy: the value of the header Content-Security-Policy.
        tag: an entity tag; another one for every other content.
    """

    content: bytes
    policy: str
    tag: str


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a policy names an inline style or script (Content Security Policy Level 3, section 2.3.1)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def chat_page() -> Document:
    """The chat page."""
    return _document("page.html", ("style.css",), SCRIPTS)


def trial_page(kind: str) -> Document:
    """The page on which a text is tried, of a server that gives classes, vectors or scores.

    Args:
        kind: "classes", "vectors" or "scores".
    """
    return _document("try.html", ("style.css", "try.css"), ("stream.js", "try.js"), kind)


@functools.cache
def _document(html: str, styles_of: tuple[str, ...], scripts: tuple[str, ...], kind: str = "") -> Document:
    """A page, put together once."""
    style = "".join(map(_read, styles_of))
    script = "".join(['"use strict";\n(() => {\n', *map(_read, scripts), "})();\n"])
    styles = f"style-src {_hash(style)}; script-src {_hash(script)}"
    policy = f"default-src 'none'; {styles}; connect-src 'self'; img-src data:; {FORBIDDEN}"
    page = _read(html)
    for name, text in (("policy", policy), ("kind", kind), ("style", style), ("script", script)):
        page = page.replace("{{ " + name + " }}", text, 1)
    content = page.encode()
    return Document(content, f"{policy}; {FRAMES}", f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def page_router(
    prompting: Callable[[str], Prompting] = lambda model: Prompting(), document: Document | None = None
) -> APIRouter:
    """``GET /``: the page, which needs no API key and asks for one where the server wants it; and
    ``GET /prompting/NAME``, what it begins with.

    Args:
        prompting: how the rows of a model's run are prompted, by the name of the model.
        document: The page; None for the chat page.
    """
    router = APIRouter()
    document = document or chat_page()

    @router.get("/prompting/{model:path}", include_in_schema=False)
    def of_model(model: str) -> Response:
        found = prompting(model)
        return json_response({"system": found.system, "examples": list(found.examples)})

    @router.get("/", include_in_schema=False)
    def page(request: Request) -> Response:
        headers = {**HEADERS, "Content-Security-Policy": document.policy, "ETag": document.tag}
        if request.headers.get("if-none-match") == document.tag:
            return Response(status_code=304, headers=headers)
        return Response(document.content, media_type="text/html; charset=utf-8", headers=headers)

    return router
