"""Losses of per-row log-probabilities match values and gradients of separate forwards in float64."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax, logsigmoid

import deltaw
from deltaw.data.example import Example, RowGroup
from deltaw.data.packing import pack, pad
from deltaw.lora import LoRAConfig
from deltaw.methods.lora import LoRA
from deltaw.methods.whole_parameters import Full
from deltaw.runtime.packed import packed_rows
from deltaw.training import causal_objective
from deltaw.training.batchers import CausalMicroBatcher
from deltaw.training.causal_objective import CausalObjective, frozen_head_log_probs, head_log_probs
from deltaw.training.losses import CrossEntropy, RowLogProbs
from tests.tiny_models import VOCABULARY, causal_model
from tests.training.loops import example, randomize_lora_b
from tests.training.toy_preference import BETA, Preference


def pairs(count=6, seed=0):
    """Return pairs of answers to a prompt each. All prompts share a beginning."""
    random = np.random.default_rng(seed)
    random_tokens = lambda n: random.integers(3, VOCABULARY, n)  # noqa: E731
    stem = random_tokens(6)
    groups = []
    for number in range(count):
        prompt = [*stem, *random_tokens(5)]
        rows = (example(number + 1, [*prompt, *random_tokens(2 + number % 3)], 11) for _ in ("chosen", "rejected"))
        groups.append(RowGroup(tuple(rows)))
    return groups


def log_prob(model, row):
    """Return the reference: the log-probability of a row's labels from its own forward pass."""
    tokens = torch.from_numpy(row.tokens.astype(np.int64))
    logits = model(input_ids=tokens[None], use_cache=False).logits[0]
    positions = torch.from_numpy(np.flatnonzero(row.is_label))
    return log_softmax(logits.double(), -1)[positions - 1, tokens[positions]].sum()


def reference_loss(model, groups):
    logprobs = torch.stack([torch.stack([log_prob(model, row) for row in group.rows]) for group in groups])
    return -logsigmoid(BETA * (logprobs[:, 0] - logprobs[:, 1])).sum()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(actual, expected, share, floor=1e-2):
    """Check that each gradient differs by at most ``share`` of its norm, or of the largest norm times ``floor``."""
    assert actual.keys() == expected.keys()
    scale = max(g.norm() for g in expected.values())
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= share * max(gradient.norm(), floor * scale), name


def adapted(family, method, seed=0):
    model = causal_model(family)
    method.prepare(model, seed=seed)
    return randomize_lora_b(model, 0.05)  # A has no gradient if B is zero


METHODS = {"frozen head": lambda: LoRA(LoRAConfig(rank=4, alpha=8)), "trained head": lambda: Full(None)}


@pytest.mark.each_pair
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "cohere"])
@pytest.mark.parametrize("layout", ["shared", "apart", "padded"])
def test_pair_gradients_match_separate_float64_forwards(family, method, layout):
    model = adapted(family, METHODS[method]())
    exact = copy.deepcopy(model).double()
    groups = pairs()
    expected_loss = reference_loss(exact, groups)
    expected = gradients(exact, expected_loss)
    objective = CausalObjective(model, Preference())
    batcher = CausalMicroBatcher(70, layout == "shared", layout == "padded", "cpu")
    assert len(batcher.shapes(groups)) > 1
    with contextlib.nullcontext() if layout == "padded" else packed_rows(model):
        loss = sum(objective(batch) for batch in batcher.batches(groups))
        actual = gradients(model, loss)
    assert float(loss.detach()) == pytest.approx(float(expected_loss.detach()), rel=1e-5)
    assert_gradients(actual, expected, 2e-5)


def test_public_loop_trains_pairs():
    groups = pairs()
    trained = {}
    first_losses = {}
    for budget in (60, 10_000):
        model = adapted("llama", METHODS["frozen head"]())
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        exact = copy.deepcopy(model).double()
        before = reference_loss(exact, groups)
        expected = gradients(exact, before / len(groups))
        batcher = CausalMicroBatcher(budget, True, False, "cpu")
        options = {"learning_rate": 1e-2, "total_steps": 10, "batch_size": len(groups), "max_grad_norm": None}
        steps = []
        objective = CausalObjective(model, Preference())
        with packed_rows(model):
            deltaw.train(objective, [*named.values()], groups, batcher, names=[*named], on_step=steps.append, **options)
        assert len(steps) == 10 and steps[0].label_tokens == steps[0].rows == len(groups)
        norm = torch.stack([g.norm() for g in expected.values()]).norm()
        assert steps[0].gradient_norm == pytest.approx(float(norm), rel=1e-5)
        assert reference_loss(copy.deepcopy(model).double(), groups) < 0.5 * before
        first_losses[budget] = steps[0].loss
        trained[budget] = named
    assert first_losses[60] == pytest.approx(first_losses[10_000], rel=1e-6)
    for name, parameter in trained[60].items():
        assert (parameter - trained[10_000][name]).norm() <= 2e-3 * parameter.norm(), name


