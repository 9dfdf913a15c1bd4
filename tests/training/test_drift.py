"""Drift is what a plain computation says it is, for every method and both kinds of batches."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from unittest import mock

import numpy as np
import pytest
import torch

from deltaw import cache
from deltaw.errors import UserError
from deltaw.kernels import loader
from deltaw.lora import LoRAConfig, attach, disabled
from deltaw.runs.fit import fit
from deltaw.runtime.generation import generate
from deltaw.runtime.packed import packed_rows
from deltaw.training.drift import LARGE, Drift, answers_side_by_side, drift_of, measure_drift
from deltaw.training.evaluation import general
from deltaw.training.evaluation.general import (
    ANSWER_TOKENS,
    KeepGeneral,
    NoGeneralAnswers,
    general_answers,
    identity_of,
)
from deltaw.training.evaluation.general_prompts import KEPT, MEASURED
from deltaw.training.tasks.causal_batcher import CausalMicroBatcher
from deltaw.training.tasks.causal_objective import CausalObjective
from tests.byte_models import byte_tokenizer, tiny_llama
from tests.caches import other_text, other_version
from tests.conftest import write_rows
from tests.tiny_models import VOCABULARY, causal_model
from tests.training.loops import example, moved
from tests.training.runs import METHODS, Told, metrics, often, opened
from tests.training.test_losses import assert_gradients, gradients, log_prob

PROMPTS = MEASURED[:12]


@pytest.fixture(autouse=True)
def _few_prompts(monkeypatch):
    monkeypatch.setattr("deltaw.training.drift.MEASURED", PROMPTS)
    monkeypatch.setattr("deltaw.training.session.KEPT", KEPT[:24])


def made_up_answers(count, vocabulary, seed=0):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(6, 14, count)
    return [example(n, generator.integers(3, vocabulary, length), 3) for n, length in enumerate(lengths, 1)]


def drifted(model, scale):
    attach(model, LoRAConfig(rank=3, alpha=6), seed=1)
    return moved(model, scale)


def by_hand(model, rows, base):
    """Losses, divergence and agreement, a row at a time, from the model's own logits in float64."""
    totals, labels = np.zeros(4), sum(row.label_count for row in rows)
    for row in rows:
        ids = torch.from_numpy(row.tokens).long()
        with torch.no_grad():
            after = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
            with base():
                before = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        for place in np.flatnonzero(row.is_label):
            p, q = before[place - 1], after[place - 1]
            kl, same = (p.exp() * (p - q)).sum().item(), float(p.argmax() == q.argmax())
            totals += [-p[ids[place]].item(), -q[ids[place]].item(), kl, same]
    return totals / labels


@pytest.mark.parametrize(
    ("family", "scale"), [("llama", 0.3), ("llama", 0.0), ("gemma2", 0.3), ("cohere", 0.3), ("bloom", 0.3)]
)
def test_drift_is_what_a_plain_computation_says(family, scale):
    model, rows = drifted(causal_model(family), scale), made_up_answers(9, VOCABULARY)
    padded = family == "bloom"
    running = contextlib.nullcontext if padded else lambda: packed_rows(model)
    batcher = CausalMicroBatcher(40, True, padded, "cpu")
    drift = measure_drift(model, rows, batcher, base=lambda: disabled(model), running=running)
    expected = by_hand(model, rows, lambda: disabled(model))
    found = [drift.base_loss, drift.loss, drift.divergence, drift.same]
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5)
    assert drift.tokens == sum(row.label_count for row in rows)
    assert (drift.divergence > 1e-4) == bool(scale)
    if not scale:  # an untrained adapter has not drifted
        assert drift.same == 1 and not drift.large and len(drift.lines()) == 1


@pytest.fixture(scope="module")
def bare_loss(roomy_folder):
    """The base model's own loss on general answers: of a model that no method ever touched; and their number."""
    bare = opened(roomy_folder)
    rows = general_answers(bare.model, bare.tokenizer, PROMPTS, identity=None)
    return by_hand(bare.model, rows, contextlib.nullcontext)[0], len(rows)


