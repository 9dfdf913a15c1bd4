"""Adapted layers match a plain layer with the merged weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deltaw.errors import UserError
from deltaw.lora import DoRALinear, LoRAConv, LoRAConv1d, LoRAConv2d, LoRAConv3d, LoRAEmbedding, LoRALinear
from deltaw.lora.kinds import adapter_for, refusal
from tests.lora.models import randomise


def test_from_linear_shares_parameters_and_preserves_output():
    torch.manual_seed(0)
    linear = nn.Linear(4, 3)
    x = torch.randn(5, 4)
    expected = linear(x)
    layer = LoRALinear.from_linear(linear, rank=2, alpha=4.0)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert (layer.rank, layer.alpha, layer.scaling) == (2, 4.0, 2.0)
    assert layer.lora_A.shape == (4, 2) and layer.lora_B.shape == (2, 3)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    # A compiled kernel may sum in another order.
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_factors_and_magnitudes_are_fp32_unless_the_weight_is_fp64(dtype):
    layer = DoRALinear(4, 3, 2, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.weight.dtype == dtype
    assert layer.lora_A.dtype == layer.lora_B.dtype == layer.lora_magnitude.dtype == wide


_INVALID_SETTINGS = [(lambda: LoRALinear(4, 3, rank=0), "rank")]
_INVALID_SETTINGS += [(lambda: LoRALinear(4, 3, rank=2, dropout=1.0), "dropout")]
_INVALID_SETTINGS += [(lambda: LoRALinear(4, 3, rank=2, init="none"), "init")]
_INVALID_SETTINGS += [(lambda: LoRAConv2d(4, 4, 3, 3, groups=2), "groups")]
_INVALID_SETTINGS += [(lambda: LoRAEmbedding.from_embedding(nn.Embedding(4, 3, max_norm=1.0), 2), "max_norm")]


@pytest.mark.parametrize(("make", "message"), _INVALID_SETTINGS)
def test_invalid_settings_are_rejected(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_dropout_is_active_only_in_training():
    layer = LoRALinear(4, 3, 2, dropout=0.5)
    randomise(layer)
    x = torch.randn(5, 4)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_embedding_matches_merged_table():
    torch.manual_seed(0)
    base = nn.Embedding(7, 4, padding_idx=2)
    layer = LoRAEmbedding.from_embedding(base, 2, 4.0)
    assert torch.count_nonzero(layer.lora_A[2]) == 0
    nn.init.normal_(layer.lora_B)
    ids = torch.tensor([[1, 2, 6], [0, 2, 1]])
    torch.testing.assert_close(layer(ids), F.embedding(ids, layer.merged_weight()))
    layer(ids).sum().backward()
    assert torch.count_nonzero(layer.lora_A.grad[2]) == 0 and torch.count_nonzero(layer.lora_A.grad[1]) > 0
    assert torch.equal(layer.merged_weight()[2], base.weight[2])


def test_scale_that_base_layer_ignores_is_ignored():
    base = nn.Embedding(7, 4)
    base.embed_scale = 5.0
    ids = torch.tensor([1, 2])
    assert torch.equal(adapter_for(base).from_module(base, 2)(ids), base(ids))


_CONVS = [
    (nn.Conv1d, (9,), {}),
    (nn.Conv1d, (9,), {"stride": 2, "padding": 2, "dilation": 2}),
    (nn.Conv1d, (9,), {"padding": "same", "dilation": 3}),
    (nn.Conv2d, (9, 8), {"stride": (2, 1), "padding": (1, 0)}),
    (nn.Conv2d, (9, 8), {"padding": "same", "padding_mode": "circular"}),
    (nn.Conv2d, (9, 8), {"padding": 1, "padding_mode": "reflect", "dilation": 2}),
    (nn.Conv2d, (9, 8), {"padding": 1, "groups": 2}),
    (nn.Conv1d, (9,), {"padding": 1, "groups": 4, "dilation": 2, "padding_mode": "replicate"}),
    (nn.Conv3d, (5, 6, 4), {"padding": 1, "stride": 2}),
]


@pytest.mark.parametrize(("kind", "size", "options"), _CONVS)
def test_convolution_matches_merged_kernel(kind, size, options):
    torch.manual_seed(0)
    base = kind(4, 8, 3, dtype=torch.float64, **options)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    expected = base(x)
    layer = LoRAConv.from_conv(base, 4, 8.0)
    assert torch.equal(layer(x), expected) and layer.weight is base.weight
    randomise(layer)
    dense = kind(4, 8, 3, dtype=torch.float64, **{**options, "groups": 1})
    with torch.no_grad():
        dense.bias.copy_(base.bias)
        dense.weight.copy_(_dense_kernel(base) + layer.delta_weight())
    torch.testing.assert_close(layer(x), dense(x))


def _dense_kernel(conv: nn.Module) -> torch.Tensor:
    """Return the kernel of the equivalent convolution without groups."""
    groups = conv.groups
    out = conv.out_channels // conv.groups
    wide = torch.zeros(conv.out_channels, conv.in_channels, *conv.kernel_size, dtype=conv.weight.dtype)
    for g in range(groups):
        size = conv.in_channels // groups
        wide[g * out : (g + 1) * out, g * size : (g + 1) * size] = conv.weight[g * out : (g + 1) * out]
    return wide


@pytest.mark.parametrize("kind", [LoRAConv1d, LoRAConv2d, LoRAConv3d])
def test_convolutions_pass_gradcheck(kind):
    torch.manual_seed(0)
    layer = kind(2, 4, 2, rank=2, groups=2, padding=1, dtype=torch.float64)
    randomise(layer)
    x = torch.randn(1, 2, *[3] * len(layer.kernel_size), dtype=torch.float64, requires_grad=True)

    def call(x, lora_A, lora_B):
        return torch.func.functional_call(layer, {"lora_A": lora_A, "lora_B": lora_B}, (x,))

    assert torch.autograd.gradcheck(call, (x, layer.lora_A, layer.lora_B))


def test_half_precision_convolution_casts_its_factors():
    layer = LoRAConv1d(2, 2, 3, 2, dtype=torch.bfloat16)
    assert layer(torch.randn(1, 2, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert LoRAConv1d(2, 2, 3, 2)(torch.randn(1, 2, 5)).dtype == torch.bfloat16


class _OddEmbedding(nn.Embedding):
    embed_scale = 2.0

    def forward(self, input):
        return super().forward(input) * self.embed_scale + 1


def _patched() -> nn.Linear:
    linear = nn.Linear(3, 3)
    linear.forward = lambda x: x
    return linear


def _quantized() -> nn.Linear:
    linear = nn.Linear(3, 3)
    linear.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    return linear


_UNSUPPORTED_MODULES = [
    (nn.LayerNorm(3), "a LayerNorm, neither"),
    (nn.ConvTranspose1d(2, 2, 2), "a ConvTranspose1d, neither"),
    (nn.MultiheadAttention(4, 2, kdim=3), ""),
    (LoRALinear(2, 2, 1), "already"),
    (nn.LazyLinear(3), ""),
    (_OddEmbedding(4, 3), "_OddEmbedding overrides forward"),
    (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "parametrization"),
    (_patched(), "replaced"),
    (_quantized(), "int8"),
]


@pytest.mark.parametrize(("module", "reason"), _UNSUPPORTED_MODULES)
def test_unsupported_modules_have_a_reason(module, reason):
    assert reason in str(refusal(module)) and refusal(module)