@pytest.mark.each_pair
@pytest.mark.parametrize("budget", [1, 25, 60, 1000])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_groups_are_not_split_and_every_row_occurs_once(budget, share, padded):
    groups = pairs(9)
    batcher = CausalMicroBatcher(budget, share, padded, "cpu", fill=False)
    microbatches = list(batcher.batches(groups))
    examples = [example for batch in microbatches for example in batch.examples]
    assert sorted(map(id, examples)) == sorted(id(row) for group in groups for row in group.rows)
    for batch, (rows, length) in zip(microbatches, batcher.shapes(groups), strict=True):
        assert batch.tokens == rows * length
        assert batch.tokens <= budget or len(batch.sizes) == 1
        for pair in zip(batch.examples[::2], batch.examples[1::2], strict=True):
            assert any(group.rows == pair for group in groups)


@pytest.mark.parametrize("lay_out", [pack, pad])
def test_log_probs_are_returned_per_row_for_shared_labels(lay_out):
    random = np.random.default_rng(0)
    stem = random.integers(3, VOCABULARY, 12)
    lengths = ((2, 5), (4, 9), (3, 13))
    rows = [example(end, [*stem, *random.integers(3, VOCABULARY, end)], first) for end, first in lengths]
    rows.append(Example(9, rows[0].tokens, rows[0].is_label, 0, None))  # equal to the first
    model = causal_model("llama")
    batch = lay_out(rows)
    with contextlib.nullcontext() if lay_out is pad else packed_rows(model), torch.no_grad():
        logprobs = RowLogProbs.of(batch, CausalObjective(model).token_log_probs(batch))
    expected = [log_prob(model, row).item() for row in logprobs.rows]
    assert (len(logprobs.values) < len(logprobs.index)) == (lay_out is pack)
    assert logprobs.sums().tolist() == pytest.approx(expected, rel=1e-5)
    assert [int(count) for count in logprobs.counts()] == [row.label_count for row in logprobs.rows]
    with pytest.raises(ValueError, match="groups"):
        logprobs.grouped(logprobs.sums())


class GenericCrossEntropy:
    """Cross-entropy by its definition, computed on the generic path of any loss."""

    __call__ = staticmethod(CrossEntropy())
    units = staticmethod(CrossEntropy().units)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_fast_cross_entropy_matches_generic_path(family, method):
    model = adapted(family, METHODS[method]())
    rows = [row for group in pairs() for row in group.rows]
    fast = CausalObjective(model)
    generic = CausalObjective(model, GenericCrossEntropy())
    results = []
    with packed_rows(model):
        for objective in (fast, generic):
            loss = sum(objective(batch) for batch in CausalMicroBatcher(50, True, False).batches(rows))
            results.append((float(loss.detach()), gradients(model, loss)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert_gradients(results[1][1], results[0][1], 1e-5, floor=1e-4)


@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_head_log_probs_match_log_softmax(rows_at_once, monkeypatch):
    monkeypatch.setitem(causal_objective.FROZEN_CHUNK_BYTES, "cpu", 8 * 11 * rows_at_once)
    monkeypatch.setattr(causal_objective, "FROZEN_CHUNK_ROWS", 1)
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11).double()
    targets = torch.randint(0, 11, (7,))
    hidden = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    fixed, weight, bias = (t.detach() for t in (hidden, head.weight, head.bias))

    def frozen(x, softcap=0.0):
        return frozen_head_log_probs(x, targets, weight, bias, 0.7, softcap)

    def trained(x, weight, bias):
        return head_log_probs(x, targets, head, [head.weight, head.bias], chunk=rows_at_once)

    logits = head(hidden)
    for actual, expected_logits in (
        (trained(hidden, head.weight, head.bias), logits),
        (frozen(hidden), 0.7 * logits),
        (frozen(hidden, 3.0), 3 * torch.tanh(0.7 * logits / 3)),
    ):
        torch.testing.assert_close(actual, log_softmax(expected_logits, -1)[torch.arange(7), targets])
    assert torch.autograd.gradcheck(trained, (hidden, head.weight, head.bias))
    assert torch.autograd.gradcheck(lambda w, b: trained(fixed, w, b), (head.weight, head.bias))
    assert torch.autograd.gradcheck(frozen, (hidden,)) and torch.autograd.gradcheck(lambda x: frozen(x, 3.0), (hidden,))


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("loss", [None, Preference()], ids=["cross-entropy", "preference"])
def test_second_backward_returns_equal_gradients(method, loss):
    model = adapted("llama", METHODS[method]())
    with packed_rows(model):
        (batch,) = CausalMicroBatcher(10_000, True, False).batches(pairs(3))
        total = CausalObjective(model, loss)(batch)
        trained = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(total * 0.25, trained, retain_graph=True)
        second = torch.autograd.grad(total * 0.25, trained)
    for first_gradient, second_gradient in zip(first, second, strict=True):
        assert torch.equal(first_gradient, second_gradient)
