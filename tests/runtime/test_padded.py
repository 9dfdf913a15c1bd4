"""Bidirectional attention over padded rows matches torch's implementation."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch

from deltaw.kernels import loader
from deltaw.runtime import padded
from deltaw.runtime.padded import padded_rows
from tests.runtime.families import VOCABULARY, encoder_of, relative_error
from tests.runtime.test_fused import count_runs

unfused_padded_rows = functools.partial(padded_rows, fused=False)


def test_encoder_outputs_and_gradients_match():
    model = encoder_of("Bert")
    table = model.embeddings.word_embeddings.weight.requires_grad_()
    tokens = torch.randint(0, VOCABULARY, (4, 21), generator=torch.Generator().manual_seed(0))
    # Squares are unsuitable: after a LayerNorm their sum is constant, so gradients would be only rounding errors.
    output_weights = torch.randn(4, 21, 32, generator=torch.Generator().manual_seed(1))
    for lengths in ([21, 3, 12, 1], [21, 21, 21, 21]):
        mask = (torch.arange(21) < torch.tensor(lengths)[:, None]).long()
        results = []
        for context in (contextlib.nullcontext, unfused_padded_rows):
            with context(model):
                out = model(input_ids=tokens, attention_mask=mask).last_hidden_state
                loss = (out * output_weights * mask[..., None]).sum()
                results.append([out[mask.bool()], *torch.autograd.grad(loss, [table])])
        for ours, theirs in zip(*results, strict=True):
            # Sums of some hundred fp32 products in different order, on any CPU.
            assert relative_error(ours, theirs) < 1e-5
    assert model.config._attn_implementation == "sdpa"


def test_image_model_outputs_match():
    model = encoder_of("ViT")
    pixels = torch.randn(3, 3, 16, 16)
    expected = model(pixels).last_hidden_state
    with unfused_padded_rows(model):
        assert relative_error(model(pixels).last_hidden_state, expected) < 1e-5


@pytest.mark.skipif(loader.library() is None, reason="no compiled kernels: torch's own attention runs")
def test_kernels_run_only_for_right_padding(monkeypatch):
    attention_calls = []
    original = padded.packed_attention
    model = encoder_of("Bert")
    tokens = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    with padded_rows(model):  # recognition also runs blocks
        pass
    monkeypatch.setattr(padded, "packed_attention", lambda *a, **k: attention_calls.append(1) or original(*a, **k))
    block_runs = count_runs(monkeypatch)
    for row, calls in (([0, 0, 1, 1, 1, 1], 0), ([1, 1, 1, 0, 0, 0], 2)):
        mask = torch.tensor([[1] * 6, row])
        expected = model(input_ids=tokens, attention_mask=mask).last_hidden_state[mask.bool()]
        for context in (unfused_padded_rows, padded_rows):
            with context(model):
                out = model(input_ids=tokens, attention_mask=mask).last_hidden_state[mask.bool()]
            assert relative_error(out, expected) < 1e-5
        assert (len(attention_calls), len(block_runs)) == (calls, calls)
