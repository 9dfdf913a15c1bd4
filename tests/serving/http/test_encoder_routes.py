"""`/v1/embeddings` and `/v1/classify` by the official client and as plain requests."""

from __future__ import annotations

import base64
import contextlib

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
openai = pytest.importorskip("openai", reason="the official client is not installed: it is in 'dev'")

from deltaw.serving.encoders import Encoders, open_classifiers, open_embedder  # noqa: E402
from deltaw.serving.http.encoders import encoders_served  # noqa: E402
from deltaw.serving.http.settings import ServerSettings  # noqa: E402
from tests.serving.encoder_models import TEXTS  # noqa: E402
from tests.serving.http.running import running  # noqa: E402

OPENED = {"precision": "fp32", "device": "cpu", "say": print}


@contextlib.contextmanager
def serving(encoders: Encoders):
    """A server of these, the official client of it, and the models."""
    settings = ServerSettings(port=0)
    served = encoders_served(encoders, "bert", "bert", settings.limits)
    with contextlib.closing(encoders), running(served, settings) as server:
        assert server.desk is None
        yield server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0), encoders.models


@pytest.fixture(scope="module")
def embedder(bert):
    with serving(open_embedder(str(bert), "bert", **OPENED)) as made:
        yield made


@pytest.fixture(scope="module")
def classifier(bert, runs):
    with serving(open_classifiers(str(bert), "bert", {n: str(folder) for n, folder in runs.items()}, **OPENED)) as made:
        yield made


def outputs(model, texts: list[str]) -> np.ndarray:
    return model.outputs([model.tokens(text) for text in texts]).numpy()


def close(left: object, right: object) -> None:
    np.testing.assert_allclose(np.asarray(left), np.asarray(right), atol=2e-5)


def test_the_official_client_gets_the_models_vectors(embedder):
    _, api, models = embedder
    expected = outputs(models["bert"], TEXTS)
    tokens = [models["bert"].tokens(text).tolist() for text in TEXTS]
    assert [m.id for m in api.models.list()] == ["bert"]
    for asked in ({"input": TEXTS}, {"input": TEXTS, "encoding_format": "float"}, {"input": tokens}):
        found = api.embeddings.create(model="bert", **asked)  # without a word the client asks for base64
        close([d.embedding for d in found.data], expected)
        assert [d.index for d in found.data] == [0, 1, 2, 3]
        assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, tokens))
    for one in (TEXTS[1], tokens[1]):
        close(api.embeddings.create(model="bert", input=one).data[0].embedding, expected[1])


def test_base64_is_little_endian_fp32(embedder):
    server, _, models = embedder
    body = {"model": "bert", "input": "text", "encoding_format": "base64"}
    sent = server.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    close(np.frombuffer(base64.b64decode(sent), dtype="<f4"), outputs(models["bert"], ["text"])[0])


def test_fewer_dimensions_only_where_the_model_was_trained_for_them(embedder):
    def vector(**asked: int) -> np.ndarray:
        return np.asarray(embedder[1].embeddings.create(model="bert", input="text", **asked).data[0].embedding)

    whole = vector()
    close(vector(dimensions=8), whole[:8] / np.linalg.norm(whole[:8]))
    assert len(vector(dimensions=32)) == 32
    with pytest.raises(openai.BadRequestError, match="8, 32"):
        vector(dimensions=16)


def test_what_cannot_be_embedded_is_refused_in_words(embedder):
    inputs = [[], [[]], ["a", 1], [1, -1], [259], "x" * 70, "x" * 3_000_000, None, ["a"] * 2049]
    wrong = [*({"input": value} for value in inputs), {"encoding_format": "hex"}, {"dimensions": 0}, {"inputs": "a"}]
    for changes, status in ({"model": "other"}, 404), *((one, 400) for one in wrong), ({}, 200):
        answer = embedder[0].post("/v1/embeddings", json={"model": "bert", "input": "a"} | changes)
        assert answer.status_code == status and (status == 200 or answer.json()["error"]["message"])


def test_classes_come_in_vllms_shape_from_the_adapter_that_the_model_names(classifier, embedder):
    server, api, models = classifier
    assert {m.id for m in api.models.list()} == set(models)
    tokens = sum(len(embedder[2]["bert"].tokens(text)) for text in TEXTS)
    for name, model in models.items():
        expected = outputs(model, TEXTS)
        told = server.post("/v1/classify", json={"model": name, "input": TEXTS}).json()
        assert (told["object"], told["model"]) == ("list", name) and told["id"].startswith("classify-")
        close([one["probs"] for one in told["data"]], expected)
        labels = [model.classes[place] for place in expected.argmax(1)]
        shape = [(n, len(model.classes), label) for n, label in enumerate(labels)]
        assert [(one["index"], one["num_classes"], one["label"]) for one in told["data"]] == shape
        assert told["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}


def test_each_server_has_the_routes_of_its_models_alone(embedder, classifier):
    body = {"model": "bert", "input": "a"}
    for server, path in (embedder, "classify"), (classifier, "embeddings"), (embedder, "chat/completions"):
        assert server[0].post(f"/v1/{path}", json=body).status_code == 404
    assert classifier[0].post("/v1/classify", json=body).status_code == 404, "the base alone has no head"
    paths = embedder[0].get("/openapi.json").json()["paths"]
    assert "/v1/embeddings" in paths and "/v1/classify" not in paths


def test_classes_come_with_their_names(classifier):
    server, _, models = classifier
    name = next(iter(models))
    (found,) = server.post("/v1/classify", json={"model": name, "input": "a"}).json()["data"]
    assert list(found["probabilities"]) == list(models[name].classes)
    assert list(found["probabilities"].values()) == found["probs"]
    assert found["label"] == max(found["probabilities"], key=found["probabilities"].__getitem__)
