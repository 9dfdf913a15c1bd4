"""Drift compared with a reference computation, for every method and both kinds of batches."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from unittest import mock

import numpy as np
import pytest
import torch

from deltaw.cache import keys
from deltaw.decoding.generation import generate
from deltaw.errors import UserError
from deltaw.inference.run_drift import compare_answers, measure_run_drift
from deltaw.kernels import loader
from deltaw.lora import LoRAConfig, attach, disabled
from deltaw.reports.page.run_view import drift_text
from deltaw.runs.fit import fit
from deltaw.runs.folder import read_run
from deltaw.runtime.packed import packed_rows
from deltaw.training.batchers import CausalMicroBatcher
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.drift import LARGE, Drift, measure_drift
from deltaw.training.evaluation import general
from deltaw.training.evaluation.general import (
    MAX_ANSWER_TOKENS,
    GeneralRehearsal,
    GreedyDecoder,
    NoGeneralAnswers,
    base_log_probs,
    general_answers,
    model_identity,
)
from deltaw.training.evaluation.general_prompts import DRIFT_PROMPTS, REHEARSAL_PROMPTS
from tests.byte_models import byte_tokenizer, tiny_llama
from tests.caches import fake_version, modify_source
from tests.conftest import write_rows
from tests.tiny_models import VOCABULARY, causal_model
from tests.training.loops import example, randomize_lora_b
from tests.training.runs import (
    METHODS,
    RecordingCallback,
    assert_same_run,
    metrics,
    open_on_cpu,
    slow_except,
    stopped_run,
)
from tests.training.test_losses import assert_gradients, gradients

PROMPTS = DRIFT_PROMPTS[:12]


@pytest.fixture(autouse=True)
def _few_prompts(monkeypatch):
    for module in ("deltaw.training.monitoring.drift_probe", "deltaw.inference.run_drift"):
        monkeypatch.setattr(f"{module}.DRIFT_PROMPTS", PROMPTS)
    monkeypatch.setattr("deltaw.training.session.REHEARSAL_PROMPTS", REHEARSAL_PROMPTS[:24])


def random_answers(count, vocabulary, seed=0):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(6, 14, count)
    return [example(n, generator.integers(3, vocabulary, length), 3) for n, length in enumerate(lengths, 1)]


def build_drifted_model(model, scale):
    attach(model, LoRAConfig(rank=3, alpha=6), seed=1)
    return randomize_lora_b(model, scale)


def reference_drift(model, rows, base):
    """Return losses, divergence and agreement, computed row by row from the model's own logits in float64."""
    totals = np.zeros(4)
    labels = sum(row.label_count for row in rows)
    for row in rows:
        ids = torch.from_numpy(row.tokens).long()
        with torch.no_grad():
            after = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
            with base():
                before = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        for position in np.flatnonzero(row.is_label):
            p = before[position - 1]
            q = after[position - 1]
            kl = (p.exp() * (p - q)).sum().item()
            agrees = float(p.argmax() == q.argmax())
            totals += [-p[ids[position]].item(), -q[ids[position]].item(), kl, agrees]
    return totals / labels


@pytest.mark.parametrize(("family", "scale"), [("llama", 0.0), ("gemma2", 0.3), ("cohere", 0.3), ("bloom", 0.3)])
def test_drift_matches_reference(family, scale):
    model = build_drifted_model(causal_model(family), scale)
    rows = random_answers(9, VOCABULARY)
    padded = family == "bloom"
    running = contextlib.nullcontext if padded else lambda: packed_rows(model)
    batcher = CausalMicroBatcher(40, True, padded, "cpu")
    drift = measure_drift(model, rows, batcher, base=lambda: disabled(model), running=running)
    expected = reference_drift(model, rows, lambda: disabled(model))
    actual = [drift.base_loss, drift.loss, drift.divergence, drift.same]
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=1e-5)
    assert drift.tokens == sum(row.label_count for row in rows) and (drift.divergence > 1e-4) == bool(scale)
    if not scale:  # an untrained adapter has not drifted
        assert drift.same == 1 and not drift.large and len(drift.lines()) == 1


