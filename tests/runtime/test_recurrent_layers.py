"""Tests of models with recurrent layers on packed rows."""

from __future__ import annotations

import pytest
import torch

from deltaw.runtime.packed import packed_rows
from deltaw.runtime.packing_checks import can_pack
from tests.runtime.recurrent_families import FAMILIES, recurrent_model
from tests.runtime.separate_rows import assert_equals_separate_rows, attach_everywhere


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_equal_separate_rows(family):
    # PEFT rejects the output projections of these two, because their CUDA kernels would ignore the adapter.
    excluded = ["out_proj"] if family in ("falcon_h1", "nemotron_h") else None
    model = attach_everywhere(recurrent_model(family), excluded)
    assert can_pack(model).value
    assert_equals_separate_rows(model)


def test_other_calls_are_unchanged():
    model = recurrent_model("qwen3_5_text")
    tokens = torch.arange(3, 40)[None]
    before = model(input_ids=tokens).logits
    with packed_rows(model):
        pass
    assert torch.equal(model(input_ids=tokens).logits, before)


def test_an_unknown_recurrence_stays_padded():
    from transformers import JambaConfig, JambaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = JambaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, mamba_dt_rank=4)
    choice = can_pack(JambaForCausalLM(config).eval())
    assert not choice.value
