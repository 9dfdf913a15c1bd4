"""`/v1/rerank` over a run of `task: reranking`, with segments that tell the two texts apart."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import BertModel

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("httpx", reason="the server's tests need httpx: it is in the extra 'dev'")

from deltaw.runs.fit import fit
from deltaw.serving.encoders import what_it_serves
from deltaw.serving.http.opening import Opening, open_any
from deltaw.serving.http.settings import Limits, ServerSettings
from deltaw.training.origin import open_run
from tests.conftest import laid_over, write_rows
from tests.data.label_models import WORDS, word_tokenizer
from tests.serving.encoder_models import bert_config, train_classifier
from tests.serving.http.running import running

QUERY, DOCUMENTS = "good film", ["bad plot", "very good", "so it is the film", "bad plot"]


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
    return fit(laid_over(settings, {"lora": {"rank": 2, "alpha": 4}, "threads": 1})).output


@pytest.fixture(scope="module")
def server(run):
    opening = Opening(name="ranker", precision="fp32", device="cpu")
    served = open_any(str(run), {}, opening, Limits(prompt=60), say=lambda line: None)
    with contextlib.closing(served), running(served, ServerSettings(port=0, limits=Limits(prompt=60))) as started:
        yield started


def asked(server, **changes: object):
    return server.post("/v1/rerank", json={"model": "ranker", "query": QUERY, "documents": DOCUMENTS} | changes)


def test_scores_are_the_models_own_best_first_and_equal_ones_in_their_order(run, server):
    opened = open_run(str(run), precision="fp32", device="cpu", say=lambda line: None)
    tokenizer, expected, tokens = word_tokenizer(), [], 0
    for document in DOCUMENTS:
        inputs = tokenizer(QUERY, document, return_tensors="pt")
        with torch.no_grad():
            expected.append(float(opened.model(**inputs).logits.sigmoid()))
        tokens += inputs["input_ids"].numel()
    told = asked(server).json()
    assert told["model"] == "ranker" and told["id"].startswith("rerank-")
    assert told["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    order = [one["index"] for one in told["results"]]
    assert order == sorted(range(4), key=lambda n: (-round(expected[n], 6), n)) and order.index(0) < order.index(3)
    assert [one["relevance_score"] for one in told["results"]] == pytest.approx([expected[n] for n in order], abs=1e-5)
    assert len({round(score, 5) for score in expected}) == 3
    assert [one["document"] for one in told["results"]] == [{"text": DOCUMENTS[n]} for n in order]
    few = asked(server, top_n=2, return_documents=False, documents=[{"text": text} for text in DOCUMENTS]).json()
    assert [one["index"] for one in few["results"]] == order[:2] and "document" not in few["results"][0]


def test_what_cannot_be_ranked_is_refused_in_words(server):
    wrong = [{"documents": value} for value in ([], "a", [1], [{"text": "a", "title": "b"}], ["a"] * 2049, [None])]
    wrong += [{"query": 1}, {"query": None}, {"top_n": 0}, {"top_n": 1.5}, {"inputs": "a"}, {"max_chunks_per_doc": 1}]
    long = "good " * 61
    wrong += [{"documents": [long]}, {"query": long}, {"documents": [" ".join(["good"] * 20)] * 3}]
    for changes, status in ({"model": "other"}, 404), *((one, 400) for one in wrong), ({}, 200):
        answer = asked(server, **changes)
        assert answer.status_code == status and (status == 200 or answer.json()["error"]["message"]), changes
    for path in "embeddings", "classify", "chat/completions":
        assert server.post(f"/v1/{path}", json={"model": "ranker", "input": "a"}).status_code == 404
    assert "/v1/rerank" in server.get("/openapi.json").json()["paths"]


def test_a_run_says_what_it_serves_and_takes_no_adapter_of_another_task(run, bert, tmp_path):
    from deltaw.errors import UserError

    other = train_classifier(bert, tmp_path / "mood", ("bad", "good"))
    assert [what_it_serves(str(folder)) for folder in (run, other)] == ["scores", "classes"]
    with pytest.raises(UserError, match="a model for sequence-classification, which gives no scores"):
        open_any(str(run), {"mood": other}, Opening(name="ranker"), Limits(), say=lambda line: None)