@pytest.fixture(scope="module")
def base_loss_and_count(long_context_folder):
    """Return the loss of an untouched base model on general answers, and their number."""
    base_model = open_on_cpu(long_context_folder)
    rows = general_answers(GreedyDecoder(base_model.model, base_model.tokenizer), PROMPTS)
    return reference_drift(base_model.model, rows, contextlib.nullcontext)[0], len(rows)


@pytest.mark.parametrize("method", slow_except("lora", "full"))
def test_train_and_eval_report_the_same_drift(method, settings, long_context_folder, base_loss_and_count, tmp_path):
    changes = {"model": str(long_context_folder), "train": {"drift": True}, **METHODS[method]}
    result = fit(settings(tmp_path / "run", **changes))
    session = open_on_cpu(result.output)
    measured = measure_run_drift(session)
    for name in ("base_loss", "loss", "same", "divergence"):
        if getattr(result.drift, name) is not None:
            assert getattr(measured, name) == pytest.approx(getattr(result.drift, name), rel=1e-3, abs=1e-5)
    # Methods that modify the base model have no divergence from it.
    assert (result.drift.divergence is None) == (method in ("head", "input", "last", "full"))
    assert measured.divergence > 0 and result.drift.loss != result.drift.base_loss
    expected, answers = base_loss_and_count
    assert result.drift.base_loss == pytest.approx(expected, rel=1e-4)
    assert json.loads(json.dumps(result.as_dict()))["drift"]["answers"] == answers == result.drift.answers
    assert metrics(result.output)[-1] == {"step": result.outcome.steps, "drift": result.drift.as_dict()}
    assert "| drift | general answers' loss" in (result.output / "README.md").read_text()
    if method == "lora":
        pairs = compare_answers(session, 3)
        prompts = [pair.prompt for pair in pairs]
        assert len(pairs) == 3 and set(prompts) <= set(PROMPTS)
        with session.base():
            rows = general_answers(GreedyDecoder(session.model, session.tokenizer), prompts * 3)
        assert [pair.base for pair in pairs] == [row.answer for row in rows[:3]]


@pytest.fixture
def model_and_tokenizer():
    """Return a model whose context fits general prompts, and its tokenizer."""
    return tiny_llama(max_position_embeddings=512), byte_tokenizer()


