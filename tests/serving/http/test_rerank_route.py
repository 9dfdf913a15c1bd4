"""Tests of ``/v1/rerank`` with a run of ``task: reranking`` whose inputs have token type ids."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import BertModel

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("httpx", reason="the server tests require httpx (extra 'dev')")

from deltaw.inference.open_run import open_run
from deltaw.runs.fit import fit
from deltaw.serving.encoders import detect_output_kind
from deltaw.serving.http.opening import OpenOptions, open_any
from deltaw.serving.http.settings import Limits, ServerSettings
from tests.conftest import deep_merge, write_rows
from tests.data.label_models import WORDS, word_tokenizer
from tests.serving.encoder_models import bert_config, train_classifier
from tests.serving.http.server_thread import run_server

QUERY = "good film"
DOCUMENTS = ["bad plot", "very good", "so it is the film", "bad plot"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reranker")
    torch.manual_seed(0)
    BertModel(bert_config()).save_pretrained(folder / "bert")
    word_tokenizer().save_pretrained(folder / "bert")
    rows = [{"query": f"{w} film", "passages": [w, "plot", "the"], "labels": [1, 0, 0]} for w in WORDS]
    settings = {"model": str(folder / "bert"), "task": "reranking", "output": str(folder / "run")}
    settings |= {"data": {"train": str(write_rows(folder / "rows.jsonl", rows))}, "precision": "fp32", "device": "cpu"}
    settings["train"] = {"learning_rate": 1e-2, "batch_size": 4, "max_steps": 8}
    return fit(deep_merge(settings, {"lora": {"rank": 2, "alpha": 4}, "threads": 1})).output


@pytest.fixture(scope="module")
def server(run):
    opening = OpenOptions(name="ranker", precision="fp32", device="cpu")
    served = open_any(str(run), {}, opening, Limits(prompt=60), log=lambda line: None)
    with contextlib.closing(served), run_server(served, ServerSettings(port=0, limits=Limits(prompt=60))) as started:
        yield started


def send_rerank(server, **changes: object):
    return server.post("/v1/rerank", json={"model": "ranker", "query": QUERY, "documents": DOCUMENTS} | changes)


def test_scores_match_model_and_are_sorted_stably(run, server):
    session = open_run(str(run), precision="fp32", device="cpu", log=lambda line: None)
    tokenizer = word_tokenizer()
    expected = []
    tokens = 0
    for document in DOCUMENTS:
        inputs = tokenizer(QUERY, document, return_tensors="pt")
        with torch.no_grad():
            expected.append(float(session.model(**inputs).logits.sigmoid()))
        tokens += inputs["input_ids"].numel()
    response = send_rerank(server).json()
    assert response["model"] == "ranker" and response["id"].startswith("rerank-")
    assert response["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    order = [item["index"] for item in response["results"]]
    assert order == sorted(range(4), key=lambda n: (-round(expected[n], 6), n)) and order.index(0) < order.index(3)
    scores = [item["relevance_score"] for item in response["results"]]
    assert scores == pytest.approx([expected[n] for n in order], abs=1e-5)
    assert len({round(score, 5) for score in expected}) == 3
    assert [item["document"] for item in response["results"]] == [{"text": DOCUMENTS[n]} for n in order]
    top_two = send_rerank(server, top_n=2, return_documents=False, documents=[{"text": t} for t in DOCUMENTS]).json()
    assert [item["index"] for item in top_two["results"]] == order[:2] and "document" not in top_two["results"][0]


def test_invalid_rerank_requests_are_rejected(server):
    invalid = [{"documents": value} for value in ([], "a", [1], [{"text": "a", "title": "b"}], ["a"] * 2049, [None])]
    invalid += [{"query": 1}, {"query": None}, {"top_n": 0}, {"top_n": 1.5}, {"inputs": "a"}, {"max_chunks_per_doc": 1}]
    long = "good " * 61
    invalid += [{"documents": [long]}, {"query": long}, {"documents": [" ".join(["good"] * 20)] * 3}]
    for changes, status in ({"model": "other"}, 404), *((fields, 400) for fields in invalid), ({}, 200):
        response = send_rerank(server, **changes)
        assert response.status_code == status and (status == 200 or response.json()["error"]["message"]), changes
    for path in "embeddings", "classify", "chat/completions":
        assert server.post(f"/v1/{path}", json={"model": "ranker", "input": "a"}).status_code == 404
    assert "/v1/rerank" in server.get("/openapi.json").json()["paths"]


def test_reranking_run_is_detected_and_rejects_other_tasks(run, bert, tmp_path):
    from deltaw.errors import UserError

    other = train_classifier(bert, tmp_path / "mood", ("bad", "good"))
    assert [detect_output_kind(str(folder)) for folder in (run, other)] == ["scores", "classes"]
    with pytest.raises(UserError, match="a model for sequence-classification, which does not return scores"):
        open_any(str(run), {"mood": other}, OpenOptions(name="ranker"), Limits(), log=lambda line: None)
