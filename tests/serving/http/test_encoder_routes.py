"""`/v1/embeddings` and `/v1/classify` by the official client and as plain requests."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
openai = pytest.importorskip("openai", reason="the official client is not installed: it is in 'dev'")
import httpx  # noqa: E402

from deltaw.serving.encoders import (  # noqa: E402
    Encoders,
    open_classifiers,
    open_embedder,
)
from deltaw.serving.http.encoders import encoders_served  # noqa: E402
from deltaw.serving.http.settings import ServerSettings  # noqa: E402
from tests.byte_models import byte_tokenizer  # noqa: E402
from tests.serving.encoder_models import TEXTS  # noqa: E402
from tests.serving.http.running import running  # noqa: E402


@contextlib.contextmanager
def serving(encoders: Encoders, name: str) -> Iterator[str]:
    settings = ServerSettings(port=0)
    try:
        with running(encoders_served(encoders, name, name, settings.limits), settings) as server:
            assert server.desk is None
            yield server.url
    finally:
        encoders.close()


@pytest.fixture(scope="module")
def embedder(bert):
    encoders = open_embedder(str(bert), "bert", precision="fp32", device="cpu", say=print)
    with serving(encoders, "bert") as url:
        yield url, encoders.models["bert"]


@pytest.fixture(scope="module")
def classifier(bert, runs):
    named = {name: str(runs[name]) for name in ("mood", "topic")}
    encoders = open_classifiers(str(bert), "bert", named, precision="fp32", device="cpu", say=print)
    with serving(encoders, "bert") as url:
        yield url, encoders


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)


def close(left: object, right: object) -> None:
    np.testing.assert_allclose(np.asarray(left), np.asarray(right), atol=2e-5)


def test_the_official_client_gets_the_models_vectors(embedder):
    url, model = embedder
    expected = model.outputs([model.tokens(text) for text in TEXTS]).numpy()
    api = client(url)
    assert [m.id for m in api.models.list()] == ["bert"]
    for form in ({}, {"encoding_format": "float"}):  # without a word the client asks for base64
        found = api.embeddings.create(model="bert", input=TEXTS, **form)
        close([d.embedding for d in found.data], expected)
        assert [d.index for d in found.data] == [0, 1, 2, 3]
    tokens = [model.tokens(text).tolist() for text in TEXTS]
    assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, tokens))
    close(api.embeddings.create(model="bert", input=TEXTS[1]).data[0].embedding, expected[1])
    close([d.embedding for d in api.embeddings.create(model="bert", input=tokens).data], expected)
    close(api.embeddings.create(model="bert", input=tokens[2]).data[0].embedding, expected[2])


def test_base64_is_little_endian_fp32(embedder):
    url, model = embedder
    body = {"model": "bert", "input": "text", "encoding_format": "base64"}
    sent = httpx.post(f"{url}/v1/embeddings", json=body).json()["data"][0]["embedding"]
    raw = np.frombuffer(base64.b64decode(sent), dtype="<f4")
    close(raw, model.outputs([model.tokens("text")])[0].numpy())


def test_fewer_dimensions_only_where_the_model_was_trained_for_them(embedder):
    url, _ = embedder
    api = client(url)
    whole = np.asarray(api.embeddings.create(model="bert", input="text").data[0].embedding)
    cut = np.asarray(api.embeddings.create(model="bert", input="text", dimensions=8).data[0].embedding)
    close(cut, whole[:8] / np.linalg.norm(whole[:8]))
    assert len(api.embeddings.create(model="bert", input="text", dimensions=32).data[0].embedding) == 32
    with pytest.raises(openai.BadRequestError, match="8, 32"):
        api.embeddings.create(model="bert", input="text", dimensions=16)


def test_what_cannot_be_embedded_is_refused_in_words(embedder):
    inputs = [[], [[]], ["a", 1], [1, -1], [259], "x" * 70, "x" * 3_000_000, None, ["a"] * 2049]
    wrong = [*({"input": value} for value in inputs), {"encoding_format": "hex"}, {"dimensions": 0}, {"inputs": "a"}]

    def status(changes):
        answer = httpx.post(f"{embedder[0]}/v1/embeddings", json={"model": "bert", "input": "a"} | changes)
        assert answer.status_code == 200 or answer.json()["error"]["message"]
        return answer.status_code

    assert status({"model": "other"}) == 404
    assert [status(changes) for changes in wrong] == [400] * len(wrong)
    assert status({}) == 200


def test_classes_come_in_vllms_shape_from_the_adapter_that_the_model_names(classifier):
    url, encoders = classifier
    assert {m.id for m in client(url).models.list()} == {"mood", "topic"}
    for name, count in (("mood", 3), ("topic", 2)):
        model = encoders.models[name]
        expected = model.outputs([model.tokens(text) for text in TEXTS]).numpy()
        told = httpx.post(f"{url}/v1/classify", json={"model": name, "input": TEXTS}).json()
        assert told["object"] == "list" and told["model"] == name and told["id"].startswith("classify-")
        for index, one in enumerate(told["data"]):
            assert one["index"] == index and one["num_classes"] == count
            close(one["probs"], expected[index])
            assert one["label"] == model.classes[int(expected[index].argmax())]
        tokens = sum(len(byte_tokenizer()(text)["input_ids"]) for text in TEXTS)
        assert told["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
    assert httpx.post(f"{url}/v1/classify", json={"model": "bert", "input": "a"}).status_code == 404


def test_each_server_has_the_routes_of_its_models_alone(embedder, classifier):
    body = {"model": "bert", "input": "a"}
    assert httpx.post(f"{embedder[0]}/v1/classify", json=body).status_code == 404
    assert httpx.post(f"{classifier[0]}/v1/embeddings", json=body).status_code == 404
    assert httpx.post(f"{embedder[0]}/v1/chat/completions", json=body).status_code == 404
    paths = httpx.get(f"{embedder[0]}/openapi.json").json()["paths"]
    assert "/v1/embeddings" in paths and "/v1/classify" not in paths
