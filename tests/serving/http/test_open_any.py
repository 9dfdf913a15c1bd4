"""Tests that a reference determines the served output: text with a page, vectors, or classes."""

from __future__ import annotations

import base64
import contextlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from deltaw.decoding.probes import NotDecodable
from deltaw.errors import UserError
from deltaw.inference.open_run import open_run
from deltaw.inference.prompting import Prompting, write_prompting
from tests.serving.encoder_models import train_embedder


@pytest.fixture
def serve(packages: None) -> Any:
    """Return a function that serves a model and returns its client."""
    from fastapi.testclient import TestClient

    from deltaw.serving.http.app import create_app
    from deltaw.serving.http.opening import OpenOptions, open_any
    from deltaw.serving.http.settings import Limits, ServerSettings

    with contextlib.ExitStack() as stack:

        def open_client(base: Path, folders: dict[str, Path] | None = None, **changes: Any) -> Any:
            opening = OpenOptions(**{"precision": "fp32", "device": "cpu", "cache_bytes": 1 << 22, **changes})
            served = open_any(str(base), folders or {}, opening, Limits(), log=lambda line: None)
            stack.callback(served.close)
            app, _ = create_app(served, ServerSettings(keys=("a-key-of-tests",)))
            return TestClient(app, base_url="http://localhost", headers={"Authorization": "Bearer a-key-of-tests"})

        yield open_client


@pytest.mark.parametrize("page", [True, False])
def test_text_model_has_page_unless_disabled(model_folder, serve, page):
    client = serve(model_folder, name="llama", page=page)
    response = client.get("/", headers={"Authorization": ""} if page else {})
    assert (response.status_code, "<html" in response.text) == ((200, True) if page else (404, False))
    assert client.get("/v1/models").status_code == 200


@pytest.mark.parametrize("decoder", [True, False])
def test_prompt_format_of_run_is_available_with_key(finished_run, tmp_path, serve, monkeypatch, decoder):
    from deltaw.serving.http import opening

    def raise_not_decodable(*_, **__):
        raise NotDecodable("simulated unsupported blocks")

    if not decoder:
        monkeypatch.setattr(opening, "build_decodable", raise_not_decodable)
    run = shutil.copytree(finished_run, tmp_path / "mine")
    client = serve(run, name="base")
    for prompting in (Prompting("Be brief.", examples=("paint it red",)), Prompting()):
        write_prompting(run, prompting)
        expected = {"system": prompting.system, "examples": [*prompting.examples], "images": False}
        assert client.get("/prompting/mine").json() == expected
    assert client.get("/prompting/base").json() == {"system": "", "examples": [], "images": False}
    assert client.get("/prompting/other").status_code == 404
    assert client.get("/prompting/mine", headers={"Authorization": ""}).status_code == 401


@pytest.mark.parametrize("decoder", [True, False])
def test_system_prompt_of_run_is_added_to_chats_without_one(finished_run, tmp_path, serve, monkeypatch, decoder):
    from deltaw.serving.http import opening

    def raise_not_decodable(*_, **__):
        raise NotDecodable("simulated unsupported blocks")

    if not decoder:
        monkeypatch.setattr(opening, "build_decodable", raise_not_decodable)
    run = shutil.copytree(finished_run, tmp_path / "mine")
    write_prompting(run, Prompting("Be brief."))
    question = {"role": "user", "content": "hi"}
    system = {"role": "system", "content": "Be brief."}

    def prompt_tokens(client: Any, *messages: dict[str, str], **fields: Any) -> int:
        body = {"model": "mine", "messages": list(messages), "max_tokens": 1, **fields}
        return client.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"]

    client = serve(run, name="base")
    unchanged = serve(run, name="base", system=False)
    with_system = prompt_tokens(client, system, question)
    without = prompt_tokens(unchanged, question)
    assert with_system > without + len("Be brief.")
    assert prompt_tokens(client, question) == with_system
    assert prompt_tokens(client, question, model="base") == without, "the base model has no rows"
    assert prompt_tokens(client, question, add_system_prompt=False) == without
    assert prompt_tokens(unchanged, system, question) == with_system


