"""The norm of DoRA matches its reference implementation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.lora.math_dora import BLOCK, base_squares, weight_norm


@settings(max_examples=25, deadline=None)
@given(n_in=st.integers(1, 40), n_out=st.integers(1, 40), rank=st.integers(1, 8), block=st.sampled_from([10, BLOCK]))
def test_blockwise_norm_matches_dense_norm(n_in, n_out, rank, block):
    generator = torch.Generator().manual_seed(n_in)
    weight = torch.randn(n_out, n_in, generator=generator)
    lora_A = torch.randn(n_in, rank, generator=generator)
    lora_B = torch.randn(rank, n_out, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deltaw.lora.math_dora.BLOCK", block)
        for stored in (weight, weight.bfloat16()):
            dense = stored.double() + 0.3 * (lora_A.double() @ lora_B.double()).t()
            norm = weight_norm(stored, base_squares(stored, torch.float32), lora_A, lora_B, 0.3)
            torch.testing.assert_close(norm.double(), dense.norm(dim=1), rtol=1e-4, atol=2e-3)
