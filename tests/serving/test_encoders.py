"""Tests of encoders and classifiers without HTTP: outputs match transformers, pooling, and shared weights."""

from __future__ import annotations

import contextlib
import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForSequenceClassification, BertForSequenceClassification

from deltaw.errors import UserError
from deltaw.inference.open_run import open_run
from deltaw.inference.pooling import is_bidirectional, pool
from deltaw.serving.encoders import Encoders, detect_output_kind, open_classifiers, read_embedder
from tests.byte_models import byte_tokenizer, save_model
from tests.serving.encoder_models import TEXTS, bert_config, train_classifier, write_bert
from tests.serving.http.concurrency import run_in_threads

SINGLE_TOKEN = np.asarray([5], dtype=np.int32)
LOAD_OPTIONS = {"precision": "fp32", "device": "cpu"}


@pytest.fixture
def embedder():
    """Return a function that opens an encoder and closes it after the test."""
    with contextlib.ExitStack() as stack:

        def open_encoder(folder, name="bert", log=print, **options):
            encoders = Encoders({name: read_embedder(str(folder), log=log, **LOAD_OPTIONS, **options)})
            return stack.enter_context(contextlib.closing(encoders))

        yield open_encoder


def open_and_classify(base, name, adapters, log=print) -> tuple[Encoders, dict[str, torch.Tensor]]:
    """Open classifiers and return them with their outputs for the texts."""
    folders = {name: str(folder) for name, folder in adapters.items()}
    with contextlib.closing(open_classifiers(str(base), name, folders, log=log, **LOAD_OPTIONS)) as encoders:
        return encoders, {name: compute_outputs(encoders, name, TEXTS) for name in encoders.models}


def compute_outputs(encoders: Encoders, name: str, texts: list[str]) -> torch.Tensor:
    answer = encoders.submit(name, [encoders.models[name].tokens(text) for text in texts])
    assert answer is not None
    return answer.result(60)


def reference_output(model: torch.nn.Module, text: str):
    """Return transformers' output for a single text without padding."""
    with torch.no_grad():
        return model(**byte_tokenizer()(text, return_tensors="pt"))


def hidden_states(folder, text: str) -> torch.Tensor:
    """Return the hidden states of a text (length, width)."""
    return reference_output(AutoModel.from_pretrained(folder).eval(), text).last_hidden_state[0]


def check_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.each_value
@pytest.mark.parametrize("pooling", ["auto", "mean", "first", "last"])
@pytest.mark.parametrize("normalize", [True, False])
def test_batched_vectors_match_single_texts(bert, pooling, normalize, embedder):
    encoders = embedder(bert, pooling=pooling, normalize=normalize)
    for text, vector in zip(TEXTS, compute_outputs(encoders, "bert", TEXTS), strict=True):
        hidden = hidden_states(bert, text)
        expected = {"first": hidden[0], "last": hidden[-1]}.get(pooling, hidden.mean(0))
        check_close(vector, expected / expected.norm() if normalize else expected)


