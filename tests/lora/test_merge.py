"""Merging rounds once, and unmerging is bit-exact."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deltaw.errors import UserError
from deltaw.lora import LoRAConfig, LoRALinear, attach, disabled, merge, unmerge
from tests.lora.models import FAMILIES, logits, randomise, tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_attach_and_merge_preserve_outputs_and_unmerge_is_bit_exact(family):
    model = tiny(family)
    base = logits(model, family)
    attach(model, LoRAConfig(rank=4, rslora=True))
    torch.testing.assert_close(logits(model, family), base, atol=1e-6, rtol=1e-6)
    randomise(model)
    bits = copy.deepcopy(model).state_dict()
    adapted = logits(model, family)
    merge(model)
    torch.testing.assert_close(logits(model, family), adapted, atol=1e-4, rtol=1e-4)
    with disabled(model):
        assert torch.equal(logits(model, family), base)
    unmerge(model)
    assert all(torch.equal(t, bits[name]) for name, t in model.state_dict().items())
    assert torch.equal(logits(model, family), adapted)


@settings(max_examples=25, deadline=None)
@given(
    n_in=st.integers(1, 40),
    n_out=st.integers(1, 40),
    rank=st.integers(1, 8),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    seed=st.integers(0, 9),
)
def test_merged_weight_is_rounded_once(n_in, n_out, rank, dtype, seed):
    torch.manual_seed(seed)
    layer = LoRALinear(n_in, n_out, rank, alpha=3.0, dtype=dtype)
    nn.init.normal_(layer.lora_B)
    exact = layer.weight.double() + layer.scaling * (layer.lora_A.double() @ layer.lora_B.double()).t()
    merged = layer.merged_weight()
    assert merged.dtype == dtype
    # Half a unit in the last place of the dtype, plus the error of fp32 sums.
    unit = torch.finfo(dtype).eps / 2
    slack = 1e-5 if dtype != torch.float64 else 1e-13
    assert torch.all((merged.double() - exact).abs() <= unit * exact.abs() + slack * (1 + exact.abs()))
    if dtype in (torch.bfloat16, torch.float16):
        # A sum halfway between two numbers may be rounded up or down.
        assert (merged != exact.to(dtype)).sum() <= max(2, 0.02 * exact.numel())


def test_merging_grouped_convolution_raises_before_changes():
    model = nn.ModuleDict({"lin": nn.Linear(4, 4), "conv": nn.Conv1d(4, 4, 1, groups=2)})
    attach(model, LoRAConfig(rank=2, target_modules=["lin", "conv"]))
    randomise(model)
    before = model["lin"].weight.detach().clone()
    with pytest.raises(UserError, match="groups"):
        merge(model)
    assert torch.equal(model["lin"].weight, before) and not model["lin"].merged


@pytest.mark.parametrize("target", ["wte", "lm_head"])
def test_merging_tied_weight_raises_before_changes(target):
    model = tiny("gpt2")
    attach(model, LoRAConfig(rank=2, target_modules=[target, "c_attn"]))
    randomise(model)
    before = logits(model, "gpt2")
    with pytest.raises(UserError, match=r"lm_head|wte"):
        merge(model)
    assert torch.equal(logits(model, "gpt2"), before)


@pytest.mark.parametrize("keep_original", [True, False])
def test_merging_non_finite_sum_raises_before_changes(keep_original):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    attach(model, LoRAConfig(rank=2))
    randomise(model)
    with torch.no_grad():
        model[1].lora_B.fill_(1e5)
    before = model[0].weight.detach().clone()
    with pytest.raises(UserError, match="'1' is not finite"):
        merge(model, keep_original)
    assert torch.equal(model[0].weight, before) and not model[0].merged


def test_merging_twice_and_unmerging_unmerged_model_raise():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UserError, match="no adapter"):
        merge(model)
    attach(model, LoRAConfig(rank=2))
    with pytest.raises(UserError, match="not merged"):
        unmerge(model)
    merge(model)
    with pytest.raises(UserError, match="already"):
        merge(model)
    unmerge(model)
    merge(model, keep_original=False)
    with pytest.raises(UserError, match="not kept"):
        unmerge(model)
    with pytest.raises(UserError, match="not kept"), disabled(model):
        pass


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_merged_model_with_weight_changing_init_restores_base(init):
    model = tiny("llama")
    base = logits(model, "llama")
    attach(model, LoRAConfig(rank=4, init=init))
    residual = model.model.layers[0].mlp.up_proj.weight.clone()
    merge(model)
    with disabled(model):
        assert torch.equal(logits(model, "llama"), base)
    unmerge(model)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, residual)


def test_merge_reports_what_rounding_changes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).bfloat16()
    attach(model, LoRAConfig(rank=4))
    randomise(model)
    deltas = [layer.delta_weight().detach() for layer in model]
    weights = [layer.weight.float() for layer in model]
    summary = merge(model)
    rounding = [layer.weight - (w + delta) for layer, w, delta in zip(model, weights, deltas, strict=True)]
    for name, error, delta in zip(("0", "1"), rounding, deltas, strict=True):
        assert summary.errors[name] == pytest.approx(float(error.norm() / delta.norm()), rel=1e-3)
    total = float(torch.stack(rounding).norm() / torch.stack(deltas).norm())
    assert summary.error == pytest.approx(total, rel=1e-3) and 0 < total < 0.5

    unmerge(model)
    with torch.no_grad():
        for layer in model:
            layer.lora_B.mul_(1e-4)
    with pytest.warns(UserWarning, match="rounding changed 9.% of the update"):
        assert merge(model).error > 0.9


def test_merge_of_fp32_weights_reports_no_rounding():
    model = nn.Sequential(nn.Linear(8, 8))
    attach(model, LoRAConfig(rank=2))
    randomise(model)
    assert merge(model).error == 0.0
