"""Encoders and classifiers without HTTP: numbers against transformers, pooling, and who shares what."""

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
from deltaw.serving.encoders import Encoders, open_classifiers, open_embedder, what_it_serves
from deltaw.training.embedding.pooling import pooled, sees_both_ways
from deltaw.training.origin import open_run
from tests.byte_models import byte_tokenizer, saved
from tests.serving.encoder_models import TEXTS, bert_config, train_classifier, write_bert
from tests.serving.http.waiting import at_once

ONE = np.asarray([5], dtype=np.int32)
OPENED = {"precision": "fp32", "device": "cpu"}


@pytest.fixture
def embedder():
    """Opens encoders, and closes them after the test."""
    with contextlib.ExitStack() as stack:

        def open_one(folder, name="bert", say=print, **how):
            made = open_embedder(str(folder), name, say=say, **OPENED, **how)
            return stack.enter_context(contextlib.closing(made))

        yield open_one


def classified(base, name, adapters, say=print) -> tuple[Encoders, dict[str, torch.Tensor]]:
    """Classifiers, and what each says of the texts."""
    folders = {name: str(folder) for name, folder in adapters.items()}
    with contextlib.closing(open_classifiers(str(base), name, folders, say=say, **OPENED)) as encoders:
        return encoders, {name: answered(encoders, name, TEXTS) for name in encoders.models}


def answered(encoders: Encoders, name: str, texts: list[str]) -> torch.Tensor:
    answer = encoders.submit(name, [encoders.models[name].tokens(text) for text in texts])
    assert answer is not None
    return answer.result(60)


def alone(model: torch.nn.Module, text: str):
    """What transformers' own code gives for one text without padding."""
    with torch.no_grad():
        return model(**byte_tokenizer()(text, return_tensors="pt"))


def states(folder, text: str) -> torch.Tensor:
    """Hidden states of one text: (length, width)."""
    return alone(AutoModel.from_pretrained(folder).eval(), text).last_hidden_state[0]


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.each_value
@pytest.mark.parametrize("pooling", ["auto", "mean", "first", "last"])
@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_are_those_of_each_text_alone(bert, pooling, normalize, embedder):
    encoders = embedder(bert, pooling=pooling, normalize=normalize)
    for text, vector in zip(TEXTS, answered(encoders, "bert", TEXTS), strict=True):
        hidden = states(bert, text)
        expected = {"first": hidden[0], "last": hidden[-1]}.get(pooling, hidden.mean(0))
        same(vector, expected / expected.norm() if normalize else expected)


