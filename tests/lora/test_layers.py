"""Adapted layers against what a plain layer over the merged weight gives."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from deltaw.errors import UserError
from deltaw.lora import LoRAConv, LoRAConv1D, LoRAConv1d, LoRAConv2d, LoRAConv3d, LoRAEmbedding, LoRALinear
from deltaw.lora.kinds import adapter_for, refusal
from tests.lora.models import randomise


def test_from_linear_shares_weight_and_bias():
    linear = nn.Linear(4, 3)
    layer = LoRALinear.from_linear(linear, rank=2, alpha=4.0)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert (layer.rank, layer.alpha, layer.scaling) == (2, 4.0, 2.0)
    assert layer.lora_A.shape == (4, 2) and layer.lora_B.shape == (2, 3)
    assert not layer.weight.requires_grad and not layer.bias.requires_grad


def test_a_new_layer_gives_the_base_layers_own_output():
    torch.manual_seed(0)
    linear = nn.Linear(4, 3)
    x = torch.randn(5, 4)
    expected = linear(x)
    # A compiled kernel may add up in another order.
    torch.testing.assert_close(LoRALinear.from_linear(linear, 2)(x), expected, rtol=1e-6, atol=1e-6)


def test_rslora_scales_by_the_root_of_the_rank():
    assert LoRALinear(4, 4, rank=4, alpha=8.0, rslora=True).scaling == 4.0


@pytest.mark.parametrize(
    ("dtype", "factors"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_factors_are_fp32_unless_the_weight_is_fp64(dtype, factors):
    layer = LoRALinear(4, 3, 2, dtype=dtype)
    assert layer.weight.dtype == dtype and layer.lora_A.dtype == layer.lora_B.dtype == factors


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 2, "dropout": 1.0}, {"rank": 2, "init": "none"}])
def test_settings_that_cannot_be_used_are_refused(options):
    with pytest.raises(UserError):
        LoRALinear(4, 3, **options)


def test_disabled_and_merged_layers_add_nothing():
    torch.manual_seed(0)
    layer = LoRALinear(4, 3, 2)
    randomise(layer)
    x = torch.randn(5, 4)
    layer.enabled = False
    assert torch.equal(layer(x), F.linear(x, layer.weight))
    layer.enabled, layer.merged = True, True
    assert torch.equal(layer(x), F.linear(x, layer.weight))


def test_dropout_is_for_training_only():
    layer = LoRALinear(4, 3, 2, dropout=0.5)
    randomise(layer)
    x = torch.randn(5, 4)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_conv1d_of_transformers_keeps_its_layout():
    torch.manual_seed(0)
    module = Conv1D(6, 4)
    x = torch.randn(2, 3, 4)
    expected = module(x)
    layer = LoRAConv1D.from_conv1d(module, 2, 4.0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
    assert layer.weight is module.weight and layer.nf == 6
    randomise(layer)
    merged = torch.addmm(module.bias, x.view(-1, 4), layer.merged_weight()).view(2, 3, 6)
    torch.testing.assert_close(layer(x), merged)


def test_embedding_equals_one_with_the_merged_table():
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


def test_a_scaled_embedding_scales_the_update_too():
    torch.manual_seed(0)
    base = Gemma3TextScaledWordEmbedding(7, 4, 0, embed_scale=6.25)
    ids = torch.tensor([[1, 2, 6]])
    expected = base(ids)
    layer = adapter_for(base)(base, 2, 4.0)
    assert isinstance(layer, LoRAEmbedding) and torch.equal(layer(ids), expected)
    nn.init.normal_(layer.lora_B)
    torch.testing.assert_close(layer(ids), F.embedding(ids, layer.merged_weight()) * 6.25)


def test_a_scale_that_the_base_layer_does_not_use_is_not_used_either():
    base = nn.Embedding(7, 4)
    base.embed_scale = 5.0
    ids = torch.tensor([1, 2])
    assert torch.equal(adapter_for(base)(base, 2)(ids), base(ids))


def test_an_embedding_of_unknown_forward_is_refused_by_name():
    class OddWordEmbedding(nn.Embedding):
        embed_scale = 2.0

        def forward(self, input):
            return super().forward(input) * self.embed_scale + 1

    assert "OddWordEmbedding" in refusal(OddWordEmbedding(4, 3))


def test_an_embedding_with_max_norm_is_refused():
    with pytest.raises(UserError, match="max_norm"):
        LoRAEmbedding.from_embedding(nn.Embedding(4, 3, max_norm=1.0), 2)


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
def test_a_convolution_equals_one_with_the_merged_kernel(kind, size, options):
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
    """The kernel of the convolution without groups that computes the same."""
    groups, out = conv.groups, conv.out_channels // conv.groups
    wide = torch.zeros(conv.out_channels, conv.in_channels, *conv.kernel_size, dtype=conv.weight.dtype)
    for g in range(groups):
        size = conv.in_channels // groups
        wide[g * out : (g + 1) * out, g * size : (g + 1) * size] = conv.weight[g * out : (g + 1) * out]
    return wide


@pytest.mark.parametrize("kind", [LoRAConv1d, LoRAConv2d, LoRAConv3d])
def test_convolutions_have_right_derivatives(kind):
    torch.manual_seed(0)
    layer = kind(2, 4, 2, rank=2, groups=2, padding=1, dtype=torch.float64)
    randomise(layer)
    x = torch.randn(1, 2, *[3] * len(layer.kernel_size), dtype=torch.float64, requires_grad=True)
    names = ("lora_A", "lora_B")

    def call(x, *factors):
        return torch.func.functional_call(layer, dict(zip(names, factors, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, layer.lora_A, layer.lora_B))


@settings(max_examples=15, deadline=None)
@given(
    groups=st.sampled_from([1, 2]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
)
def test_conv_factors_have_the_shapes_of_files(groups, kernel, stride, padding, dilation):
    layer = LoRAConv2d(4, 6, kernel, 2, 1.0, stride, padding, dilation, groups)
    assert layer.lora_A.shape == (2, 4, kernel, kernel) and layer.lora_B.shape == (6, 2 // groups, 1, 1)
    plain = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups)
    x = torch.randn(1, 4, 7, 7)
    assert layer(x).shape == plain(x).shape


def test_groups_that_do_not_divide_the_rank_are_refused():
    with pytest.raises(UserError, match="groups"):
        LoRAConv2d(4, 4, 3, 3, groups=2)


def test_half_precision_convolution_casts_its_factors():
    layer = LoRAConv1d(2, 2, 3, 2, dtype=torch.bfloat16)
    assert layer(torch.randn(1, 2, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert LoRAConv1d(2, 2, 3, 2)(torch.randn(1, 2, 5)).dtype == torch.bfloat16


def test_a_layer_can_be_copied_and_stored():
    layer = LoRALinear(4, 3, 2)
    randomise(layer)
    reference = copy.deepcopy(layer)
    assert reference.lora_A is not layer.lora_A and torch.equal(reference.lora_A, layer.lora_A)
    assert set(layer.state_dict()) == {"weight", "lora_A", "lora_B"}


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(3),
        nn.ConvTranspose1d(2, 2, 2),
        nn.MultiheadAttention(4, 2, kdim=3),
        LoRALinear(2, 2, 1),
        nn.LazyLinear(3),
    ],
)
def test_other_modules_have_a_reason_for_being_refused(module):
    assert refusal(module)


def test_a_parametrized_or_patched_linear_is_refused():
    linear = nn.Linear(3, 3)
    nn.utils.parametrizations.weight_norm(linear)
    assert "parametrization" in refusal(linear)
    patched = nn.Linear(3, 3)
    patched.forward = lambda x: x
    assert "replaced" in refusal(patched)
    quantized = nn.Linear(3, 3)
    quantized.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    assert "int8" in refusal(quantized)
