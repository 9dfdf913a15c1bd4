"""Attaching and training on fake tensors, as in memory planning."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from deltaw.lora import LoRAConfig, adapter_parameters, attach, initialize_from_activations, merge
from deltaw.lora.attachment import require_attachment
from tests.lora.models import mixture, tiny


class _FakeScalars(TorchDispatchMode):
    """Return values for bool() and item(), which fake tensors do not support."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype == torch.bool or 1.0
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fake_tensors() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True), _FakeScalars():
        yield


_SETTINGS = {
    "dropout": {"dropout": 0.1},
    "dora dropout": {"dora": True, "dropout": 0.1},
    "pissa": {"init": "pissa"},
    "olora dora": {"init": "olora", "dora": True},
    "orthogonal": {"init": "orthogonal"},
    "biases": {"bias": "lora_only", "target_modules": ["c_attn"]},
    "bias on B": {"lora_bias": True},
    "parameters": {"target_modules": ["c_attn"], "target_parameters": ["c_fc.weight"]},
    "tokens": {"trainable_token_indices": {"wte": [3, 5], "wpe": [0]}},
    "extra modules": {"target_modules": ["c_attn", "wpe"], "train_modules": ["ln_f"], "dora": True},
}


@pytest.mark.parametrize("settings", _SETTINGS.values(), ids=_SETTINGS.keys())
@pytest.mark.usefixtures("fake_tensors")
def test_training_step_runs(settings):
    model = tiny("gpt2")
    attach(model, LoRAConfig(rank=4, **settings), seed=0)
    assert require_attachment(model).fingerprint is None
    model.train()
    optimizer = torch.optim.AdamW([p for _, p in adapter_parameters(model)])
    model(input_ids=torch.zeros(2, 9, dtype=torch.long)).logits.pow(2).mean().backward()
    optimizer.step()
    assert all(p.grad is not None for _, p in adapter_parameters(model))


@pytest.mark.usefixtures("fake_tensors")
def test_initialization_from_activations_runs():
    model = tiny("llama")
    attach(model, LoRAConfig(rank=4, init="eva"), seed=0)
    initialized = initialize_from_activations(model, lambda: model(input_ids=torch.zeros(2, 9, dtype=torch.long)))
    assert initialized.initialized == 14 and initialized.tokens == (18, 18)


@pytest.mark.usefixtures("fake_tensors")
def test_merge_runs():
    model = nn.Sequential(nn.Linear(4, 3), Conv1D(5, 3))
    attach(model, LoRAConfig(rank=2, dora=True))
    merge(model)
    assert model(torch.zeros(2, 4)).shape == (2, 5)


def test_attach_and_backward_run_on_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3), Conv1D(5, 3))
    attach(model, LoRAConfig(rank=2, dora=True))
    model(torch.zeros(2, 4, device="meta")).sum().backward()
    assert require_attachment(model).fingerprint is None and model[0].lora_magnitude.grad.shape == (3,)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.usefixtures("fake_tensors")
def test_training_step_of_experts_runs(kind):
    # On fake tensors torch's grouped matmul supports only bf16.
    model = mixture(kind, torch.bfloat16)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoRAConfig(rank=4, target_modules=["q_proj"], target_parameters=parameters)
    attach(model, config, seed=0)
    x = torch.zeros(2, 16, dtype=torch.bfloat16)
    chosen = torch.tensor([[0, 1], [1, 2]])
    shares = torch.full((2, 2), 0.5, dtype=torch.bfloat16)
    for layer in model.model.layers:
        # The router depends on values, which fake tensors lack, so only the experts run.
        layer.mlp.experts(x, chosen, shares).sum().backward()
    factors = [p for name, p in adapter_parameters(model) if "experts" in name]
    assert len(factors) == 8 and all(p.grad is not None and p.grad.shape == p.shape for p in factors)


@pytest.mark.usefixtures("fake_tensors")
def test_training_step_of_torch_attention_runs():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    attach(model, LoRAConfig(rank=2))
    model(torch.zeros(2, 3, 8)).sum().backward()
    assert all(p.grad is not None for _, p in adapter_parameters(model))
    merge(model)
    assert model(torch.zeros(2, 3, 8)).shape == (2, 3, 8)
