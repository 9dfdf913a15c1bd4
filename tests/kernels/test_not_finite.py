"""Tests that NaN and infinity become NaN in every rounding, so that non-finite gradients can be detected."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaw.kernels import quantize
from deltaw.kernels.block_linear import quantize_nf4
from deltaw.kernels.head_gradient import class_gradient_
from deltaw.kernels.linear import LinearProduct, linear, linear_backward
from deltaw.lora.layers_quantized import Int8Linear
from tests.kernels.test_decode import Rows, decoder, new_pages, table_of
from tests.kernels.test_head_gradient import Head
from tests.kernels.test_linear import numbers

VARIANTS = "all"

pytestmark = pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
DTYPES = [torch.float32, torch.bfloat16]


def with_bad(tensor: Tensor, bad: float, *index: int) -> Tensor:
    changed = tensor.clone()
    changed[index] = bad
    return changed


def assert_only_row_is_nan(rows: Tensor, bad_row: int) -> None:
    assert rows[bad_row].isnan().all() and rows.isfinite().all(1).sum() == len(rows) - 1


# (row, column) of the first value, of a value in the second block, and of the last value.
@pytest.mark.each_value
@pytest.mark.parametrize("index", [(1, 0), (2, 131), (4, 259)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_blocks", [False, True])
def test_nonfinite_input_becomes_nan_in_int8(kernels, bad, index, dtype, in_blocks):
    x = numbers(6, 260).to(dtype)
    smooth = torch.rand(260) + 0.5
    int8, scales = quantize.quantize_activations(with_bad(x, bad, *index), smooth, in_blocks)
    restored = (int8.float() - 128) * quantize.expand_scales(scales, 260)
    row, column = index
    affected = slice(column // 128 * 128, (column // 128 + 1) * 128) if in_blocks else slice(None)
    assert restored[row, affected].isnan().all()
    assert restored.isnan().sum() == restored[row, affected].numel()


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nonfinite_values_in_products_of_int8_weights(kernels, bad, dtype, in_blocks):
    int8, scale = quantize.quantize_rows(numbers(64, 260).to(dtype))
    x = numbers(6, 260, seed=1).to(dtype)
    grad = numbers(6, 64, seed=2).to(dtype)
    product = LinearProduct(int8, scale=scale, in_blocks=in_blocks)
    assert_only_row_is_nan(linear(with_bad(x, bad, 2, 131), product)[0], 2)
    assert_only_row_is_nan(linear_backward(with_bad(grad, bad, 3, 63), LinearProduct(int8, scale=scale))[0], 3)


@pytest.mark.parametrize("by_column", [True, False])
def test_nonfinite_values_in_int8_gradients_of_bf16_weights(kernels, bad, by_column):
    weight = numbers(64, 260).bfloat16() if by_column else numbers(260, 64).bfloat16()
    grad = numbers(6, 64, seed=2).bfloat16()
    dx, _ = linear_backward(with_bad(grad, bad, 3, 63), LinearProduct(weight, by_column), in_int8=True)
    assert_only_row_is_nan(dx, 3)
    # A non-finite row of the weight affects every output computed from it.
    dx, _ = linear_backward(grad, LinearProduct(with_bad(weight, bad, 7, 5), by_column), in_int8=True)
    assert dx.isnan().all() if by_column else dx[:, 7].isnan().all() and dx[:, :7].isfinite().all()


def test_nonfinite_values_in_int8_logits(kernels, bad):
    hidden = numbers(6, 64, seed=1).bfloat16()
    weight = numbers(300, 64).bfloat16()
    product = LinearProduct(weight, scale=quantize.row_scales(weight))
    assert_only_row_is_nan(linear(with_bad(hidden, bad, 2, 63), product)[0], 2)
    spoiled = with_bad(weight, bad, 7, 5)
    assert_only_row_is_nan(linear(hidden, LinearProduct(spoiled, scale=quantize.row_scales(spoiled)))[0].t(), 7)


@pytest.mark.parametrize("index", [(1, 0), (2, 131), (4, 299)])
def test_nonfinite_values_in_class_gradients(kernels, bad, index):
    weight = numbers(300, 64).bfloat16()
    grad = with_bad(numbers(6, 300, seed=1).abs().softmax(-1).bfloat16(), bad, *index)
    assert_only_row_is_nan(class_gradient_(grad, torch.arange(6), weight, quantize.row_scales(weight)), index[0])


def test_nonfinite_values_in_head_gradients(kernels, bad):
    head = Head.of(17, 300, 16)
    logits = with_bad(head.logits(), bad, 3, 100).bfloat16()
    head.hidden[3, 7] = bad
    for logit_values in (logits, head.logits().bfloat16()):
        losses, slopes = head.losses_and_gradients(logit_values)
        assert not losses[3].isfinite() and not slopes[3].isfinite().any()
        assert losses[:3].isfinite().all()


def test_nonfinite_weights_become_nan_when_quantized(bad):
    weight = with_bad(numbers(8, 128).float(), bad, 2, 70)
    int8, scale = quantize.quantize_rows(weight)
    assert_only_row_is_nan(int8.float() * scale[:, None], 2)
    assert quantize_nf4(weight).dequantized(torch.float32)[2].isnan().all()
    layer = torch.nn.Linear(128, 8)
    layer.weight.data.copy_(weight)
    assert_only_row_is_nan(Int8Linear.from_linear(layer)(numbers(5, 128).float()).t(), 2)


def test_nonfinite_values_in_int8_decoding(kernels, bad):
    model = decoder(kind="int8")
    rows = Rows.of(48, (0, 0, 3, -1), (1, 0, 1, -1))
    rows.hidden[3, 5] = bad
    assert_only_row_is_nan(rows.step(model, new_pages(model, 2), table_of(2, 1))[1], 3)
