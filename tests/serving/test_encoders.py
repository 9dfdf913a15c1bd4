"""Encoders and classifiers without HTTP: numbers against transformers, pooling, and who shares what."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, BertForSequenceClassification

from deltaw.errors import UserError
from deltaw.serving.encoders import Encoders, open_classifiers, open_embedder, pooled, sees_both_ways, what_it_serves
from deltaw.training.origin import open_run
from tests.byte_models import byte_tokenizer
from tests.serving.encoder_models import TEXTS, bert_config, train_classifier, write_bert, write_llama
from tests.serving.http.waiting import at_once


@pytest.fixture
def embedder():
    """Opens encoders, and closes them after the test."""
    made = []

    def open_one(folder, name="bert", **how):
        made.append(open_embedder(str(folder), name, precision="fp32", device="cpu", **{"say": print, **how}))
        return made[-1]

    yield open_one
    for encoders in made:
        encoders.close()


def opened(encoders: Encoders, name: str, texts: list[str]) -> torch.Tensor:
    model = encoders.models[name]
    answer = encoders.submit(name, [model.tokens(text) for text in texts])
    assert answer is not None
    return answer.result(60)


def alone(model: torch.nn.Module, text: str) -> torch.Tensor:
    """Hidden states of one text without padding, in transformers' own code: (length, width)."""
    with torch.no_grad():
        return model(**byte_tokenizer()(text, return_tensors="pt")).last_hidden_state[0]


@pytest.mark.each_value
@pytest.mark.parametrize("pooling", ["auto", "mean", "first", "last"])
@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_are_those_of_each_text_alone(bert, pooling, normalize, embedder):
    encoders = embedder(bert, pooling=pooling, normalize=normalize)
    found = opened(encoders, "bert", TEXTS)
    model = AutoModel.from_pretrained(bert).eval()
    for text, vector in zip(TEXTS, found, strict=True):
        hidden = alone(model, text)
        expected = {"first": hidden[0], "last": hidden[-1]}.get(pooling, hidden.mean(0))
        if normalize:
            expected = expected / expected.norm()
        torch.testing.assert_close(vector, expected, atol=2e-5, rtol=1e-4)