@pytest.mark.parametrize("method", often("lora", "prompt", "full"))
def test_train_and_eval_report_the_same_drift(method, settings, roomy_folder, bare_loss, tmp_path):
    changes = {"model": str(roomy_folder), "train": {"drift": True}, **METHODS[method]}
    result = fit(settings(tmp_path / "run", **changes))
    session = opened(result.output)
    again = drift_of(session)
    for name in ("base_loss", "loss", "same", "divergence"):
        if getattr(result.drift, name) is not None:
            assert getattr(again, name) == pytest.approx(getattr(result.drift, name), rel=1e-3, abs=1e-5)
    # Some methods keep no base model to compare with.
    assert (result.drift.divergence is None) == (method in ("head", "input", "last", "full"))
    assert again.divergence > 0 and result.drift.loss != result.drift.base_loss
    expected, answers = bare_loss
    assert result.drift.base_loss == pytest.approx(expected, rel=1e-4)
    assert json.loads(json.dumps(result.as_dict()))["drift"]["answers"] == answers == result.drift.answers
    assert metrics(result.output)[-1] == {"step": result.outcome.steps, "drift": result.drift.as_dict()}
    assert "| drift | general answers' loss" in (result.output / "README.md").read_text()
    if method == "lora":
        pairs = answers_side_by_side(session, 3)
        prompts = [pair.prompt for pair in pairs]
        assert len(pairs) == 3 and set(prompts) <= set(PROMPTS)
        with session.base():
            rows = general_answers(session.model, session.tokenizer, prompts * 3, identity=None)
        assert [pair.base for pair in pairs] == [row.answer for row in rows[:3]]


@pytest.fixture
def writer():
    """A model with room for general prompts, and its tokenizer."""
    return tiny_llama(max_position_embeddings=512), byte_tokenizer()


def test_answers_are_the_models_greedy_tokens_as_it_ended_them_to_plain_prompts_without_a_template(writer):
    model, tokenizer = writer
    for row in general_answers(model, tokenizer, PROMPTS, identity=None):
        ids = torch.from_numpy(row.tokens).long()[None]
        with torch.no_grad():
            likeliest = model(input_ids=ids).logits[0].argmax(-1).numpy()
        labels = np.flatnonzero(row.is_label)
        assert labels[0] == row.prompt_length and (likeliest[labels - 1] == row.tokens[labels]).all()
        ended = row.tokens[-1] in (0, 2)
        assert ended or len(labels) == ANSWER_TOKENS
    tokenizer.chat_template = None
    rows = general_answers(model, tokenizer, PROMPTS, identity=None)
    assert tokenizer.decode(rows[0].tokens[: rows[0].prompt_length]) == PROMPTS[0]


