"""Tests of ``/v1/embeddings`` and ``/v1/classify`` with the official client and with plain requests."""

from __future__ import annotations

import base64
import contextlib

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
openai = pytest.importorskip("openai", reason="the official client is not installed: it is in 'dev'")

from deltaw.serving.encoders import Encoders, open_classifiers, read_embedder  # noqa: E402
from deltaw.serving.http.encoders import serve_encoders  # noqa: E402
from deltaw.serving.http.settings import ServerSettings  # noqa: E402
from tests.serving.encoder_models import TEXTS  # noqa: E402
from tests.serving.http.server_thread import run_server  # noqa: E402

LOAD_OPTIONS = {"precision": "fp32", "device": "cpu", "log": print}


@contextlib.contextmanager
def serve_client(encoders: Encoders):
    """Serve encoders. Yield the server, the official client and the models."""
    settings = ServerSettings(port=0)
    served = serve_encoders(encoders, "bert", "bert", settings.limits)
    with contextlib.closing(encoders), run_server(served, settings) as server:
        assert server.request_queue is None
        yield server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0), encoders.models


@pytest.fixture(scope="module")
def embedder(bert):
    with serve_client(Encoders({"bert": read_embedder(str(bert), **LOAD_OPTIONS)})) as resources:
        yield resources


@pytest.fixture(scope="module")
def classifier(bert, runs):
    with serve_client(
        open_classifiers(str(bert), "bert", {n: str(folder) for n, folder in runs.items()}, **LOAD_OPTIONS)
    ) as resources:
        yield resources


def outputs(model, texts: list[str]) -> np.ndarray:
    return model.outputs([model.tokens(text) for text in texts]).numpy()


def check_close(left: object, right: object) -> None:
    np.testing.assert_allclose(np.asarray(left), np.asarray(right), atol=2e-5)


def test_official_client_receives_model_vectors(embedder):
    _, api, models = embedder
    expected = outputs(models["bert"], TEXTS)
    tokens = [models["bert"].tokens(text).tolist() for text in TEXTS]
    assert [m.id for m in api.models.list()] == ["bert"]
    for request in ({"input": TEXTS}, {"input": TEXTS, "encoding_format": "float"}, {"input": tokens}):
        response = api.embeddings.create(model="bert", **request)  # by default, the client requests base64
        check_close([d.embedding for d in response.data], expected)
        assert [d.index for d in response.data] == [0, 1, 2, 3]
        assert response.usage.prompt_tokens == response.usage.total_tokens == sum(map(len, tokens))
    for single in (TEXTS[1], tokens[1]):
        check_close(api.embeddings.create(model="bert", input=single).data[0].embedding, expected[1])


def test_base64_is_little_endian_fp32(embedder):
    server, _, models = embedder
    body = {"model": "bert", "input": "text", "encoding_format": "base64"}
    encoded = server.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    check_close(np.frombuffer(base64.b64decode(encoded), dtype="<f4"), outputs(models["bert"], ["text"])[0])


def test_dimensions_are_limited_to_trained_values(embedder):
    def vector(**fields: int) -> np.ndarray:
        return np.asarray(embedder[1].embeddings.create(model="bert", input="text", **fields).data[0].embedding)

    full = vector()
    check_close(vector(dimensions=8), full[:8] / np.linalg.norm(full[:8]))
    assert len(vector(dimensions=32)) == 32
    with pytest.raises(openai.BadRequestError, match="8, 32"):
        vector(dimensions=16)


def test_invalid_embedding_requests_are_rejected(embedder):
    inputs = [[], [[]], ["a", 1], [1, -1], [259], "x" * 70, "x" * 3_000_000, None, ["a"] * 2049]
    invalid = [*({"input": value} for value in inputs), {"encoding_format": "hex"}, {"dimensions": 0}, {"inputs": "a"}]
    for changes, status in ({"model": "other"}, 404), *((fields, 400) for fields in invalid), ({}, 200):
        response = embedder[0].post("/v1/embeddings", json={"model": "bert", "input": "a"} | changes)
        assert response.status_code == status and (status == 200 or response.json()["error"]["message"])


def test_classify_response_matches_vllm_format(classifier, embedder):
    server, api, models = classifier
    assert {m.id for m in api.models.list()} == set(models)
    tokens = sum(len(embedder[2]["bert"].tokens(text)) for text in TEXTS)
    for name, model in models.items():
        expected = outputs(model, TEXTS)
        response = server.post("/v1/classify", json={"model": name, "input": TEXTS}).json()
        assert (response["object"], response["model"]) == ("list", name) and response["id"].startswith("classify-")
        check_close([item["probs"] for item in response["data"]], expected)
        labels = [model.classes[index] for index in expected.argmax(1)]
        shape = [(n, len(model.classes), label) for n, label in enumerate(labels)]
        assert [(item["index"], item["num_classes"], item["label"]) for item in response["data"]] == shape
        assert response["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}


def test_server_has_only_routes_of_its_models(embedder, classifier):
    body = {"model": "bert", "input": "a"}
    for server, path in (embedder, "classify"), (classifier, "embeddings"), (embedder, "chat/completions"):
        assert server[0].post(f"/v1/{path}", json=body).status_code == 404
    assert classifier[0].post("/v1/classify", json=body).status_code == 404, "the base without an adapter has no head"
    paths = embedder[0].get("/openapi.json").json()["paths"]
    assert "/v1/embeddings" in paths and "/v1/classify" not in paths


def test_classify_response_names_classes(classifier):
    server, _, models = classifier
    name = next(iter(models))
    (item,) = server.post("/v1/classify", json={"model": name, "input": "a"}).json()["data"]
    assert list(item["probabilities"]) == list(models[name].classes)
    assert list(item["probabilities"].values()) == item["probs"]
    assert item["label"] == max(item["probabilities"], key=item["probabilities"].__getitem__)
