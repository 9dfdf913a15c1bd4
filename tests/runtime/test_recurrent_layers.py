"""Tests of models with recurrent layers on packed rows."""

from __future__ import annotations

import pytest
import torch

from deltaw.kernels.layout import Layout
from deltaw.lora import LoRAConfig, adapter_parameters, attach
from deltaw.runtime.packed import packed_rows
from deltaw.runtime.packing_checks import can_pack
from tests.runtime.recurrent_families import FAMILIES, recurrent_model

# A prefix with two continuations that branch within a chunk, a row of one token, and a longer row.
LENGTHS = (21, 3, 18, 1, 70)
PARENTS = (-1, 0, 0, -1, -1)


def rows_of(tokens):
    """Return each row with the position of its own part: (tokens of the row, positions in the packed row)."""
    parts = torch.split(torch.arange(sum(LENGTHS)), LENGTHS)
    rows = []
    for part, parent in zip(parts, PARENTS, strict=True):
        places = part if parent < 0 else torch.cat([parts[parent], part])
        rows.append((tokens[places], part, len(places) - len(part)))
    return rows


def with_adapter(family):
    model = recurrent_model(family)
    # PEFT rejects the output projections of these two, because their CUDA kernels would ignore the adapter.
    excluded = ["out_proj"] if family in ("falcon_h1", "nemotron_h") else None
    config = LoRAConfig(rank=4, alpha=8, target_modules="all-linear", exclude_modules=excluded)
    attach(model, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_equal_separate_rows(family):
    model = with_adapter(family)
    assert can_pack(model).value
    factors = [parameter for _, parameter in adapter_parameters(model)]
    layout = Layout.of_lengths(LENGTHS, PARENTS)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 120, (layout.length,), generator=generator)
    slopes = torch.randn(layout.length, 48, generator=generator)
    backbone = model.base_model
    outputs = torch.empty_like(slopes)
    total = torch.zeros(())
    for row, places, start in rows_of(tokens):
        hidden = backbone(input_ids=row[None], use_cache=False).last_hidden_state[0, start:]
        outputs[places] = hidden.detach()
        total = total + (hidden * slopes[places]).sum()
    expected = torch.autograd.grad(total, factors)
    positions = torch.from_numpy(layout.positions())[None]
    with packed_rows(model):
        hidden = backbone(
            input_ids=tokens[None], position_ids=positions, packed_layout=layout, use_cache=False
        ).last_hidden_state[0]
        computed = torch.autograd.grad((hidden * slopes).sum(), factors)
    assert float((hidden - outputs).abs().max() / outputs.abs().max()) < 1e-5
    for actual, gradient in zip(computed, expected, strict=True):
        assert float((actual - gradient).abs().max() / gradient.abs().max()) < 5e-5


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
