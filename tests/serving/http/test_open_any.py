"""What a reference names decides what is served: texts with a page, vectors, or classes."""

from __future__ import annotations

import base64
import contextlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deltaw.errors import UserError
from deltaw.serving.probes import NotDecodable
from deltaw.training.origin import open_run
from deltaw.training.prompting import Prompting, write_prompting
from tests.serving.encoder_models import train_embedder


@pytest.fixture
def opened(packages: None) -> Any:
    """Opens what is served, and gives a client of it."""
    from fastapi.testclient import TestClient

    from deltaw.serving.http.app import create_app
    from deltaw.serving.http.opening import Opening, open_any
    from deltaw.serving.http.settings import Limits, ServerSettings

    with contextlib.ExitStack() as stack:

        def opens(base: Path, folders: dict[str, Path] | None = None, **changes: Any) -> Any:
            opening = Opening(**{"precision": "fp32", "device": "cpu", "cache_bytes": 1 << 22, **changes})
            served = open_any(str(base), folders or {}, opening, Limits(), say=lambda line: None)
            stack.callback(served.close)
            app, _ = create_app(served, ServerSettings(keys=("a-key-of-tests",)))
            return TestClient(app, base_url="http://localhost", headers={"Authorization": "Bearer a-key-of-tests"})

        yield opens


@pytest.mark.parametrize("page", [True, False])
def test_a_model_that_writes_text_has_a_page_unless_told_otherwise(model_folder, opened, page):
    client = opened(model_folder, name="llama", page=page)
    found = client.get("/", headers={"Authorization": ""} if page else {})
    assert (found.status_code, "<html" in found.text) == ((200, True) if page else (404, False))
    assert client.get("/v1/models").status_code == 200


@pytest.mark.parametrize("decoder", [True, False])
def test_the_page_learns_with_a_key_how_a_runs_rows_are_prompted(finished_run, tmp_path, opened, monkeypatch, decoder):
    from deltaw.serving.http import opening

    def refuse(*_, **__):
        raise NotDecodable("its blocks are made of glass")

    if not decoder:
        monkeypatch.setattr(opening, "decodable", refuse)
    run = shutil.copytree(finished_run, tmp_path / "mine")
    client = opened(run, name="base")
    asked = {"model": "mine", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    counted = []
    for prompting in (Prompting("Be brief.", examples=("paint it red",)), Prompting()):
        write_prompting(run, prompting)
        told = {"system": prompting.system, "examples": [*prompting.examples]}
        assert client.get("/prompting/mine").json() == told
        counted.append(client.post("/v1/chat/completions", json=asked).json()["usage"]["prompt_tokens"])
    assert counted[0] == counted[1], "clients of the API get what they ask for, and nothing more"
    assert client.get("/prompting/base").json() == {"system": "", "examples": []}
    assert client.get("/prompting/other").status_code == 404
    assert client.get("/prompting/mine", headers={"Authorization": ""}).status_code == 401


def test_an_encoder_gives_vectors(tmp_path, bert, opened):
    client = opened(bert, name="bert")
    answer = client.post("/v1/embeddings", json={"model": "bert", "input": ["a", "b"]})
    assert answer.status_code == 200 and len(answer.json()["data"]) == 2
    assert client.post("/v1/chat/completions", json={"model": "bert", "messages": []}).status_code == 404
    assert client.get("/ready").status_code == 200
    with pytest.raises(UserError, match="without adapters"):
        opened(bert, {"a": tmp_path})


@pytest.mark.parametrize("kind", ["vectors", "classes"])
def test_models_that_write_no_text_have_a_page_to_try_one(bert, runs, opened, kind):
    base = bert if kind == "vectors" else runs["mood"]
    found = opened(base).get("/", headers={"Authorization": ""})
    assert found.status_code == 200 and f'data-kind="{kind}"' in found.text
    assert opened(base, page=False).get("/").status_code == 404


def test_a_classifiers_run_gives_classes_under_its_folders_name(runs, opened):
    client = opened(runs["mood"])
    answer = client.post("/v1/classify", json={"model": "mood", "input": "good number 1"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"][0]["label"] in ("bad", "fine", "good")
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["mood"]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_embedding_run_gives_the_vectors_that_it_was_trained_for(tmp_path, bert, opened, precision):
    run = train_embedder(bert, tmp_path / "mine", embedding={"dimensions": [32, 16], "pooling": "first"})
    texts = ["question 3", "a", "x" * 40]
    session = open_run(str(run), precision="fp32", device="cpu", say=lambda line: None)
    expected = []
    for text in texts:
        ids = torch.tensor([session.tokenizer(text)["input_ids"]])
        expected.append(session.model(input_ids=ids).last_hidden_state[0, 0].detach())
    client = opened(run, precision=precision)

    def vectors(**asked: Any) -> torch.Tensor:
        answer = client.post("/v1/embeddings", json={"model": "mine", "input": texts, **asked})
        assert answer.status_code == 200, answer.text
        found = [one["embedding"] for one in answer.json()["data"]]
        if asked.get("encoding_format") == "base64":
            found = [np.frombuffer(base64.b64decode(one), "<f4") for one in found]
        return torch.tensor(np.asarray(found, np.float32))

    least = {"fp32": 0.99999, "int8": 0.99}[precision]
    for count in (32, 16):
        cut = torch.stack(expected)[:, :count]
        for found in (vectors(dimensions=count), vectors(dimensions=count, encoding_format="base64")):
            assert found.shape == (3, count)
            assert torch.nn.functional.cosine_similarity(found, cut).min() > least
            assert torch.allclose(found.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.equal(vectors(), vectors(encoding_format="base64"))
    assert client.post("/v1/embeddings", json={"model": "mine", "input": "a", "dimensions": 8}).status_code == 400
