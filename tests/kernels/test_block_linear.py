"""Tests of products with block-quantized weights against float64 products of the dequantized values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from deltaw.kernels import loader
from deltaw.kernels.block import Block, supports
from deltaw.kernels.block_linear import (
    FORMATS,
    BlockWeight,
    nf4_blocks,
    nf4_blocks_reference,
    quantize_nf4,
    reference_dequantize,
)
from deltaw.kernels.layout import Layout
from deltaw.kernels.linear import LinearProduct, linear, linear_backward
from deltaw.kernels.rows import HalfNorms, Norm
from tests.kernels.conftest import assert_close, compiled_only, same_bits
from tests.kernels.test_block_formats import random_blocks
from tests.kernels.test_linear import DTYPES, inputs, numbers

VARIANTS = "all"


def columns_of(name: str, blocks: int) -> int:
    """Return a column count of entire blocks, at least 320 for small blocks."""
    return FORMATS[name].block * blocks * (5 if FORMATS[name].block < 256 else 1)


def dequantized_values(weight: BlockWeight) -> Tensor:
    """Return the dequantized weight, rounded to bf16, in float64."""
    return reference_dequantize(weight, torch.float32).bfloat16().double()


def as_plain(weight: BlockWeight, *factors: Tensor | float) -> LinearProduct:
    """Return a product with the dequantized weight in bf16."""
    return LinearProduct(dequantized_values(weight).bfloat16(), True, None, None, None, *factors)


@pytest.mark.parametrize("name", list(FORMATS))
def test_dequantize_matches_reference(kernels: str, name: str) -> None:
    weight = random_blocks(name, 7, columns_of(name, 2))
    expected = reference_dequantize(weight, torch.float32)
    assert torch.equal(weight.dequantized(torch.float32), expected)
    assert torch.equal(weight.dequantized(torch.bfloat16, 2, 5), expected[2:5].bfloat16())
    indices = torch.tensor([[6, 0], [3, 3]])
    assert torch.equal(weight.rows_at(indices, torch.float32), expected[indices])
    with pytest.raises(IndexError):
        weight.rows_at(torch.tensor([7]), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_codes_match_reference(kernels: str, dtype: torch.dtype) -> None:
    weight = numbers(70, 192).to(dtype) * numbers(70, 1).to(dtype)
    weight[3] = 0
    weight[5, 64:128] = 2.0**-130
    codes, maxima = nf4_blocks(weight)
    expected_codes, expected_maxima = nf4_blocks_reference(weight)
    assert torch.equal(codes, expected_codes) and torch.equal(maxima, expected_maxima)
    assert len(codes.unique()) > 200


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(FORMATS))
def test_products_match_dequantized_values(kernels: str, name: str, dtype: torch.dtype) -> None:
    # Row counts smaller than a panel, more groups than one pass processes, and a low-rank update.
    for rows, out, blocks in ((3, 38, 1), (29, 70, 6)):
        weight = random_blocks(name, out, columns_of(name, blocks))
        t = inputs(rows, weight.columns, out, 4, dtype)
        exact_weight = dequantized_values(weight)
        x, grad, bias, added, A, B = (t[name] for name in ("x", "grad", "bias", "added", "lora_A", "lora_B"))
        A = A / weight.columns**0.5
        B = B * 0.1
        y, h = linear(x, LinearProduct.from_blocks(weight, bias, A, B, 0.5), added)
        product = LinearProduct.from_blocks(weight, None, A, B, 0.5)
        dx, grad_h = linear_backward(grad, product, x)
        y_plain, _ = linear(x, LinearProduct.from_blocks(weight))
        assert_close(h, x.double() @ A.double(), dtype)
        assert_close(y, x.double() @ exact_weight.t() + bias + 0.5 * h.double() @ B.double() + added, dtype)
        assert_close(grad_h, 0.5 * grad.double() @ B.double().t(), dtype)
        assert_close(dx, grad.double() @ exact_weight + grad_h.double() @ A.double().t() + x, dtype)
        assert_close(y_plain, x.double() @ exact_weight.t(), dtype)
        empty, repeated = linear_backward(grad, product, need_x=False)
        assert empty.numel() == 0 and torch.equal(repeated, grad_h)


@compiled_only
def test_products_are_identical_for_any_thread_and_row_count() -> None:
    """Threads split the rows, the columns, or neither."""
    product = LinearProduct.from_blocks(random_blocks("Q5_K", 64, 768))
    x = numbers(900, 768).bfloat16()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        y, _ = linear(x, product)
        dx, _ = linear_backward(y, product)
        assert torch.equal(linear(x[:50], product)[0], y[:50])
        results.append((y, dx))
    assert same_bits(*results)


@compiled_only
def test_products_are_bit_identical_to_plain_bf16() -> None:
    weight = quantize_nf4(numbers(48, 192).float())
    if not loader.multiplies(loader.dtype_code(torch.bfloat16)):
        pytest.skip("torch multiplies bf16 here")
    x = numbers(20, 192).bfloat16()
    grad = numbers(20, 48).bfloat16()
    products = (LinearProduct.from_blocks(weight), as_plain(weight))
    assert same_bits(*((linear(x, product)[0], linear_backward(grad, product)[0]) for product in products))


def test_operators_support_flop_counting_and_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    weight = random_blocks("NF4", 24, 128)
    with FlopCounterMode(display=False) as counter:
        linear(torch.ones(3, 128), LinearProduct.from_blocks(weight))
    assert counter.get_total_flops() == 2 * 3 * 24 * 128
    with FakeTensorMode(allow_non_fake_inputs=True):
        product = LinearProduct.from_blocks(weight, None, torch.ones(128, 2), torch.ones(2, 24))
        y, h = linear(torch.ones(3, 128), product)
        dx, grad_h = linear_backward(y, product)
    assert [tuple(t.shape) for t in (y, h, dx, grad_h)] == [(3, 24), (3, 2), (3, 128), (3, 2)]


def test_mismatched_shapes_raise() -> None:
    weight = random_blocks("Q4_0", 6, 64)
    A = torch.ones(64, 2)
    with pytest.raises(ValueError, match="left side"):
        linear(torch.ones(2, 32), LinearProduct.from_blocks(weight))
    with pytest.raises(ValueError, match="given together"):
        linear(torch.ones(2, 64), LinearProduct.from_blocks(weight, None, A))
    with pytest.raises(ValueError, match="factor"):
        linear_backward(torch.ones(2, 6), LinearProduct.from_blocks(weight, None, A, torch.ones(3, 6)))


SIZES = {"query": (64, 64), "key": (64, 32), "value": (64, 32), "output": (64, 64)}
SIZES |= {"gate": (64, 128), "up": (64, 128), "down": (128, 64)}


@compiled_only
@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "NF4"])
def test_transformer_block_is_bit_identical_to_plain_bf16(name: str) -> None:
    if not loader.multiplies(loader.dtype_code(torch.bfloat16)):
        pytest.skip("torch multiplies bf16 here")
    x = numbers(20, 64).bfloat16()
    segments = Layout.of_lengths([12, 8]).segments()
    results = []
    for is_quantized in (True, False):
        layers = {}
        for part, (inner, out) in SIZES.items():
            weight = random_blocks(name, out, inner, len(part))
            factors = numbers(inner, 4).float() / 8, numbers(4, out).float(), 0.5
            product = LinearProduct.from_blocks(weight, None, *factors) if is_quantized else as_plain(weight, *factors)
            layers[part] = SimpleNamespace(product=product)
        query, key, value, output, gate, up, down = layers.values()
        options = {"heads": 4, "key_heads": 2, "head_size": 16, "grouped": False, "query_norm": None, "key_norm": None}
        norms = HalfNorms(Norm(torch.ones(64).bfloat16()))
        options |= {"norms": norms, "inputs": [query, key, value], "output": output, "options": {"scaling": 0.25}}
        attention = SimpleNamespace(**options)
        mlp = SimpleNamespace(norms=norms, inputs=[gate, up], output=down, gated=True, kind="silu")
        assert supports(x, attention, mlp, False)
        block = Block(attention, mlp, dtype=torch.bfloat16, parallel=False, rotary_dims=0)
        y, saved = block.forward(x, segments, None, None)
        dx, factor_grads = block.backward(y, x, saved, segments, None, None, None, True, True)
        assert dx is not None
        results.append([y, dx, *factor_grads])
    assert same_bits(*results)