def test_a_folder_of_sentence_transformers_says_how_it_pools(tmp_path, embedder):
    folder = write_bert(tmp_path / "st")
    names = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    kinds = [{"idx": n, "path": path, "type": f"sentence_transformers.models.{k}"} for n, (k, path) in enumerate(names)]
    (folder / "1_Pooling").mkdir()

    def write(modules: list[dict], **pooling: bool) -> None:
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))

    write(kinds, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    said: list[str] = []
    first = states(folder, "text")[0]
    same(answered(embedder(folder, say=said.append), "bert", ["text"])[0], first / first.norm())
    assert "first" in said[-1] and "folder says" in said[-1]
    for name in ("config_sentence_transformers.json", "sentence_bert_config.json"):
        (folder / name).write_text("[1]")  # says nothing
    same(answered(embedder(folder), "bert", ["text"])[0], first / first.norm())
    dense = {"type": "sentence_transformers.models.Dense", "path": "3_Dense"}
    elsewhere = [kinds[0], {**kinds[1], "path": "../elsewhere"}, kinds[2]]
    for modules, says in (kinds, "supported: max"), (elsewhere, "not supported"), ([*kinds, dense], "Dense"):
        write(modules, pooling_mode_max_tokens=True)
        with pytest.raises(UserError, match=says):
            embedder(folder)


def test_a_decoder_is_refused_by_name_unless_a_way_is_asked_for(model_folder, embedder):
    with pytest.raises(UserError, match="LlamaModel is a decoder"):
        embedder(model_folder)
    found = answered(embedder(model_folder, pooling="last"), "bert", TEXTS)
    assert not sees_both_ways(AutoModel.from_pretrained(model_folder))
    for text, vector in zip(TEXTS, found, strict=True):
        last = states(model_folder, text)[-1]
        same(vector, last / last.norm())


def test_padding_has_no_part_in_the_mean():
    hidden, mask = torch.tensor([[[1.0], [3.0], [float("nan")]]]), torch.tensor([[1, 1, 0]])
    assert [pooled(hidden, mask, way).tolist() for way in ("mean", "last")] == [[[2.0]], [[3.0]]]


def test_each_classifier_answers_as_if_it_were_alone_and_shares_the_base(bert, runs):
    said: list[str] = []
    encoders, found = classified(bert, "bert", runs, said.append)
    assert set(found) == set(runs), "a base without a head classifies nothing"
    models = [classifier._model for classifier in encoders.models.values()]
    weights = {model.bert.embeddings.position_embeddings.weight.data_ptr() for model in models}
    assert len(weights) == 1 and "share" in said[-1]
    for name, folder in runs.items():
        session = open_run(str(folder), say=said.append, **OPENED)
        assert encoders.models[name].classes == session.classes
        assert found[name].shape == (len(TEXTS), len(session.classes))
        same(found[name].sum(1), torch.ones(len(TEXTS)))
        with contextlib.closing(Encoders({name: type(encoders.models[name])(session)})) as one_by_one:
            for text, row in zip(TEXTS, found[name], strict=True):
                same(answered(one_by_one, name, [text])[0], row)


def test_probabilities_are_those_of_transformers_and_peft(bert, runs):
    _, found = classified(runs["mood"], "mood", {})
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    model = PeftModel.from_pretrained(base, runs["mood"]).eval()
    for text, row in zip(TEXTS, found["mood"], strict=True):
        same(row, alone(model, text).logits[0].softmax(-1))


def test_a_base_with_its_own_head_is_served_beside_its_adapters(tmp_path):
    torch.manual_seed(0)
    names = {0: "bad", 1: "good"}
    config = bert_config(id2label=names, label2id={name: n for n, name in names.items()})
    model = BertForSequenceClassification(config).eval()
    run = train_classifier(saved(model, tmp_path / "base"), tmp_path / "run", ("bad", "good"))
    encoders, found = classified(tmp_path / "base", "base", {"tuned": run})
    same(found["base"][0], alone(model, TEXTS[0]).logits[0].softmax(-1))
    assert (found["base"] - found["tuned"]).abs().max() > 1e-3
    assert encoders.models["base"].classes == ("bad", "good")


def test_requests_of_many_threads_each_get_their_own_rows(bert, embedder):
    encoders = embedder(bert)
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 259, size=rng.integers(1, 60)).astype(np.int32) for _ in range(60)]
    expected = encoders.models["bert"].outputs(rows)
    found = at_once(lambda place: encoders.submit("bert", rows[place : place + 3]).result(60), range(0, 60, 3))
    same(torch.cat(found), expected)


def test_rows_that_cannot_be_computed_are_refused_before(bert, embedder):
    encoders = embedder(bert)
    encoders._most = 4
    for row, said in (([], "at least one"), ([5] * 65, "at most 64"), ([259], "no token 259")):
        with pytest.raises(UserError, match=said):
            encoders.submit("bert", [np.asarray(row, dtype=np.int32)])
    assert encoders.submit("bert", [ONE] * 5) is None, "too many wait"
    encoders.close()
    assert encoders.submit("bert", [ONE]) is None


def test_a_fault_of_the_model_reaches_who_asked_and_the_next_is_answered(bert, embedder, monkeypatch):
    encoders = embedder(bert)
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(encoders.models["bert"], "outputs", lambda rows: 1 / 0)
        encoders.submit("bert", [ONE]).result(60)
    assert encoders.submit("bert", [ONE]).result(60).shape == (1, 32)


def test_what_a_reference_serves_is_known_without_its_weights(bert, runs, model_folder, tmp_path):
    llama = shutil.copytree(model_folder, tmp_path / "llama", ignore=shutil.ignore_patterns("*.safetensors"))
    served = {bert: "vectors", runs["mood"]: "classes", llama: "text"}
    assert {folder: what_it_serves(str(folder)) for folder in served} == served


def test_a_base_without_a_head_needs_an_adapter(bert):
    with pytest.raises(UserError, match="no head for classes"):
        classified(bert, "bert", {})
