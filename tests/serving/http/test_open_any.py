"""What a reference names decides what is served: texts with a page, vectors, or classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from deltaw.errors import UserError
from tests.serving.encoder_models import write_llama

if TYPE_CHECKING:
    from fastapi.testclient import TestClient


def client_of(served: Any) -> TestClient:
    from fastapi.testclient import TestClient

    from deltaw.serving.http.app import create_app
    from deltaw.serving.http.settings import ServerSettings

    app, _ = create_app(served, ServerSettings(keys=("a-key-of-tests",)))
    return TestClient(app, base_url="http://localhost", headers={"Authorization": "Bearer a-key-of-tests"})


@pytest.fixture
def opened(packages: None) -> Any:
    from deltaw.serving.http.opening import Opening, open_any
    from deltaw.serving.http.settings import Limits

    made: list[Any] = []

    def opens(base: Path, folders: dict[str, Path] | None = None, **changes: Any) -> Any:
        opening = Opening(precision="fp32", device="cpu", cache_bytes=1 << 22, **changes)
        made.append(open_any(str(base), folders or {}, opening, Limits(), say=lambda line: None))
        return made[-1]

    yield opens
    for served in made:
        served.close()


def test_a_model_that_writes_text_has_a_page_unless_told_otherwise(tmp_path: Path, opened: Any) -> None:
    base = write_llama(tmp_path / "llama")
    client = client_of(opened(base, name="llama"))
    page = client.get("/", headers={"Authorization": ""})
    assert page.status_code == 200 and "<html" in page.text and client.get("/v1/models").status_code == 200
    bare = client_of(opened(base, name="llama", page=False))
    assert bare.get("/").status_code == 404


def test_an_encoder_gives_vectors(tmp_path: Path, bert: Path, opened: Any) -> None:
    client = client_of(opened(bert, name="bert"))
    answer = client.post("/v1/embeddings", json={"model": "bert", "input": ["a", "b"]})
    assert answer.status_code == 200 and len(answer.json()["data"]) == 2
    refused = client.post("/v1/chat/completions", json={"model": "bert", "messages": []})
    assert refused.status_code == 404 and client.get("/ready").status_code == 200
    with pytest.raises(UserError, match="without adapters"):
        opened(bert, {"a": tmp_path})


def test_a_classifiers_run_gives_classes_under_its_folders_name(runs: dict[str, Path], opened: Any) -> None:
    client = client_of(opened(runs["mood"]))
    answer = client.post("/v1/classify", json={"model": "mood", "input": "good number 1"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"][0]["label"] in ("bad", "fine", "good")
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["mood"]
