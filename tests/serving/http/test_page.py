"""The chat page as a document: whole, without files from elsewhere, under a policy that names what runs."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
from fastapi import FastAPI
from fastapi.testclient import TestClient

from deltaw.serving.http.page.document import SCRIPTS, Document, chat_page, page_router, trial_page


@pytest.fixture(params=["", "classes", "vectors", "scores"])
def document(request) -> Document:
    """The chat page, and the pages on which a text is tried."""
    return trial_page(request.param) if request.param else chat_page()


@pytest.fixture
def client(document) -> TestClient:
    app = FastAPI()
    app.include_router(page_router(document=document))
    return TestClient(app)


def hashed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_page_comes_with_its_policy_and_is_not_sent_twice(client, document):
    first = client.get("/")
    assert first.status_code == 200 and first.headers["content-type"] == "text/html; charset=utf-8"
    policy = first.headers["content-security-policy"]
    assert policy == document.policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    again = client.get("/", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304 and not again.content
    assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200


def test_the_policy_names_the_inline_style_and_script(client, document):
    page = client.get("/").text
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    policy = document.policy
    assert f"style-src {hashed(style)};" in policy and f"script-src {hashed(script)};" in policy
    assert all(len(part) > 500 for part in (style, script))
    assert document != chat_page() or script.count("// ") >= len(SCRIPTS)
    assert "{{" not in page


def test_nothing_comes_from_elsewhere_and_nothing_runs_inline(client):
    page = client.get("/").text
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!#|data:image/svg)", page)
    assert not re.findall(r"<[^>]*\son\w+\s*=", page) and not re.findall(r"<[^>]*\sstyle\s*=", page)
    assert set(re.findall(r"https?://[^\s'\"]+", page)) <= {"http://www.w3.org/2000/svg"}
    assert "@import" not in page and "url(" not in page
    assert "innerHTML" not in page and "eval(" not in page


def test_the_page_is_not_part_of_the_api(client):
    assert "/" not in client.get("/openapi.json").json()["paths"]