@pytest.mark.parametrize("precision, expected", [("nf4", "nf4"), ("int8", "auto")])
def test_text_run_is_served_in_its_precision(finished_run, tmp_path, serve, monkeypatch, precision, expected):
    from deltaw.serving.http import opening

    run = shutil.copytree(finished_run, tmp_path / "mine")
    opened = []
    settings = yaml.safe_load((run / "run.yaml").read_text())
    (run / "run.yaml").write_text(yaml.safe_dump(settings | {"precision": precision}))

    def open_and_record(base: str, **options: Any) -> Any:
        opened.append(options["precision"])
        return open_run(base, **{**options, "precision": "fp32"})

    monkeypatch.setattr(opening, "open_run", open_and_record)
    serve(run, precision="auto")
    assert opened == [expected]


def test_encoder_serves_embeddings(tmp_path, bert, serve):
    client = serve(bert, name="bert")
    response = client.post("/v1/embeddings", json={"model": "bert", "input": ["a", "b"]})
    assert response.status_code == 200 and len(response.json()["data"]) == 2
    assert client.post("/v1/chat/completions", json={"model": "bert", "messages": []}).status_code == 404
    assert client.get("/ready").status_code == 200
    with pytest.raises(UserError, match="with adapters"):
        serve(bert, {"a": tmp_path})


@pytest.mark.parametrize("kind", ["vectors", "classes"])
def test_encoders_have_trial_page(bert, runs, serve, kind):
    base = bert if kind == "vectors" else runs["mood"]
    response = serve(base).get("/", headers={"Authorization": ""})
    assert response.status_code == 200 and f'data-kind="{kind}"' in response.text
    assert serve(base, page=False).get("/").status_code == 404


def test_classifier_run_is_served_under_folder_name(runs, serve):
    client = serve(runs["mood"])
    response = client.post("/v1/classify", json={"model": "mood", "input": "good number 1"})
    assert response.status_code == 200, response.text
    assert response.json()["data"][0]["label"] in ("bad", "fine", "good")
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["mood"]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_embedding_run_serves_trained_dimensions(tmp_path, bert, serve, precision):
    run = train_embedder(bert, tmp_path / "mine", embedding={"dimensions": [32, 16], "pooling": "first"})
    texts = ["question 3", "a", "x" * 40]
    session = open_run(str(run), precision="fp32", device="cpu", log=lambda line: None)
    expected = []
    for text in texts:
        ids = torch.tensor([session.tokenizer(text)["input_ids"]])
        expected.append(session.model(input_ids=ids).last_hidden_state[0, 0].detach())
    client = serve(run, precision=precision)

    def vectors(**fields: Any) -> torch.Tensor:
        response = client.post("/v1/embeddings", json={"model": "mine", "input": texts, **fields})
        assert response.status_code == 200, response.text
        result = [item["embedding"] for item in response.json()["data"]]
        if fields.get("encoding_format") == "base64":
            result = [np.frombuffer(base64.b64decode(item), "<f4") for item in result]
        return torch.tensor(np.asarray(result, np.float32))

    min_similarity = {"fp32": 0.99999, "int8": 0.99}[precision]
    for count in (32, 16):
        truncated = torch.stack(expected)[:, :count]
        for result in (vectors(dimensions=count), vectors(dimensions=count, encoding_format="base64")):
            assert result.shape == (3, count)
            assert torch.nn.functional.cosine_similarity(result, truncated).min() > min_similarity
            assert torch.allclose(result.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.equal(vectors(), vectors(encoding_format="base64"))
    assert client.post("/v1/embeddings", json={"model": "mine", "input": "a", "dimensions": 8}).status_code == 400
