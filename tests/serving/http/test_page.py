"""Tests of the chat page as a document: self-contained, with a content security policy for its scripts."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
from fastapi import FastAPI
from fastapi.testclient import TestClient

from deltaw.serving.http import page
from deltaw.serving.http.page import SCRIPTS, HTMLPage, chat_page, page_router, trial_page


@pytest.fixture(params=["", "classes", "vectors", "scores"])
def document(request) -> HTMLPage:
    """The chat page and the trial pages."""
    return trial_page(request.param) if request.param else chat_page()


@pytest.fixture
def client(document) -> TestClient:
    app = FastAPI()
    app.include_router(page_router(document=document))
    return TestClient(app)


def csp_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_page_has_policy_and_is_cached_by_etag(client, document):
    first = client.get("/")
    assert first.status_code == 200 and first.headers["content-type"] == "text/html; charset=utf-8"
    policy = first.headers["content-security-policy"]
    assert policy == document.policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    cached = client.get("/", headers={"If-None-Match": first.headers["etag"]})
    assert cached.status_code == 304 and not cached.content
    assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200


def test_policy_contains_hashes_of_style_and_script(client, document):
    page = client.get("/").text
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    policy = document.policy
    assert f"style-src {csp_hash(style)};" in policy and f"script-src {csp_hash(script)};" in policy
    assert all(len(part) > 500 for part in (style, script))
    assert document != chat_page() or script.count("// ") >= len(SCRIPTS)
    assert "{{" not in page


def test_page_loads_no_external_resources_or_inline_handlers(client):
    page = client.get("/").text
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!#|data:image/svg)", page)
    assert not re.findall(r"<[^>]*\son\w+\s*=", page) and not re.findall(r"<[^>]*\sstyle\s*=", page)
    assert set(re.findall(r"https?://[^\s'\"]+", page)) <= {"http://www.w3.org/2000/svg"}
    assert "@import" not in page and "url(" not in page
    assert "innerHTML" not in page and "eval(" not in page


def test_page_is_not_in_openapi_schema(client):
    assert "/" not in client.get("/openapi.json").json()["paths"]


# Functions of browsers that the scripts call.
BROWSER_FUNCTIONS = {"fetch", "setTimeout", "clearTimeout", "encodeURIComponent", "createImageBitmap"}
JS_KEYWORDS = {"if", "for", "while", "switch", "catch", "function", "return", "await", "super", "constructor"}


def test_scripts_call_only_functions_that_exist():
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(page.__file__).parent.glob("*.js"))]
    text = re.sub(r"//.*|\"(?:[^\"\\\n]|\\.)*\"|`[^`]*`", "''", "\n".join(texts))
    called = set(re.findall(r"(?:(?<=\.\.\.)|(?<![.\w$#]))([a-z]\w*)\(", text)) - BROWSER_FUNCTIONS - JS_KEYWORDS
    defined = set(re.findall(r"(?:function\*?|const|let) (\w+)", text))
    defined |= set(re.findall(r"^ +(?:async |static |get |\*)?(\w+)\(.*\) \{", text, re.MULTILINE))  # methods
    defined |= set(re.findall(r"[({,]\s*(\w+)\s*(?=[,)}=])", text))  # parameters
    assert called <= defined