def test_pooling_is_read_from_sentence_transformers_folder(tmp_path, embedder):
    folder = write_bert(tmp_path / "st")
    names = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    kinds = [{"idx": n, "path": path, "type": f"sentence_transformers.models.{k}"} for n, (k, path) in enumerate(names)]
    (folder / "1_Pooling").mkdir()

    def write(modules: list[dict], **pooling: bool) -> None:
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))

    write(kinds, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    lines: list[str] = []
    first = hidden_states(folder, "text")[0]
    check_close(compute_outputs(embedder(folder, log=lines.append), "bert", ["text"])[0], first / first.norm())
    assert "first" in lines[-1] and "model's folder" in lines[-1]
    for name in ("config_sentence_transformers.json", "sentence_bert_config.json"):
        (folder / name).write_text("[1]")  # without usable content
    check_close(compute_outputs(embedder(folder), "bert", ["text"])[0], first / first.norm())
    dense = {"type": "sentence_transformers.models.Dense", "path": "3_Dense"}
    outside = [kinds[0], {**kinds[1], "path": "../elsewhere"}, kinds[2]]
    for modules, message in (kinds, "supported: max"), (outside, "not supported"), ([*kinds, dense], "Dense"):
        write(modules, pooling_mode_max_tokens=True)
        with pytest.raises(UserError, match=message):
            embedder(folder)


def test_decoder_is_rejected_unless_pooling_is_set(model_folder, embedder):
    with pytest.raises(UserError, match="LlamaModel is a decoder"):
        embedder(model_folder)
    vectors = compute_outputs(embedder(model_folder, pooling="last"), "bert", TEXTS)
    assert not is_bidirectional(AutoModel.from_pretrained(model_folder))
    for text, vector in zip(TEXTS, vectors, strict=True):
        last = hidden_states(model_folder, text)[-1]
        check_close(vector, last / last.norm())


def test_pooling_ignores_padding():
    hidden = torch.tensor([[1.0], [3.0], [float("nan")]])
    rows = [np.arange(2)]
    assert [pool(hidden, rows, pooling).tolist() for pooling in ("mean", "last")] == [[[2.0]], [[3.0]]]


def test_classifiers_share_base_and_match_separate_models(bert, runs):
    lines: list[str] = []
    encoders, outputs = open_and_classify(bert, "bert", runs, lines.append)
    assert set(outputs) == set(runs), "a base without a head must not be listed"
    models = [classifier._model for classifier in encoders.models.values()]
    weights = {model.bert.embeddings.position_embeddings.weight.data_ptr() for model in models}
    assert len(weights) == 1 and "share" in lines[-1]
    for name, folder in runs.items():
        session = open_run(str(folder), log=lines.append, **LOAD_OPTIONS)
        assert encoders.models[name].classes == session.classes
        assert outputs[name].shape == (len(TEXTS), len(session.classes))
        check_close(outputs[name].sum(1), torch.ones(len(TEXTS)))
        with contextlib.closing(Encoders({name: type(encoders.models[name])(session)})) as single:
            for text, row in zip(TEXTS, outputs[name], strict=True):
                check_close(compute_outputs(single, name, [text])[0], row)


def test_probabilities_match_transformers_and_peft(bert, runs):
    _, outputs = open_and_classify(runs["mood"], "mood", {})
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    model = PeftModel.from_pretrained(base, runs["mood"]).eval()
    for text, row in zip(TEXTS, outputs["mood"], strict=True):
        check_close(row, reference_output(model, text).logits[0].softmax(-1))


def test_base_with_head_is_served_with_adapters(tmp_path):
    torch.manual_seed(0)
    names = {0: "bad", 1: "good"}
    config = bert_config(id2label=names, label2id={name: n for n, name in names.items()})
    model = BertForSequenceClassification(config).eval()
    run = train_classifier(save_model(model, tmp_path / "base"), tmp_path / "run", ("bad", "good"))
    encoders, outputs = open_and_classify(tmp_path / "base", "base", {"tuned": run})
    check_close(outputs["base"][0], reference_output(model, TEXTS[0]).logits[0].softmax(-1))
    assert (outputs["base"] - outputs["tuned"]).abs().max() > 1e-3
    assert encoders.models["base"].classes == ("bad", "good")


def test_concurrent_requests_receive_their_rows(bert, embedder):
    encoders = embedder(bert)
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 259, size=rng.integers(1, 60)).astype(np.int32) for _ in range(60)]
    expected = encoders.models["bert"].outputs(rows)
    results = run_in_threads(lambda start: encoders.submit("bert", rows[start : start + 3]).result(60), range(0, 60, 3))
    check_close(torch.cat(results), expected)


def test_invalid_rows_are_rejected_on_submit(bert, embedder):
    encoders = embedder(bert)
    encoders._max_rows = 4
    for row, message in (([], "at least one"), ([5] * 65, "at most 64"), ([259], "no token 259")):
        with pytest.raises(UserError, match=message):
            encoders.submit("bert", [np.asarray(row, dtype=np.int32)])
    assert encoders.submit("bert", [SINGLE_TOKEN] * 5) is None, "too many rows are queued"
    encoders.close()
    assert encoders.submit("bert", [SINGLE_TOKEN]) is None


def test_model_error_is_raised_and_next_request_succeeds(bert, embedder, monkeypatch):
    encoders = embedder(bert)
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(encoders.models["bert"], "outputs", lambda rows: 1 / 0)
        encoders.submit("bert", [SINGLE_TOKEN]).result(60)
    assert encoders.submit("bert", [SINGLE_TOKEN]).result(60).shape == (1, 32)


def test_output_kind_is_detected_without_weights(bert, runs, model_folder, tmp_path):
    llama = shutil.copytree(model_folder, tmp_path / "llama", ignore=shutil.ignore_patterns("*.safetensors"))
    kinds = {bert: "vectors", runs["mood"]: "classes", llama: "text"}
    assert {folder: detect_output_kind(str(folder)) for folder in kinds} == kinds


def test_base_without_head_requires_adapter(bert):
    with pytest.raises(UserError, match="no head for classes"):
        open_and_classify(bert, "bert", {})
