"""The folder of an embedding run: for the verbs, for sentence-transformers and for PEFT."""

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

from deltaw.reports.run import fit
from deltaw.serving.encoders import read_embedder
from tests.byte_models import saved, tiny_llama
from tests.conftest import write_rows
from tests.serving.encoder_models import train_embedder, write_bert

TEXTS = ["a", "question 3", "some longer text", "x" * 40, "snow ☃"]
PROMPTS = {"query_prompt": "ask: ", "passage_prompt": "say: "}
BESIDE = {"modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling", "2_Normalize"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    llama = tiny_llama(initializer_range=0.2)
    return {"bert": write_bert(folder / "bert"), "llama": saved(llama, folder / "llama")}


@pytest.fixture(scope="module")
def runs(bases, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    more = {"embedding": {"dimensions": [32, 8], **PROMPTS}}
    return {name: train_embedder(base, folder / name, **more) for name, base in bases.items()}


def ours(folder: Path, **how: str) -> torch.Tensor:
    return read_embedder(str(folder), say=lambda line: None, **{"precision": "fp32", "device": "cpu", **how}).vectors(
        TEXTS
    )[0]


def alike(left, right) -> float:
    return float(cosine_similarity(torch.as_tensor(left), torch.as_tensor(right)).min())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_merged_folder_embeds_alike_in_sentence_transformers(call, bases, runs, tmp_path, family):
    merged = tmp_path / "merged"
    done = call("merge", runs[family], "--output", merged, "--json", status=0)
    verified = json.loads(done.out)["verification"]
    assert verified["passed"] and verified["outputs"] == "vectors" and verified["adapter"]["mean"] > 0.05
    assert {path.name for path in merged.iterdir()} >= BESIDE
    expected = ours(runs[family])
    assert alike(ours(merged), expected) > 0.99999
    assert alike(ours(bases[family], pooling={"bert": "mean", "llama": "last"}[family]), expected) < 0.99
    kept, base = (load_file(folder / "model.safetensors") for folder in (merged, bases[family]))
    if family == "bert":
        assert torch.equal(kept["pooler.dense.weight"], base["pooler.dense.weight"])
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="not installed")
    theirs = sentence_transformers.SentenceTransformer(str(merged), device="cpu")
    assert alike(theirs.encode(TEXTS), expected) >= 0.9999
    assert (theirs.prompts["query"], theirs.prompts["document"]) == ("ask: ", "say: ")
    assert alike(theirs.encode_query(TEXTS), theirs.encode([f"ask: {text}" for text in TEXTS])) > 0.9999
    assert theirs.max_seq_length == {"bert": 64, "llama": 128}[family]


def test_what_is_said_of_a_merge_is_of_vectors(call, runs, tmp_path):
    said = " ".join(call("merge", runs["bert"], "--output", tmp_path / "merged", status=0).out.split())
    assert "merging moved vectors by" in said and "logits" not in said and "choices" not in said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_peft_and_sentence_transformers_load_the_adapter(bases, runs, family):
    peft = pytest.importorskip("peft", reason="not installed")
    warnings.filterwarnings("error", "Found missing adapter keys")
    model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(bases[family]), runs[family]).eval()
    tokenizer, found = AutoTokenizer.from_pretrained(runs[family]), []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        hidden = model(input_ids=ids).last_hidden_state[0].detach()
        found.append(hidden.mean(0) if family == "bert" else hidden[-1])
    assert alike(torch.stack(found), ours(runs[family])) >= 0.9999
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="not installed")
    theirs = sentence_transformers.SentenceTransformer(str(runs[family]), device="cpu")
    assert alike(theirs.encode(TEXTS), ours(runs[family])) >= 0.9999


def test_the_adapter_of_a_base_in_a_package_names_its_path(bases, tmp_path, monkeypatch):
    """Programs that load a folder with its base know no packages; deltaw goes by run.yaml."""
    site = tmp_path / "site"
    shutil.copytree(bases["bert"], site / "tiny_of_tests" / "model")
    info = site / "tiny_of_tests-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-of-tests\nVersion: 1.0\n")
    (info / "RECORD").write_text("tiny_of_tests/model/config.json,,\n")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    reference = "pypi:tiny-of-tests==1.0/tiny_of_tests/model"
    run = train_embedder(reference, tmp_path / "run")
    named = json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(site / "tiny_of_tests" / "model")
    assert yaml.safe_load((run / "run.yaml").read_text())["model"] == reference
    assert alike(ours(run), ours(train_embedder(bases["bert"], tmp_path / "other"))) > 0.99999


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_verbs_show_a_runs_metrics(call, runs, family):
    told = json.loads(call("eval", runs[family], "--base", "--json", status=0).out)
    for metrics in (told["eval"], told["base"]):
        assert set(metrics) == {"loss", "ndcg@10", "mrr@10", "recall@1", "recall@10", "passages_searched"}
    assert told["eval"]["loss"] < told["base"]["loss"]
    assert told["score"]["metric"] == "ndcg@10" and set(told["intervals"]) == {"mrr@10", "recall@1", "recall@10"}
    shown = call("eval", runs[family], "--base", status=0).out
    assert "ndcg@10" in shown.lower() and "95 % interval" in shown
    assert "moved most" in call("inspect", runs[family], status=0).out
    listed = call("runs", runs[family].parent, status=0).out
    assert listed.lower().count("ndcg@10") == 2