def test_answers_are_written_once_for_each_model_version_code_and_arithmetic(writer, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    calls = mock.Mock(wraps=generate)
    monkeypatch.setattr(general, "generate", calls)
    other = dataclasses.replace(loader.arithmetic(), fp32="wide")

    def damage():
        for file in (cache.root() / "remembered" / "general").iterdir():
            file.write_text(json.dumps({**json.loads(file.read_text()), "value": [[1, "two"]]}))

    first = None
    for number, (change, *template, model) in enumerate(
        [
            (None, "this model"),
            (None, "another model"),
            (None, "plain", "this model"),
            (damage, "this model"),
            (lambda: other_version(monkeypatch, "torch"), "this model"),
            (lambda: other_version(monkeypatch, "transformers"), "this model"),
            (lambda: other_text(monkeypatch, tmp_path / "source", "kernels/decode.py"), "this model"),
            (lambda: monkeypatch.setattr(loader, "arithmetic", lambda: other), "this model"),
        ],
        start=1,
    ):
        if change is not None:
            change()
        for _ in range(2):
            found = general_answers(*writer, PROMPTS, *template, identity=model)
            first = first or found
            assert template or all((a.tokens == b.tokens).all() for a, b in zip(first, found, strict=True))
        assert calls.call_count == number


def test_answers_of_a_model_are_not_those_of_one_that_differs_in_a_single_value():
    model = tiny_llama()
    own = identity_of(model, "fp32")
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight[3, 5] = torch.nextafter(weight[3, 5], weight[3, 5] + 1)
    assert identity_of(model, "fp32") != own


def test_what_cannot_be_measured_is_said(settings, roomy_folder, tmp_path):
    for drift in (None, False):
        heard, asked = Told(), {} if drift is None else {"drift": drift}
        train = {"max_steps": 1, **asked}
        result = fit(settings(tmp_path / str(drift), model=str(roomy_folder), train=train), callback=heard)
        assert result.drift is None and result.as_dict()["drift"] is None
        assert ("drift: not measured (a model of" in heard) == (drift is None) == ("drift" in heard)
    with pytest.raises(NoGeneralAnswers, match="64 positions"):
        general_answers(tiny_llama(max_position_embeddings=64), byte_tokenizer(), PROMPTS, identity=None)


def test_a_large_drift_is_a_warning_and_so_is_one_that_is_not_finite():
    for change, large in ((LARGE / 2, False), (LARGE + 0.1, True), (float("nan"), True)):
        drift = Drift(0.5, 0.5 + change, change, 0.9, 8, 100)
        assert drift.large == large == ("train.keep_general" in "".join(drift.lines()[1:]))
        json.dumps(drift.as_dict(), allow_nan=False)


def test_no_prompt_is_both_kept_and_measured():
    assert not set(MEASURED) & set(KEPT)
    assert len(set(MEASURED)) == len(MEASURED) and len(set(KEPT)) == len(KEPT)


def test_keeping_general_answers_limits_drift(settings, roomy_folder, tmp_path):
    runs = []
    for weight in (0, 2):
        heard, train = Told(), {"drift": True, "epochs": 4, "learning_rate": 3e-2, "keep_general": weight}
        runs.append(fit(settings(tmp_path / f"{weight}", model=str(roomy_folder), train=train), callback=heard))
        assert "no memory plan" not in heard
        assert ("keep_general 2: " in heard) == bool(weight)
    without, kept = runs
    assert kept.drift.loss < without.drift.loss - 0.1
    assert kept.outcome.rows == without.outcome.rows and kept.outcome.tokens == without.outcome.tokens
    assert all(line["general_loss"] > 0 for line in metrics(kept.output, "learning_rate"))
    assert "general_loss" not in (without.output / "metrics.jsonl").read_text()


def test_general_answers_cannot_be_kept_by_a_classifier(settings, tmp_path, roomy_folder):
    table = write_rows(tmp_path / "rows.jsonl", ({"text": f"text {n}", "label": "ab"[n % 2]} for n in range(8)))
    changes = {"task": "sequence-classification", "data": {"train": str(table)}, "train": {"keep_general": 1}}
    with pytest.raises(UserError, match="general answers cannot be kept"):
        fit(settings(tmp_path / "run", model=str(roomy_folder), **changes))


def test_gradients_of_kept_answers_are_those_of_their_weighted_mean_loss():
    model = drifted(causal_model("llama"), 0.3)
    batcher, rows = CausalMicroBatcher(64, True, False, "cpu"), made_up_answers(5, VOCABULARY)
    keep = KeepGeneral(CausalObjective(model), batcher, rows, weight=0.7, seed=3, per_step=2)
    with packed_rows(model):
        value = keep(1)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    chosen = keep.rows_of(1)
    mean = -sum(log_prob(model, row) for row in chosen) / sum(row.label_count for row in chosen)
    assert value == pytest.approx(mean.item(), rel=1e-5)
    assert_gradients(found, gradients(model, 0.7 * mean), 1e-5)
    seen = [row.row for step in range(5) for row in keep.rows_of(step)]
    assert sorted(seen[:5]) == sorted(seen[5:]) == [1, 2, 3, 4, 5]
