"""Attention both ways over padded rows is torch's own, by another kernel."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch

from deltaw.kernels import loader
from deltaw.runtime import packed
from deltaw.runtime.packed import padded_rows
from tests.runtime.families import VOCABULARY, encoder_of, off
from tests.runtime.test_fused import count_runs

apart = functools.partial(padded_rows, fused=False)


def test_an_encoder_gives_the_same_outputs_and_gradients():
    model = encoder_of("Bert")
    table = model.embeddings.word_embeddings.weight.requires_grad_()
    tokens = torch.randint(0, VOCABULARY, (4, 21), generator=torch.Generator().manual_seed(0))
    # Not their squares: behind a LayerNorm the sum of squares is constant, and its gradient rounding alone.
    toward = torch.randn(4, 21, 32, generator=torch.Generator().manual_seed(1))
    for lengths in ([21, 3, 12, 1], [21, 21, 21, 21]):
        mask, found = (torch.arange(21) < torch.tensor(lengths)[:, None]).long(), []
        for way in (contextlib.nullcontext, apart):
            with way(model):
                out = model(input_ids=tokens, attention_mask=mask).last_hidden_state
                found.append([out[mask.bool()], *torch.autograd.grad((out * toward * mask[..., None]).sum(), [table])])
        for ours, theirs in zip(*found, strict=True):
            # Sums of some hundred fp32 products in another order: of the norm, whatever the processor.
            assert off(ours, theirs) < 1e-5
    assert model.config._attn_implementation == "sdpa"


def test_an_image_model_gives_the_same():
    model, pixels = encoder_of("ViT"), torch.randn(3, 3, 16, 16)
    expected = model(pixels).last_hidden_state
    with apart(model):
        assert off(model(pixels).last_hidden_state, expected) < 1e-5


@pytest.mark.skipif(loader.library() is None, reason="no compiled kernels: torch's own attention runs")
def test_the_kernels_are_taken_for_padding_at_the_end_and_no_other_mask(monkeypatch):
    taken, own, model = [], packed.packed_attention, encoder_of("Bert")
    tokens = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    with padded_rows(model):  # recognition runs blocks of its own
        pass
    monkeypatch.setattr(packed, "packed_attention", lambda *a, **k: taken.append(1) or own(*a, **k))
    ran = count_runs(monkeypatch)
    for row, calls in (([0, 0, 1, 1, 1, 1], 0), ([1, 1, 1, 0, 0, 0], 2)):
        mask = torch.tensor([[1] * 6, row])
        expected = model(input_ids=tokens, attention_mask=mask).last_hidden_state[mask.bool()]
        for way in (apart, padded_rows):
            with way(model):
                out = model(input_ids=tokens, attention_mask=mask).last_hidden_state[mask.bool()]
            assert off(out, expected) < 1e-5
        assert (len(taken), len(ran)) == (calls, calls)
