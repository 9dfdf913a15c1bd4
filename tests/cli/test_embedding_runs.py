"""Embedding runs work with every command, with sentence-transformers and with PEFT."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer

from deltaw.runs.fit import fit
from deltaw.serving.encoders import read_embedder
from tests.byte_models import save_model, tiny_llama
from tests.conftest import write_rows
from tests.serving.encoder_models import train_embedder, write_bert

TEXTS = ["a", "question 3", "some longer text", "x" * 40, "snow ☃"]
PROMPTS = {"query_prompt": "ask: ", "passage_prompt": "say: "}
ENCODER_FILES = {"modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling"}
ENCODER_FILES |= {"2_Normalize"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    llama = tiny_llama(initializer_range=0.2)
    return {"bert": write_bert(folder / "bert"), "llama": save_model(llama, folder / "llama")}


@pytest.fixture(scope="module")
def runs(bases, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    overrides = {"embedding": {"dimensions": [32, 8], **PROMPTS}}
    return {name: train_embedder(base, folder / name, **overrides) for name, base in bases.items()}


def embed(folder: Path, **options: str) -> torch.Tensor:
    options = {"precision": "fp32", "device": "cpu", **options}
    return read_embedder(str(folder), log=lambda line: None, **options).vectors(TEXTS)[0]


def min_similarity(left, right) -> float:
    return float(cosine_similarity(torch.as_tensor(left), torch.as_tensor(right)).min())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_merged_folder_embeds_equally_in_sentence_transformers(call, bases, runs, tmp_path, family):
    merged = tmp_path / "merged"
    result = call("merge", runs[family], "--output", merged, "--json", status=0)
    verified = json.loads(result.out)["verification"]
    assert verified["passed"] and verified["outputs"] == "vectors" and verified["adapter"]["mean"] > 0.05
    assert {path.name for path in merged.iterdir()} >= ENCODER_FILES
    expected = embed(runs[family])
    assert min_similarity(embed(merged), expected) > 0.99999
    assert min_similarity(embed(bases[family], pooling={"bert": "mean", "llama": "last"}[family]), expected) < 0.99
    merged_weights, base_weights = (load_file(folder / "model.safetensors") for folder in (merged, bases[family]))
    if family == "bert":
        assert torch.equal(merged_weights["pooler.dense.weight"], base_weights["pooler.dense.weight"])
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="not installed")
    theirs = sentence_transformers.SentenceTransformer(str(merged), device="cpu")
    assert min_similarity(theirs.encode(TEXTS), expected) >= 0.9999
    assert (theirs.prompts["query"], theirs.prompts["document"]) == ("ask: ", "say: ")
    assert min_similarity(theirs.encode_query(TEXTS), theirs.encode([f"ask: {text}" for text in TEXTS])) > 0.9999
    assert theirs.max_seq_length == {"bert": 64, "llama": 128}[family]


def test_merge_of_embedding_run_reports_vectors(call, runs, tmp_path):
    text = " ".join(call("merge", runs["bert"], "--output", tmp_path / "merged", status=0).out.split())
    assert "merging moved vectors by" in text and "logits" not in text and "choices" not in text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_peft_and_sentence_transformers_load_the_adapter(bases, runs, family):
    peft = pytest.importorskip("peft", reason="not installed")
    warnings.filterwarnings("error", "Found missing adapter keys")
    model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(bases[family]), runs[family]).eval()
    tokenizer = AutoTokenizer.from_pretrained(runs[family])
    pooled = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        hidden = model(input_ids=ids).last_hidden_state[0].detach()
        pooled.append(hidden.mean(0) if family == "bert" else hidden[-1])
    assert min_similarity(torch.stack(pooled), embed(runs[family])) >= 0.9999
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="not installed")
    theirs = sentence_transformers.SentenceTransformer(str(runs[family]), device="cpu")
    assert min_similarity(theirs.encode(TEXTS), embed(runs[family])) >= 0.9999


def test_adapter_of_packaged_base_model_stores_its_path(bases, tmp_path, monkeypatch):
    """The adapter config names a path because other programs cannot resolve packages. deltaw reads run.yaml."""
    site = tmp_path / "site"
    shutil.copytree(bases["bert"], site / "tiny_of_tests" / "model")
    info = site / "tiny_of_tests-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-of-tests\nVersion: 1.0\n")
    (info / "RECORD").write_text("tiny_of_tests/model/config.json,,\n")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    reference = "pypi:tiny-of-tests==1.0/tiny_of_tests/model"
    run = train_embedder(reference, tmp_path / "run")
    base_path = json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base_path == str(site / "tiny_of_tests" / "model")
    assert yaml.safe_load((run / "run.yaml").read_text())["model"] == reference
    assert min_similarity(embed(run), embed(train_embedder(bases["bert"], tmp_path / "other"))) > 0.99999


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_eval_inspect_and_runs_show_retrieval_metrics(call, runs, family):
    output = json.loads(call("eval", runs[family], "--with-base", "--json", status=0).out)
    for metrics in (output["eval"], output["base"]):
        assert set(metrics) == {"loss", "ndcg@10", "mrr@10", "recall@1", "recall@10", "passages_searched"}
    assert output["eval"]["loss"] < output["base"]["loss"]
    assert output["score"]["metric"] == "ndcg@10" and set(output["intervals"]) == {"mrr@10", "recall@1", "recall@10"}
    text = call("eval", runs[family], "--with-base", status=0).out
    assert "ndcg@10" in text.lower() and "95 % interval" in text
    assert "largest changes" in call("inspect", runs[family], status=0).out
    table = call("runs", runs[family].parent, status=0).out
    assert table.lower().count("ndcg@10") == 2


def test_report_page_shows_retrieval_metrics(runs, tmp_path):
    config = yaml.safe_load((runs["bert"] / "run.yaml").read_text())
    config |= {"output": str(tmp_path / "run")}
    config["train"] |= {"drift": True, "eval_every": 2, "saved_adapter": "best", "learning_rate": "search"}
    result = fit(config)
    page = (result.output / "report.html").read_text()
    assert "ndcg@10" in page.lower() and f"{result.evaluation.metrics['ndcg@10']:.4f}" in page
    assert "of general sentences" in page
    assert {path.name for path in (result.output / "last").iterdir()} >= ENCODER_FILES
    assert embed(result.output / "last").shape == (len(TEXTS), 32)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_long_texts_are_truncated_to_training_length(call, bases, tmp_path, family):
    overrides = {"data": {"max_length": 9, "long_rows": "cut"}, "embedding": {"pooling": "mean"}}
    run = train_embedder(bases[family], tmp_path / "run", **overrides)
    embedder = read_embedder(str(run), log=lambda line: None, precision="fp32", device="cpu")
    text = "x" * 5 + "y" * 40
    vectors, num_truncated = embedder.vectors([text, text[:9]])
    assert num_truncated == 1 and torch.allclose(vectors[0], vectors[1], atol=1e-6)
    assert len(embedder.tokens(text)) == 9
    call("merge", run, "--output", tmp_path / "merged", status=0)
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="not installed")
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    assert min_similarity(theirs.encode([text]), vectors[:1]) >= 0.9999


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_adapter_without_run_files_embeds_with_stored_options(bases, tmp_path, family):
    run = train_embedder(bases[family], tmp_path / "run", embedding={"pooling": "weighted", **PROMPTS})
    adapter = shutil.copytree(run, tmp_path / "adapter", ignore=shutil.ignore_patterns("run.*"))
    assert torch.equal(embed(adapter), embed(run))
    layout = read_embedder(str(adapter), log=lambda line: None, precision="fp32", device="cpu").layout
    assert (layout.pooling, layout.query_prompt, layout.passage_prompt) == ("weighted", "ask: ", "say: ")


def test_data_verbs_support_retrieval_rows(call, bases, tmp_path):
    rows = [{"question": f"q{n}", "answer": f"p{n % 5}"} for n in range(6)] + [{"question": "q", "answer": " "}]
    path = write_rows(tmp_path / "d.jsonl", rows)
    flags = ["--model", bases["bert"], "--task", "embedding"]
    checked = " ".join(call("data", "check", path, *flags).out.split())
    assert "7 rows read as queries with passages" in checked and "row 7 (line 7): 'answer' is empty" in checked
    assert "1 row with an earlier row's passage" in checked and "unusable" in checked
    assert "warnings" in call("data", "check", path, *flags, "--data.bad_rows", "skip", status=0).out
    text = call("data", "show", path, *flags, "--limit", 7, status=0).out
    assert "label 'query'" in text and "label 'passage'" in text
    assert "refused: 'answer' is empty" in text
    output = json.loads(call("data", "show", path, *flags, "--row", 2, "--json", status=0).out)
    assert [entry["label"] for entry in output["rows"][0]["examples"]] == ["query", "passage"]