def test_a_folder_of_sentence_transformers_says_how_it_pools(bert, tmp_path, embedder):
    folder = write_bert(tmp_path / "st")
    pooling = folder / "1_Pooling"
    pooling.mkdir()
    names = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    modules = [
        {"idx": n, "path": path, "type": f"sentence_transformers.models.{kind}"} for n, (kind, path) in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (pooling / "config.json").write_text(
        json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    said: list[str] = []
    encoders = embedder(folder, "st", say=said.append)
    vector = opened(encoders, "st", ["text"])[0]
    first = alone(AutoModel.from_pretrained(folder).eval(), "text")[0]
    torch.testing.assert_close(vector, first / first.norm(), atol=2e-5, rtol=1e-4)
    assert "first" in said[-1] and "folder says" in said[-1]
    (pooling / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(UserError, match="pooling_mode_max_tokens"):
        embedder(folder, "st")
    modules[1]["path"] = "../elsewhere"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="not supported"):
        embedder(folder, "st")
    modules.append({"type": "sentence_transformers.models.Dense", "path": "3_Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="Dense"):
        embedder(folder, "st")


def test_a_decoder_is_refused_by_name_unless_a_way_is_asked_for(tmp_path, embedder):
    folder = write_llama(tmp_path / "llama")
    with pytest.raises(UserError, match="LlamaModel is a decoder"):
        embedder(folder, "llama")
    encoders = embedder(folder, "llama", pooling="last")
    found = opened(encoders, "llama", TEXTS)
    model = AutoModel.from_pretrained(folder).eval()
    assert not sees_both_ways(model)
    for text, vector in zip(TEXTS, found, strict=True):
        last = alone(model, text)[-1]
        torch.testing.assert_close(vector, last / last.norm(), atol=2e-5, rtol=1e-4)


def test_padding_has_no_part_in_the_mean():
    hidden = torch.tensor([[[1.0], [3.0], [float("nan")]]])
    mask = torch.tensor([[1, 1, 0]])
    assert pooled(hidden, mask, "mean").tolist() == [[2.0]]
    assert pooled(hidden, mask, "last").tolist() == [[3.0]]


def test_each_classifier_answers_as_if_it_were_alone_and_shares_the_base(bert, runs):
    said: list[str] = []
    named = {name: str(folder) for name, folder in runs.items()}
    encoders = open_classifiers(str(bert), "bert", named, precision="fp32", device="cpu", say=said.append)
    assert set(encoders.models) == set(runs), "a base without a head classifies nothing"
    models = [classifier._model for classifier in encoders.models.values()]
    weights = [model.bert.embeddings.position_embeddings.weight.data_ptr() for model in models]
    assert len(set(weights)) == 1 and "share" in said[-1]
    for name, folder in runs.items():
        session = open_run(str(folder), precision="fp32", device="cpu", say=said.append)
        found = opened(encoders, name, TEXTS)
        assert found.shape == (len(TEXTS), len(session.classes))
        assert encoders.models[name].classes == session.classes
        torch.testing.assert_close(found.sum(1), torch.ones(len(TEXTS)))
        one_by_one = Encoders({name: type(encoders.models[name])(session)})
        for text, row in zip(TEXTS, found, strict=True):
            torch.testing.assert_close(opened(one_by_one, name, [text])[0], row, atol=2e-5, rtol=1e-4)
        one_by_one.close()
    encoders.close()


def test_probabilities_are_those_of_transformers_and_peft(bert, runs):
    from peft import PeftModel

    encoders = open_classifiers(str(runs["mood"]), "mood", {}, precision="fp32", device="cpu", say=print)
    found = opened(encoders, "mood", TEXTS)
    encoders.close()
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    model = PeftModel.from_pretrained(base, runs["mood"]).eval()
    for text, row in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            logits = model(**byte_tokenizer()(text, return_tensors="pt")).logits[0]
        torch.testing.assert_close(row, logits.softmax(-1), atol=2e-5, rtol=1e-4)


def test_a_base_with_its_own_head_is_served_beside_its_adapters(tmp_path):
    torch.manual_seed(0)
    names = {0: "bad", 1: "good"}
    config = bert_config(id2label=names, label2id={name: n for n, name in names.items()})
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    run = train_classifier(tmp_path / "base", tmp_path / "run", ("bad", "good"))
    named = {"tuned": str(run)}
    encoders = open_classifiers(str(tmp_path / "base"), "base", named, precision="fp32", device="cpu", say=print)
    base, tuned = (opened(encoders, name, TEXTS) for name in ("base", "tuned"))
    encoders.close()
    with torch.no_grad():
        logits = model(**byte_tokenizer()(TEXTS[0], return_tensors="pt")).logits[0]
    torch.testing.assert_close(base[0], logits.softmax(-1), atol=2e-5, rtol=1e-4)
    assert (base - tuned).abs().max() > 1e-3 and encoders.models["base"].classes == ("bad", "good")


def test_requests_of_many_threads_each_get_their_own_rows(bert, embedder):
    encoders = embedder(bert)
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 259, size=rng.integers(1, 60)).astype(np.int32) for _ in range(60)]
    expected = encoders.models["bert"].outputs(rows)
    answers: dict[int, torch.Tensor] = {}

    def ask(place: int) -> None:
        answers[place] = encoders.submit("bert", rows[place : place + 3]).result(60)

    at_once(ask, range(0, 60, 3))
    for place, found in answers.items():
        torch.testing.assert_close(found, expected[place : place + 3], atol=2e-5, rtol=1e-4)
    assert len(answers) == 20


def test_rows_that_cannot_be_computed_are_refused_before(bert, embedder):
    encoders = embedder(bert)
    encoders._most = 4
    for row, said in (([], "at least one"), ([5] * 65, "at most 64"), ([259], "no token 259")):
        with pytest.raises(UserError, match=said):
            encoders.submit("bert", [np.asarray(row, dtype=np.int32)])
    row = np.asarray([5], dtype=np.int32)
    assert encoders.submit("bert", [row] * 5) is None, "too many wait"
    encoders.close()
    assert encoders.submit("bert", [row]) is None


def test_a_fault_of_the_model_reaches_who_asked_and_the_next_is_answered(bert, embedder):
    encoders = embedder(bert)
    model, row = encoders.models["bert"], np.asarray([5], dtype=np.int32)
    whole, model.outputs = model.outputs, lambda rows: 1 / 0
    with pytest.raises(ZeroDivisionError):
        encoders.submit("bert", [row]).result(60)
    model.outputs = whole
    assert encoders.submit("bert", [row]).result(60).shape == (1, 32)


def test_what_a_reference_serves_is_known_without_its_weights(bert, runs, tmp_path):
    llama = write_llama(tmp_path / "llama")
    for file in llama.glob("*.safetensors"):
        file.unlink()
    assert what_it_serves(str(bert)) == "vectors"
    assert what_it_serves(str(runs["mood"])) == "classes"
    assert what_it_serves(str(llama)) == "text"


def test_a_base_without_a_head_needs_an_adapter(bert):
    with pytest.raises(UserError, match="no head for classes"):
        open_classifiers(str(bert), "bert", {}, precision="fp32", device="cpu", say=print)
