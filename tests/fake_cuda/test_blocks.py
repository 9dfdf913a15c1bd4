"""Fused blocks on the fake device: launches, values, and fallbacks."""

from __future__ import annotations

import pytest
import torch

from deltaw.kernels import compiled, rows
from deltaw.lora import LoRAConfig, adapter_parameters, attach
from deltaw.runtime import fused
from deltaw.runtime.packed import PREFIX_TREE, fused_blocks, outputs_at, packed_rows, sample_rows
from tests.fake_cuda.launches import counted_launches, per_block
from tests.fake_cuda.llama_steps import llama, train_llama


def test_block_needs_few_launches_and_step_few_synchronizations(monkeypatch):
    monkeypatch.setattr(compiled, "DEVICES", ("cuda",))
    with counted_launches() as launches:
        counts = per_block(lambda blocks: train_llama(blocks, launches)[0])
    assert counts["block"] <= 120
    assert counts["synchronizations"] <= 2


def test_losses_equal_cpu_in_fp32():
    (_, cuda), (_, cpu) = (train_llama(2, device=device, dtype=torch.float32) for device in ("cuda", "cpu"))
    assert cuda == pytest.approx(cpu, rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_cpu_on_prefix_tree(checkpointing):
    gradients = [prefix_tree_gradients(device, checkpointing) for device in ("cpu", "cuda")]
    for expected, actual in zip(*gradients, strict=True):
        assert float((actual.cpu() - expected).norm()) < 1e-5 * float(expected.norm())


def prefix_tree_gradients(device: str, checkpointing: bool) -> list[torch.Tensor]:
    """Return the factors' gradients for rows with a shared prefix, of which the last block needs a few outputs."""
    model = llama(2, device, torch.float32)
    attach(model, LoRAConfig(rank=4, alpha=12), seed=0)
    factors = [parameter for _, parameter in adapter_parameters(model)]
    with torch.no_grad():
        for n, factor in enumerate(factors):  # values on the CPU, because the devices have different generators
            factor.copy_(0.1 * torch.randn(factor.shape, generator=torch.Generator().manual_seed(n)))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for block in model.model.layers:
            block.training = True
    _, inputs = sample_rows(model, PREFIX_TREE)
    indices = torch.tensor([3, 7, 20], device=device)
    with packed_rows(model), outputs_at(model, indices):
        assert fused_blocks(model).choice.value
        outputs = model.base_model(**inputs).last_hidden_state[0, indices]
    # The sum of squares would be almost constant after the last norm, and its gradients only rounding.
    slopes = torch.linspace(-1, 1, outputs.numel(), device=device).view(outputs.shape)
    return list(torch.autograd.grad((outputs * slopes).sum(), factors))


def test_block_that_differs_on_device_runs_model_code(monkeypatch):
    original = fused.run_mlp
    monkeypatch.setattr(fused, "run_mlp", lambda x, *args: original(2 * x, *args) if x.is_cuda else original(x, *args))
    choice = fused_blocks(llama(2)).choice
    assert not choice.value and "LlamaDecoderLayer on cuda differs from the model's code" in choice.why


def test_functions_that_cannot_be_compiled_disable_blocks_with_reason(monkeypatch):
    monkeypatch.setattr(compiled, "DEVICES", ("cuda",))
    monkeypatch.setattr(compiled, "_REASONS", {})
    monkeypatch.setattr(rows._compiled_norm, "_selected", {})
    monkeypatch.setattr(compiled, "compile_function", lambda function: 1 / 0)
    choice = fused_blocks(llama(2)).choice
    assert not choice.value and "norm_reference is not compiled" in choice.why


def test_block_needs_less_memory_than_model_code(monkeypatch):
    monkeypatch.setattr(compiled, "DEVICES", ("cuda",))
    added = {}
    with counted_launches():
        for is_fused in (True, False):
            peaks = [step_peak(blocks, is_fused) for blocks in (1, 3)]
            added[is_fused] = peaks[1] - peaks[0]
    assert added[True] < 0.9 * added[False]


def step_peak(blocks: int, is_fused: bool) -> int:
    """Return the bytes that the peak of the steps adds to the model with its gradients."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train_llama(blocks, fused=is_fused)
    return torch.cuda.max_memory_allocated() - before