def test_answers_are_greedy_up_to_the_end_token(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    for row in general_answers(GreedyDecoder(model, tokenizer), PROMPTS):
        ids = torch.from_numpy(row.tokens).long()[None]
        with torch.no_grad():
            most_likely = model(input_ids=ids).logits[0].argmax(-1).numpy()
        labels = np.flatnonzero(row.is_label)
        assert labels[0] == row.prompt_length and (most_likely[labels - 1] == row.tokens[labels]).all()
        has_end_token = row.tokens[-1] in (0, 2)
        assert has_end_token or len(labels) == MAX_ANSWER_TOKENS
    tokenizer.chat_template = None
    rows = general_answers(GreedyDecoder(model, tokenizer), PROMPTS)
    assert tokenizer.decode(rows[0].tokens[: rows[0].prompt_length]) == PROMPTS[0]


def test_answers_are_cached_by_model_version_code_and_arithmetic(model_and_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    calls = mock.Mock(wraps=generate)
    monkeypatch.setattr(general, "generate", calls)
    changed_arithmetic = dataclasses.replace(loader.arithmetic(), fp32="wide")

    def damage():
        for file in (keys.root() / "remembered" / "general").iterdir():
            file.write_text(json.dumps({**json.loads(file.read_text()), "value": [[1, "two"]]}))

    first = None
    for number, (change, *template, model) in enumerate(
        [
            (None, "this model"),
            (None, "another model"),
            (None, "plain", "this model"),
            (damage, "this model"),
            (lambda: fake_version(monkeypatch, "torch"), "this model"),
            (lambda: fake_version(monkeypatch, "transformers"), "this model"),
            (lambda: modify_source(monkeypatch, tmp_path / "source", "kernels/decode.py"), "this model"),
            (lambda: monkeypatch.setattr(loader, "arithmetic", lambda: changed_arithmetic), "this model"),
        ],
        start=1,
    ):
        if change is not None:
            change()
        for _ in range(2):
            answers = general_answers(GreedyDecoder(*model_and_tokenizer, model), PROMPTS, *template)
            first = first or answers
            assert template or all((a.tokens == b.tokens).all() for a, b in zip(first, answers, strict=True))
        assert calls.call_count == number


def test_model_identity_changes_with_a_single_value():
    model = tiny_llama()
    identity = model_identity(model, "fp32")
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight[3, 5] = torch.nextafter(weight[3, 5], weight[3, 5] + 1)
    assert model_identity(model, "fp32") != identity


def test_unmeasurable_drift_is_reported(settings, long_context_folder, tmp_path):
    for drift in (None, False):
        output = RecordingCallback()
        options = {} if drift is None else {"drift": drift}
        train = {"max_steps": 1, **options}
        result = fit(settings(tmp_path / str(drift), model=str(long_context_folder), train=train), callback=output)
        assert result.drift is None and result.as_dict()["drift"] is None
        assert ("drift: not measured (a model of" in output) == (drift is None) == ("drift" in output)
    with pytest.raises(NoGeneralAnswers, match="64 positions"):
        general_answers(GreedyDecoder(tiny_llama(max_position_embeddings=64), byte_tokenizer()), PROMPTS)


def test_drift_of_continued_run_names_loss_at_its_start(settings, long_context_folder, tmp_path):
    common = {"model": str(long_context_folder), "train": {"max_steps": 3, "drift": True}}
    first = fit(settings(tmp_path / "first", **common))
    result = fit(settings(tmp_path / "second", **common, start_from=str(first.output)))
    assert first.drift is not None and first.drift.start_loss is None
    assert result.drift.start_loss == pytest.approx(first.drift.loss, rel=1e-5)
    assert result.drift.loss != result.drift.start_loss
    line = f"  {result.drift.loss - first.drift.loss:+.2f} nats/token of it since the adapter of start_from"
    assert line in result.drift.lines()
    assert "before this run, with the adapter of start_from" in drift_text(read_run(result.output))


def test_large_or_nonfinite_drift_is_a_warning():
    for change, large in ((LARGE / 2, False), (LARGE + 0.1, True), (float("nan"), True)):
        drift = Drift(0.5, 0.5 + change, change, 0.9, 8, 100)
        assert drift.large == large == ("train.keep_general" in "".join(drift.lines()[1:]))
        json.dumps(drift.as_dict(), allow_nan=False)


def test_rehearsal_and_drift_prompts_are_disjoint():
    assert not set(DRIFT_PROMPTS) & set(REHEARSAL_PROMPTS)
    assert len(set(DRIFT_PROMPTS)) == len(DRIFT_PROMPTS) and len(set(REHEARSAL_PROMPTS)) == len(REHEARSAL_PROMPTS)


def test_rehearsal_of_general_answers_limits_drift(settings, long_context_folder, tmp_path):
    runs = []
    for weight in (0, 2):
        output = RecordingCallback()
        train = {"drift": True, "epochs": 3, "learning_rate": 3e-2, "keep_general": weight}
        runs.append(fit(settings(tmp_path / f"{weight}", model=str(long_context_folder), train=train), callback=output))
        assert "no memory plan" not in output and ("keep_general 2: " in output) == bool(weight)
    plain, rehearsed = runs
    assert rehearsed.drift.loss < plain.drift.loss - 0.1
    assert rehearsed.outcome.rows == plain.outcome.rows and rehearsed.outcome.tokens == plain.outcome.tokens
    first, *others = [line["general_loss"] for line in metrics(rehearsed.output, "learning_rate")]
    assert first == pytest.approx(0, abs=1e-6) and min(others) > 0
    assert "general_loss" not in (plain.output / "metrics.jsonl").read_text()


def test_classifier_rejects_rehearsal_of_general_answers(settings, tmp_path, long_context_folder):
    table = write_rows(tmp_path / "rows.jsonl", ({"text": f"text {n}", "label": "ab"[n % 2]} for n in range(8)))
    changes = {"task": "sequence-classification", "data": {"train": str(table)}, "train": {"keep_general": 1}}
    with pytest.raises(UserError, match="general answers cannot be rehearsed"):
        fit(settings(tmp_path / "run", model=str(long_context_folder), **changes))


def mean_divergence(model, rows):
    """Return KL(base ‖ model) over all tokens at the labels of the rows, from the model's own logits in float64."""
    divergences = []
    for row in rows:
        ids = torch.from_numpy(row.tokens).long()[None]
        positions = np.flatnonzero(row.is_label) - 1
        log_q = model(input_ids=ids).logits[0].double().log_softmax(-1)[positions]
        with torch.no_grad(), disabled(model):
            log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)[positions]
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(divergences).mean()


def build_rehearsal(model, rows, **options):
    batcher = CausalMicroBatcher(64, True, False, "cpu")
    objective = CausalObjective(model)
    with packed_rows(model), disabled(model):
        base = base_log_probs(objective, batcher, rows)
    return GeneralRehearsal(objective, batcher, rows, base, weight=0.7, seed=3, **options)


def test_rehearsal_gradients_match_weighted_mean_divergence(monkeypatch):
    monkeypatch.setattr(general, "TOP_TOKENS", VOCABULARY)
    model = build_drifted_model(causal_model("llama"), 0.3)
    rehearsal = build_rehearsal(model, random_answers(5, VOCABULARY), per_step=2)
    with packed_rows(model):
        value = rehearsal(1)
    actual = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    chosen = rehearsal.rows_of(1)
    mean = mean_divergence(model, chosen)
    assert value == pytest.approx(mean.item(), rel=1e-4)
    assert_gradients(actual, gradients(model, 0.7 * mean), 1e-4)
    row_numbers = [row.row for step in range(5) for row in rehearsal.rows_of(step)]
    assert sorted(row_numbers[:5]) == sorted(row_numbers[5:]) == [1, 2, 3, 4, 5]


def test_remaining_tokens_count_as_one_in_divergence(monkeypatch):
    model = build_drifted_model(causal_model("llama"), 0.3)
    rows = random_answers(5, VOCABULARY)
    values = []
    for count in (1, 4, VOCABULARY):
        monkeypatch.setattr(general, "TOP_TOKENS", count)
        rehearsal = build_rehearsal(model, rows, per_step=5)
        with packed_rows(model):
            values.append(rehearsal(0).item())
    assert 0 < values[0] < values[1] < values[2] == pytest.approx(mean_divergence(model, rows).item(), rel=1e-4)


def test_rehearsal_has_no_gradient_until_answers_drift():
    model = build_drifted_model(causal_model("llama"), 0.0)
    rehearsal = build_rehearsal(model, random_answers(5, VOCABULARY))
    with packed_rows(model):
        assert rehearsal(0).item() == pytest.approx(0, abs=1e-6)
    assert max(p.grad.abs().max() for p in model.parameters() if p.requires_grad) < 1e-6


@pytest.mark.parametrize("method", ["lora", "full"])
def test_resumed_rehearsal_is_bit_identical(method, settings, long_context_folder, tmp_path):
    train = {"max_steps": 4, "checkpoint_every": 1, "keep_general": 1, "drift": False, "learning_rate": 1e-2}
    common = {"model": str(long_context_folder), "method": method, "train": train}
    fit(settings(tmp_path / "whole", **common))
    run = stopped_run(settings(tmp_path / "resumed", **common), 2)
    assert fit(settings(run, **common)).resumed_from_step == 2
    general_losses = [
        [line["general_loss"] for line in metrics(folder, "learning_rate")] for folder in (run, tmp_path / "whole")
    ]
    assert general_losses[0] == general_losses[1] and general_losses[0][3] > 0
    assert_same_run(run, tmp_path / "whole")
