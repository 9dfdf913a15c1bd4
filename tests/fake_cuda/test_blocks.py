"""Fused blocks on the fake device: launches, values, and fallbacks."""

from __future__ import annotations

import pytest
import torch

from deltaw.kernels import compiled, rows
from deltaw.runtime import fused, fused_blocks
from tests.fake_cuda.launches import counted_launches, per_block
from tests.fake_cuda.llama_steps import llama, train_llama


@pytest.fixture(autouse=True)
def _no_compiled_functions(monkeypatch):
    """Run compiled functions as torch operators."""
    monkeypatch.setattr(compiled, "DEVICES", ())


def test_block_needs_few_launches_and_step_few_synchronizations(monkeypatch):
    monkeypatch.setattr(compiled, "DEVICES", ("cuda",))
    with counted_launches() as launches:
        counts = per_block(lambda blocks: train_llama(blocks, launches)[0])
    print(counts)
    assert counts["block"] <= 120
    assert counts["synchronizations"] <= 2


def test_losses_equal_cpu_in_fp32():
    (_, cuda), (_, cpu) = (train_llama(2, device=device, dtype=torch.float32) for device in ("cuda", "cpu"))
    assert cuda == pytest.approx(cpu, rel=1e-5)
