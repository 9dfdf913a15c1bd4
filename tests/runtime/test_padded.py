"""Attention both ways over padded rows is torch's own, by another kernel."""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers

from deltaw.kernels import loader
from deltaw.runtime import packed
from deltaw.runtime.packed import padded_rows
from tests.runtime.families import off

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}


def encoder() -> transformers.BertModel:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(vocab_size=60, **SIZES)).eval()


def test_an_encoder_gives_the_same_outputs_and_gradients():
    model = encoder()
    tokens = torch.randint(0, 60, (4, 21), generator=torch.Generator().manual_seed(0))
    # Not their squares: behind a LayerNorm the sum of squares is constant, and its gradient rounding alone.
    toward = torch.randn(4, 21, 32, generator=torch.Generator().manual_seed(1))
    for lengths in ([21, 3, 12, 1], [21, 21, 21, 21]):
        mask, found = (torch.arange(21) < torch.tensor(lengths)[:, None]).long(), []
        for way in (contextlib.nullcontext, padded_rows):
            with way(model):
                out = model(input_ids=tokens, attention_mask=mask).last_hidden_state
                (slope,) = torch.autograd.grad(
                    (out * toward * mask[..., None]).sum(), [model.embeddings.word_embeddings.weight]
                )
            found.append([out[mask.bool()], slope])
        for ours, theirs in zip(*found, strict=True):
            # Sums of some hundred fp32 products in another order: of the norm, whatever the processor.
            assert off(ours, theirs) < 1e-5
    assert model.config._attn_implementation == "sdpa"


def test_an_image_model_gives_the_same():
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=4, **SIZES)).eval()
    pixels = torch.randn(3, 3, 16, 16)
    expected = model(pixels).last_hidden_state
    with padded_rows(model):
        assert off(model(pixels).last_hidden_state, expected) < 1e-5


@pytest.mark.skipif(loader.library() is None, reason="no compiled kernels: torch's own attention runs")
def test_the_kernel_is_taken_for_padding_at_the_end_and_no_other_mask(monkeypatch):
    taken = []
    own = packed.packed_attention
    monkeypatch.setattr(packed, "packed_attention", lambda *a, **k: taken.append(1) or own(*a, **k))
    model = encoder()
    tokens = torch.randint(0, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    for row, calls in (([0, 0, 1, 1, 1, 1], 0), ([1, 1, 1, 0, 0, 0], 2)):
        mask = torch.tensor([[1] * 6, row])
        expected = model(input_ids=tokens, attention_mask=mask).last_hidden_state[mask.bool()]
        with padded_rows(model, fused=False):
            out = model(input_ids=tokens, attention_mask=mask).last_hidden_state[mask.bool()]
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert len(taken) == calls
