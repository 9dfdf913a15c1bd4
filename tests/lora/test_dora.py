"""DoRA: the closed form matches its reference, and the layers match PEFT."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaw.lora import (
    DoRALinear,
    LoRAConfig,
    LoRALayer,
    adapter_parameters,
    attach,
    count_parameters,
    detach,
    merge,
    unmerge,
)
from deltaw.lora.layers import DoRALayer
from deltaw.lora.math_dora import weight_norm
from tests.lora.models import (
    KINDS,
    all_kinds_and_peft,
    check_ten_steps,
    inputs,
    logits,
    randomise,
    relative_error,
    tiny,
)


def _layer(dtype: torch.dtype = torch.float32, **options: float) -> DoRALinear:
    torch.manual_seed(0)
    layer = DoRALinear(8, 6, 3, alpha=6, bias=True, dtype=dtype, **options)
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.lora_magnitude.mul_(torch.rand(6) + 0.5)
    return layer


def _dense_reference(layer: DoRALinear, x: Tensor) -> Tensor:
    """Compute equation 5 of the paper with dense matrices and a constant norm."""
    total = layer.weight + layer.scaling * (layer.lora_A @ layer.lora_B).t()
    norm = total.norm(dim=1, keepdim=True).detach()
    return F.linear(x, layer.lora_magnitude[:, None] * total / norm, layer.bias)


def test_layer_matches_paper_equation():
    layer = _layer()
    x = torch.randn(2, 5, 8, requires_grad=True)
    torch.testing.assert_close(layer(x), _dense_reference(layer, x))
    operands = (x, layer.lora_A, layer.lora_B, layer.lora_magnitude)
    ours = torch.autograd.grad(layer(x).pow(2).sum(), operands)
    torch.testing.assert_close(ours, torch.autograd.grad(_dense_reference(layer, x).pow(2).sum(), operands))


def test_backward_saves_only_output_in_addition_to_plain_lora():
    layer = _layer()
    x = torch.randn(5, 7, 8, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    input_pointers = {t.data_ptr() for t in (x, y, *layer.parameters())}
    assert sorted(tuple(t.shape) for t in saved if t.data_ptr() not in input_pointers) == [(6,), (35, 3)]


def test_in_place_change_of_output_raises():
    y = _layer()(torch.randn(2, 8))
    y.relu_()
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def test_zero_weight_row_remains_zero():
    linear = nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight[1] = 0
    layer = DoRALinear.from_linear(linear, 2)
    x = torch.randn(5, 4, requires_grad=True)
    torch.testing.assert_close(layer(x), linear(x))
    layer(x).sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (x, layer.lora_B, layer.lora_magnitude))


def test_norm_follows_in_place_writes_and_casts():
    layer = _layer().eval()
    x = torch.randn(5, 8)
    with torch.no_grad():
        layer(x)
        for tensor in (layer.weight, layer.lora_A, layer.lora_B):
            tensor.mul_(1.5)
            torch.testing.assert_close(layer(x), _dense_reference(layer, x))
        reference = copy.deepcopy(layer)
        for _ in range(3):
            reference.lora_B.mul_(0.5)
        torch.testing.assert_close(reference(x), _dense_reference(reference, x))
        layer.load_state_dict(_layer().state_dict())
        torch.testing.assert_close(layer(x), _dense_reference(layer, x))
        layer.double()
        torch.testing.assert_close(layer(x.double()), _dense_reference(layer, x.double()))


def test_norm_is_cached_across_forwards_without_gradients(monkeypatch):
    layer = _layer().eval()
    calls: list[int] = []
    monkeypatch.setattr("deltaw.lora.math_dora.weight_norm", lambda *a: calls.append(1) or weight_norm(*a))
    x = torch.randn(5, 8)
    with torch.inference_mode():
        layer(x), layer(x)
    assert len(calls) == 1
    layer(x).sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_sets_output_dtype_and_norm_is_fp32(dtype):
    layer = _layer()
    x = torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = layer(x)
        assert torch.equal(layer.weight_norm(), _layer().weight_norm())
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), _dense_reference(layer, x), atol=0.2, rtol=0.05)
    y.sum().backward()
    assert x.grad.dtype == layer.lora_A.grad.dtype == layer.lora_magnitude.grad.dtype == torch.float32


def _magnitudes(theirs: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("base_model.model.").partition(".lora_magnitude")[0]: parameter
        for name, parameter in theirs.named_parameters()
        if "lora_magnitude_vector" in name
    }


def _ten_steps_agree(ours: nn.Module, theirs: nn.Module, ids: Tensor) -> None:
    torch.testing.assert_close(ours(ids), theirs(ids), atol=1e-5, rtol=1e-5)
    check_ten_steps(ours, theirs, lambda model: model(ids).pow(2).mean(), 1e-2)
    for name, magnitude in _magnitudes(theirs).items():
        assert relative_error(ours.get_submodule(name).lora_magnitude, magnitude) <= 1e-5, name


def test_all_layer_kinds_match_peft_for_ten_steps():
    ours, theirs, ids = all_kinds_and_peft(dora=True)
    reference = _magnitudes(theirs)
    assert reference.keys() == set(KINDS)
    for name, magnitude in reference.items():
        assert relative_error(ours.get_submodule(name).lora_magnitude, magnitude) <= 1e-6
    _ten_steps_agree(ours, theirs, ids)


def test_dropout_matches_peft(monkeypatch):
    """PEFT also applies W to the dropped input. Both use the same masks here."""

    def dropped(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        mask_values = torch.arange(x.numel()).view(x.shape) % 3 != 0
        return x * mask_values / (1 - p) if training else x

    def mask(self: Tensor, p: float) -> Tensor:
        return self.copy_(torch.arange(self.numel()).view(self.shape) % 3 != 0)

    ours, theirs, ids = all_kinds_and_peft(dora=True, dropout=0.25)
    monkeypatch.setattr(F, "dropout", dropped)
    monkeypatch.setattr(Tensor, "bernoulli_", mask)
    _ten_steps_agree(ours.train(), theirs.train(), ids)


@torch.no_grad()
def test_merge_preserves_outputs_and_unmerge_is_bit_exact():
    ours, _, ids = all_kinds_and_peft(dora=True)
    for layer in ours.modules():
        if isinstance(layer, DoRALayer):
            layer.lora_magnitude.mul_(1.3)
    adapted = ours(ids)
    bits = copy.deepcopy(ours).state_dict()
    merge(ours)
    torch.testing.assert_close(ours(ids), adapted, atol=1e-5, rtol=1e-4)
    ours.double().float()
    unmerge(ours)
    assert all(torch.equal(t, bits[name]) for name, t in ours.state_dict().items())
    torch.testing.assert_close(ours(ids), adapted)
    merge(ours, keep_original=False)
    detach(ours)
    assert not any(isinstance(m, LoRALayer) for m in ours.modules())
    torch.testing.assert_close(ours(ids), adapted, atol=1e-5, rtol=1e-4)


def test_magnitudes_are_counted_and_trained():
    model = tiny("gpt2")
    plain = logits(model, "gpt2")
    total = count_parameters(model).total
    summary = attach(model, LoRAConfig(rank=4, target_modules=["c_attn", "wte"], dora=True))
    torch.testing.assert_close(logits(model, "gpt2"), plain, atol=1e-5, rtol=1e-5)
    assert summary.trained == 2 * (4 * (32 + 96) + 96) + 4 * (97 + 32) + 32
    assert count_parameters(model).total == total == summary.total
    assert sum(name.endswith("lora_magnitude") for name, _ in adapter_parameters(model)) == 3
    randomise(model)
    model(**inputs("gpt2")).logits.pow(2).mean().backward()
    assert all(torch.count_nonzero(p.grad) for _, p in adapter_parameters(model))
