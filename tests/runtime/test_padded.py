"""Attention both ways over padded rows is torch's own, by another kernel."""

from __future__ import annotations

import pytest
import torch
import transformers

from deltaw.kernels import loader
from deltaw.runtime import packed
from deltaw.runtime.packed import padded_rows

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
        mask = (torch.arange(21) < torch.tensor(lengths)[:, None]).long()
        found = []
        for way in (None, padded_rows):
            model.zero_grad()
            with way(model) if way else torch.enable_grad():
                out = model(input_ids=tokens, attention_mask=mask).last_hidden_state
                (out * toward * mask[..., None]).sum().backward()
            found.append([out.detach()[mask.bool()], model.embeddings.word_embeddings.weight.grad.clone()])
        for ours, theirs in zip(*found, strict=True):
            # Sums of some hundred fp32 products in another order: of the norm, whatever the processor.
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    assert model.config._attn_implementation == "sdpa"


def test_an_image_model_gives_the_same():
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=4, **SIZES)).eval()
    pixels = torch.randn(3, 3, 16, 16)
    expected = model(pixels).last_hidden_state
    with padded_rows(model):
        torch.testing.assert_close(model(pixels).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(loader.library() is None, reason="no compiled kernels: torch's own attention runs")
def test_the_kernel_is_taken_for_padding_at_the_end_and_no_other_mask(monkeypatch):
    taken = []
    own = packed.packed_attention
    monkeypatch.setattr(packed, "packed_attention", lambda *a, **k: taken.append(1) or own(*a, **k))
    model = encoder()
    tokens = torch.randint(0, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    masks = {"end": [[1] * 6, [1, 1, 1, 0, 0, 0]], "start": [[1] * 6, [0, 0, 1, 1, 1, 1]]}
    for where, mask in masks.items():
        taken.clear()
        expected = model(input_ids=tokens, attention_mask=torch.tensor(mask)).last_hidden_state
        with padded_rows(model, fused=False):
            out = model(input_ids=tokens, attention_mask=torch.tensor(mask)).last_hidden_state
        seen = torch.tensor(mask).bool()
        torch.testing.assert_close(out[seen], expected[seen], rtol=1e-4, atol=1e-5)
        assert len(taken) == (2 if where == "end" else 0)
