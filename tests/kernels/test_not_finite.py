"""NaN and infinity come out of every rounding as NaN: a gradient that is not finite is found by whoever looks
for it, and does not become a wrong number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaw.kernels import quantize
from deltaw.kernels.block_linear import quantize_nf4
from deltaw.kernels.head_gradient import class_gradient_
from deltaw.kernels.linear import Product, linear, linear_backward
from deltaw.lora.layers_quantized import Int8Linear
from tests.kernels.test_decode import Rows, decoder, new_pages, table_of
from tests.kernels.test_head_gradient import Head
from tests.kernels.test_linear import numbers

VARIANTS = "all"

pytestmark = pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
DTYPES = [torch.float32, torch.bfloat16]


def with_bad(tensor: Tensor, bad: float, *place: int) -> Tensor:
    changed = tensor.clone()
    changed[place] = bad
    return changed


def only_row_is_nan(rows: Tensor, bad_row: int) -> None:
    assert rows[bad_row].isnan().all() and rows.isfinite().all(1).sum() == len(rows) - 1


# Row and column: the first number, one of the second block, the last.
@pytest.mark.each_value
@pytest.mark.parametrize("place", [(1, 0), (2, 131), (4, 259)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_blocks", [False, True])
def test_inputs_in_int8(kernels, bad, place, dtype, in_blocks):
    x, smooth = numbers(6, 260).to(dtype), torch.rand(260) + 0.5
    int8, scales = quantize.quantized(with_bad(x, bad, *place), smooth, in_blocks)
    back = (int8.float() - 128) * quantize.spread_scales(scales, 260)
    row, column = place
    together = slice(column // 128 * 128, (column // 128 + 1) * 128) if in_blocks else slice(None)
    assert back[row, together].isnan().all()
    assert back.isnan().sum() == back[row, together].numel()


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_int8_weights(kernels, bad, dtype, in_blocks):
    int8, scale = quantize.quantized_rows(numbers(64, 260).to(dtype))
    x, grad = numbers(6, 260, seed=1).to(dtype), numbers(6, 64, seed=2).to(dtype)
    only_row_is_nan(linear(with_bad(x, bad, 2, 131), Product(int8, scale=scale, in_blocks=in_blocks))[0], 2)
    only_row_is_nan(linear_backward(with_bad(grad, bad, 3, 63), Product(int8, scale=scale))[0], 3)


@pytest.mark.parametrize("by_column", [True, False])
def test_gradients_in_int8_of_bf16_weights(kernels, bad, by_column):
    weight = numbers(64, 260).bfloat16() if by_column else numbers(260, 64).bfloat16()
    grad = numbers(6, 64, seed=2).bfloat16()
    dx, _ = linear_backward(with_bad(grad, bad, 3, 63), Product(weight, by_column), in_int8=True)
    only_row_is_nan(dx, 3)
    # What is multiplied with a row of the weight that is not finite.
    dx, _ = linear_backward(grad, Product(with_bad(weight, bad, 7, 5), by_column), in_int8=True)
    assert dx.isnan().all() if by_column else dx[:, 7].isnan().all() and dx[:, :7].isfinite().all()


def test_logits_in_int8_of_a_bf16_head(kernels, bad):
    hidden, weight = numbers(6, 64, seed=1).bfloat16(), numbers(300, 64).bfloat16()
    only_row_is_nan(linear(with_bad(hidden, bad, 2, 63), Product(weight, scale=quantize.scales_of_rows(weight)))[0], 2)
    spoiled = with_bad(weight, bad, 7, 5)
    only_row_is_nan(linear(hidden, Product(spoiled, scale=quantize.scales_of_rows(spoiled)))[0].t(), 7)


@pytest.mark.parametrize("place", [(1, 0), (2, 131), (4, 299)])
def test_gradients_of_classes(kernels, bad, place):
    weight = numbers(300, 64).bfloat16()
    grad = with_bad(numbers(6, 300, seed=1).abs().softmax(-1).bfloat16(), bad, *place)
    only_row_is_nan(class_gradient_(grad, torch.arange(6), weight, quantize.scales_of_rows(weight)), place[0])


def test_the_gradient_of_a_head(kernels, bad):
    head = Head.of(17, 300, 16)
    logits = with_bad(head.logits(), bad, 3, 100).bfloat16()
    head.hidden[3, 7] = bad
    for given in (logits, head.logits().bfloat16()):
        losses, slopes = head.found(given)
        assert not losses[3].isfinite() and not slopes[3].isfinite().any()
        assert losses[:3].isfinite().all()


def test_weights(bad):
    weight = with_bad(numbers(8, 128).float(), bad, 2, 70)
    int8, scale = quantize.quantized_rows(weight)
    only_row_is_nan(int8.float() * scale[:, None], 2)
    assert quantize_nf4(weight).dequantized(torch.float32)[2].isnan().all()
    layer = torch.nn.Linear(128, 8)
    layer.weight.data.copy_(weight)
    only_row_is_nan(Int8Linear.from_linear(layer)(numbers(5, 128).float()).t(), 2)


def test_decoding_with_int8_weights(kernels, bad):
    of, rows = decoder(kind="int8"), Rows.of(48, (0, 0, 3, -1), (1, 0, 1, -1))
    rows.hidden[3, 5] = bad
    only_row_is_nan(rows.step(of, new_pages(of, 2), table_of(2, 1))[1], 3)