def test_the_page_of_a_run_has_its_metrics(runs, tmp_path):
    made = yaml.safe_load((runs["bert"] / "run.yaml").read_text())
    made |= {"output": str(tmp_path / "run")}
    made["train"] |= {"drift": True, "eval_every": 2, "adapter": "best", "learning_rate": "search"}
    result = fit(made)
    page = (result.output / "report.html").read_text()
    assert "ndcg@10" in page.lower() and f"{result.evaluation.metrics['ndcg@10']:.4f}" in page
    assert "of general sentences" in page
    assert {path.name for path in (result.output / "last").iterdir()} >= BESIDE
    assert ours(result.output / "last").shape == (len(TEXTS), 32)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_longer_texts_are_truncated_to_what_the_run_was_trained_on(call, bases, tmp_path, family):
    long = {"data": {"max_length": 9, "long_rows": "cut"}, "embedding": {"pooling": "mean"}}
    run = train_embedder(bases[family], tmp_path / "run", **long)
    embedder = read_embedder(str(run), say=lambda line: None, precision="fp32", device="cpu")
    text = "x" * 5 + "y" * 40
    vectors, cut = embedder.vectors([text, text[:9]])
    assert cut == 1 and torch.allclose(vectors[0], vectors[1], atol=1e-6)
    assert len(embedder.tokens(text)) == 9
    call("merge", run, "--output", tmp_path / "merged", status=0)
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="not installed")
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    assert alike(theirs.encode([text]), vectors[:1]) >= 0.9999


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_an_adapter_that_no_run_made_embeds_as_its_folder_says(bases, tmp_path, family):
    run = train_embedder(bases[family], tmp_path / "run", embedding={"pooling": "weighted", **PROMPTS})
    adapter = shutil.copytree(run, tmp_path / "adapter", ignore=shutil.ignore_patterns("run.*"))
    assert torch.equal(ours(adapter), ours(run))
    read = read_embedder(str(adapter), say=lambda line: None, precision="fp32", device="cpu").layout
    assert (read.pooling, read.query_prompt, read.passage_prompt) == ("weighted", "ask: ", "say: ")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_methods_are_compared(call, bases, runs, tmp_path, family):
    made = yaml.safe_load((runs[family] / "run.yaml").read_text())
    made |= {"output": str(tmp_path / "run")}
    made["train"] |= {"learning_rate": "auto"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(made))
    told = json.loads(
        call("compare", tmp_path / "run.yaml", "--methods", "lora,bias", "--share", "1", "--json", status=0).out
    )
    assert {one["method"] for one in told["methods"]} == {"lora", "bias"}
    assert "ndcg@10" in json.dumps(told)


def test_data_verbs_read_rows_for_retrieval(call, bases, tmp_path):
    rows = [{"question": f"q{n}", "answer": f"p{n % 5}"} for n in range(6)] + [{"question": "q", "answer": " "}]
    path = write_rows(tmp_path / "d.jsonl", rows)
    flags = ["--model", bases["bert"], "--task", "embedding"]
    checked = " ".join(call("data", "check", path, *flags).out.split())
    assert "7 rows read as queries with passages" in checked and "row 7 (line 7): 'answer' is empty" in checked
    assert "1 row whose passage is that of an earlier one" in checked and "unusable" in checked
    assert "warnings" in call("data", "check", path, *flags, "--data.bad_rows", "skip", status=0).out
    shown = call("data", "show", path, *flags, "--rows", 7, status=0).out
    assert "label 'query'" in shown and "label 'passage'" in shown
    assert "refused: 'answer' is empty" in shown
    told = json.loads(call("data", "show", path, *flags, "--row", 2, "--json", status=0).out)
    assert [one["label"] for one in told["rows"][0]["examples"]] == ["query", "passage"]
