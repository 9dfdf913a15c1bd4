"""The objective has the same loss and gradients for any layout, microbatch size and chunk size."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from deltaw.runtime.packed import packed_rows
from deltaw.runtime.packing_checks import can_pack
from deltaw.training import causal_objective as objective_module
from deltaw.training.batchers import CausalMicroBatcher
from deltaw.training.causal_objective import CausalObjective, chunked_cross_entropy
from tests.tiny_models import CAUSAL, PADDED, VOCABULARY, causal_model
from tests.training.loops import example
from tests.training.test_losses import assert_gradients, gradients, log_prob


def rows(seed=0):
    """Return shared, nested, equal, prefix and unrelated rows, with labels on the second half of each."""
    random = np.random.default_rng(seed)

    lengths = (9, 6, 4, 3, 5, 17, 2)
    texts = [random.integers(3, VOCABULARY, n).tolist() for n in lengths]
    stem, middle, end_a, end_b, end_c, long_row, short_row = texts
    nested = [stem + end_a, stem + middle + end_b, stem + middle + end_c, stem + middle, stem]
    token_lists = [*nested, long_row, short_row, nested[0]]
    return [example(number, tokens, max(1, len(tokens) // 2)) for number, tokens in enumerate(token_lists, 1)]


def assert_same(actual, expected):
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    assert_gradients(actual[1], expected[1], 1e-5)


def row_by_row(model, examples):
    """Return the reference: every row in its own forward pass."""
    loss = -sum(log_prob(model, row) for row in examples)
    return loss.item(), gradients(model, loss)


def in_passes(model, examples, tokens_per_pass, *, share, padded=False):
    objective = CausalObjective(model)
    with contextlib.nullcontext() if padded else packed_rows(model):
        loss = sum(objective(batch) for batch in CausalMicroBatcher(tokens_per_pass, share, padded).batches(examples))
        return loss.item(), gradients(model, loss)


@pytest.mark.parametrize("family", [*CAUSAL, *PADDED])
def test_all_layouts_match_single_rows(family):
    model = causal_model(family)
    examples = rows()
    choice = can_pack(model)
    assert choice.value == (family in CAUSAL) and (choice.value or type(model).__name__ in choice.why)
    expected = row_by_row(model, examples)
    for share, budget in [(True, 10_000), (True, 30), (False, 20)] if choice.value else []:
        assert_same(in_passes(model, examples, budget, share=share), expected)
    for budget in (10_000, 40) if family in (*PADDED, "llama", "gemma2", "gpt2") else []:
        assert_same(in_passes(model, examples, budget, share=False, padded=True), expected)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_chunked_head_matches_unchunked_head(chunk):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 11).double()
    hidden = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (7,))
    weights = torch.rand(7, dtype=torch.float64)
    expected = (torch.nn.functional.cross_entropy(head(hidden), targets, reduction="none") * weights).sum()
    inputs = [hidden, *head.parameters()]
    expected_grads = torch.autograd.grad(expected * 3, inputs)
    actual = chunked_cross_entropy(hidden, targets, weights, head, list(head.parameters()), chunk=chunk)
    torch.testing.assert_close(actual, expected.detach())
    torch.testing.assert_close(torch.autograd.grad(actual * 3, inputs), expected_grads)


def test_model_loss_is_independent_of_chunk_size(monkeypatch):
    model = causal_model("gemma2")
    unchunked = in_passes(model, rows(), 10_000, share=True)
    monkeypatch.setattr(objective_module, "CHUNK_BYTES", 4 * VOCABULARY * 3)
    assert_same(in_passes(model, rows(), 10_000, share=True), unchunked)


def test_modified_head_disables_chunking():
    model = causal_model("llama")
    assert CausalObjective(model).chunked
    forward = model.forward

    def shifted(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits + torch.arange(output.logits.shape[-1])
        return output

    model.forward = shifted
    assert not CausalObjective(model).chunked
