"""Attaching and detaching adapters, and the state that must not change."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltaw.errors import UserError
from deltaw.lora import (
    LoRAConfig,
    LoRALinear,
    adapter_parameters,
    attach,
    count_parameters,
    detach,
    disabled,
    is_factor_B,
)
from tests.lora.models import inputs, logits, randomise, tiny


def _state(model: nn.Module) -> dict[str, object]:
    """Return object identities and flags that :func:`detach` must restore."""
    modules = {name: (id(m), m.training, type(m)) for name, m in model.named_modules(remove_duplicate=False)}
    flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    identities = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    return {"modules": modules, "flags": flags, "identities": identities}


def _bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def _step(model: nn.Module, family: str, count: int = 3) -> None:
    trained = [p for _, p in adapter_parameters(model)]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(count):
        optimizer.zero_grad()
        model(**inputs(family)).logits.pow(2).mean().backward()
        optimizer.step()


_CONFIGS = {
    "plain": {"rank": 4},
    "dropout and rslora": {"rank": 4, "dropout": 0.2, "rslora": True},
    "pissa": {"rank": 4, "init": "pissa"},
    "olora": {"rank": 4, "init": "olora"},
    "dora": {"rank": 4, "dora": True, "dropout": 0.2},
    "dora pissa": {"rank": 4, "dora": True, "init": "pissa", "target_modules": "mlp"},
    "all biases": {"rank": 4, "bias": "all", "target_modules": "attention"},
    "whole head": {"rank": 4, "target_modules": "attention", "train_modules": ["lm_head"]},
    "embedding": {"rank": 4, "target_modules": ["wte", "wpe", "c_attn"], "bias": "lora_only"},
}


@pytest.mark.parametrize("settings", _CONFIGS.values(), ids=_CONFIGS.keys())
def test_detach_after_training_restores_model_exactly(settings):
    model = tiny("gpt2")
    next(model.parameters()).requires_grad_(False)
    before = _state(model)
    bits = _bits(model)
    plain = logits(model, "gpt2")
    attach(model, LoRAConfig(**settings), seed=0)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n, _ in adapter_parameters(model)}
    model.train()
    _step(model, "gpt2")
    model.eval()
    with disabled(model):
        assert torch.equal(logits(model, "gpt2"), plain)
    assert not torch.equal(logits(model, "gpt2"), plain)
    detach(model)
    assert _state(model) == before and _bits(model) == bits
    assert torch.equal(logits(model, "gpt2"), plain)


def test_attaching_twice_raises():
    model = tiny("llama")
    attach(model, LoRAConfig(rank=4))
    with pytest.raises(UserError, match="already"):
        attach(model, LoRAConfig(rank=4))
    detach(model)
    with pytest.raises(UserError, match="no adapter"):
        detach(model)
    with pytest.raises(UserError, match="no adapter"), disabled(model):
        pass


@pytest.mark.parametrize("settings", [{"rank": 4}, {"rank": 3, "init": "pissa"}, {"rank": 3, "dora": True}])
def test_failed_attach_leaves_model_unchanged(settings):
    model = nn.ModuleDict({"lin": nn.Linear(8, 8), "conv": nn.Conv1d(6, 6, 1, groups=3)})
    before = _state(model)
    bits = _bits(model)
    with pytest.raises(UserError, match="'conv'"):
        attach(model, LoRAConfig(target_modules=["lin", "conv"], **settings))
    assert _state(model) == before and _bits(model) == bits


def test_shared_module_is_adapted_and_counted_once():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    summary = attach(model, LoRAConfig(rank=2))
    assert (summary.adapted, summary.trained) == (1, 16) and model[0] is model[2] and isinstance(model[0], LoRALinear)
    detach(model)
    assert model[0] is shared and model[2] is shared


def test_factor_B_is_recognized_by_name():
    model = tiny("gpt2")
    attach(model, LoRAConfig(rank=4, target_modules=["c_attn", "wte"], train_modules=["ln_f"], dora=True))
    names = [name for name, _ in adapter_parameters(model) if is_factor_B(name)]
    assert len(names) == 3 and all(not model.get_parameter(name).any() for name in names)


def test_adapting_embedding_leaves_tied_head_unchanged():
    model = tiny("gpt2")
    hidden = torch.randn(2, 32)
    before = model.lm_head(hidden)
    attach(model, LoRAConfig(rank=4, target_modules=["wte"]))
    randomise(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.lm_head(hidden), before)


def test_training_copy_of_tied_embedding_is_reported():
    model = tiny("gpt2")
    head = model.lm_head.weight
    summary = attach(model, LoRAConfig(rank=4, target_modules=["c_attn"], train_modules=["wte"]))
    assert "tied" in str(summary) and "lm_head" in str(summary)
    before = head.detach().clone()
    _step(model, "gpt2")
    assert model.lm_head.weight is head and torch.equal(head, before)
    assert not torch.equal(model.transformer.wte.weight, head)


def test_copies_of_tied_modules_remain_tied():
    model = tiny("gpt2")
    summary = attach(model, LoRAConfig(rank=4, target_modules=["c_attn"], train_modules=["wte", "lm_head"]))
    assert model.lm_head.weight is model.transformer.wte.weight and not summary.notes


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_init_that_changes_tied_weight_raises(init):
    with pytest.raises(UserError, match="wte"):
        attach(tiny("gpt2"), LoRAConfig(rank=4, target_modules=["lm_head"], init=init))


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_nonzero_init_preserves_outputs_and_trains_both_factors(init):
    model = tiny("llama")
    plain = logits(model, "llama")
    attach(model, LoRAConfig(rank=4, init=init))
    torch.testing.assert_close(logits(model, "llama"), plain, atol=1e-4, rtol=1e-4)
    model(**inputs("llama")).logits.pow(2).mean().backward()
    assert all(torch.count_nonzero(p.grad) for _, p in adapter_parameters(model))


@pytest.mark.parametrize(("bias", "trained"), [("all", 2), ("lora_only", 1)])
def test_selected_biases_are_trained(bias, trained):
    model = nn.ModuleDict({"lin": nn.Linear(4, 3), "norm": nn.LayerNorm(3)})
    attach(model, LoRAConfig(rank=2, target_modules=["lin"], bias=bias))
    assert sum(p.requires_grad for n, p in model.named_parameters() if n.endswith("bias")) == trained
    with pytest.raises(UserError, match="bias"):
        attach(nn.Sequential(nn.Linear(4, 3, bias=False)), LoRAConfig(rank=2, bias=bias))


def test_parameter_counts_exclude_adapter_and_duplicates():
    model = tiny("gpt2")
    total = sum(p.numel() for p in model.parameters())
    assert count_parameters(model).total == count_parameters(model).trained == total
    parts = {"target_modules": ["c_attn", "wte"], "train_modules": ["ln_f"], "bias": "lora_only"}
    summary = attach(model, LoRAConfig(rank=4, **parts))
    expected = 2 * (4 * (32 + 96) + 96) + 4 * (97 + 32) + 2 * 32
    count = count_parameters(model)
    assert (count.total, count.trained) == (total, expected) == (summary.total, summary.trained)
    assert sum(count.per_module.values()) == expected and count.per_module["transformer.ln_f"] == 64
    assert sum(p.numel() for _, p in adapter_parameters(model)) == expected
    assert f"{total:,}" in str(summary) and f"{total:,}" in str(count)


def test_attached_model_can_be_deep_copied():
    model = tiny("gpt2")
    attach(model, LoRAConfig(rank=4, init="pissa", train_modules=["ln_f"]))
    expected = logits(model, "gpt2")
    randomise(reference := copy.deepcopy(model))
    detach(reference)
    assert torch.equal(logits(model, "gpt2"), expected)
    torch.testing.assert_close(logits(reference, "gpt2"), expected, atol=1e-4, rtol=1e-4)


def test_detach_preserves_later_cast_and_training_mode():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    attach(model, LoRAConfig(rank=2, target_modules=["0", "1"], train_modules=["2"]))
    model.double().train()
    with disabled(model):
        model(torch.tensor([1, 2]))
    detach(model)
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.float64}
    assert all(module.training for module in model.modules())


def test_hooks_of_replaced_module_still_run():
    model = nn.Sequential(nn.Linear(4, 4))
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    attach(model, LoRAConfig(rank=2))
    model(torch.randn(2, 4))
    assert calls == [1]


def test_torch_encoder_fast_path_does_not_bypass_adapter():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 8)
    padded = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])

    def output() -> torch.Tensor:
        return model(x, src_key_padding_mask=padded)[~padded].detach()

    with torch.no_grad():
        base = output()
    attach(model, LoRAConfig(rank=2, target_modules=["linear1", "linear2"]))
    randomise(model)
    slow = output()
    with torch.no_grad():
        torch.testing.assert_close(output(), slow)
        assert not torch.allclose(slow, base, atol=1e-3)
        detach(model)
        assert model.use_nested_tensor and model.layers[0].activation_relu_or_gelu == 1
        assert torch.equal(output(), base)


def test_compiled_model_is_adapted():
    model = nn.Sequential(nn.Linear(4, 4), Conv1D(3, 4))
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 4)
    compiled(x)
    summary = attach(compiled, LoRAConfig(rank=2))
    randomise(model)
    assert summary.adapted == 2
    torch.testing.assert_close(compiled(x), model(x))
    with disabled(compiled):
        torch.testing.assert_close(compiled(x), model(x))
    detach(compiled)
    assert type(model[0]) is nn.Linear
