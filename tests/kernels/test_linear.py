"""Tests of products with low-rank updates against float64 references: forward, backward, odd sizes and int8."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st

from deltaw.kernels import head_gradient as head
from deltaw.kernels import linear as products
from deltaw.kernels import loader, quantize
from deltaw.kernels.decode_reference import DecoderLinear
from deltaw.kernels.linear import LinearProduct
from deltaw.lora import stored
from deltaw.lora.layers_quantized import Int8Linear
from tests.kernels.conftest import assert_close, compiled_only, examples

VARIANTS = "all"

DTYPES = [torch.float32, torch.bfloat16]
sizes = st.tuples(st.integers(1, 70), st.integers(1, 40).map(lambda n: 4 * n), st.integers(1, 40).map(lambda n: 4 * n))


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(rows: int, n_in: int, n_out: int, rank: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    shapes = {"x": (rows, n_in), "weight": (n_out, n_in), "bias": (n_out,), "added": (rows, n_out)}
    shapes |= {"grad": (rows, n_out), "lora_A": (n_in, rank), "lora_B": (rank, n_out)}
    tensors = {name: numbers(*shape, seed=seed).to(dtype) for seed, (name, shape) in enumerate(shapes.items())}
    return {name: tensor.float() if name.startswith("lora") else tensor for name, tensor in tensors.items()}


def adapted(t: dict[str, torch.Tensor], by_column: bool = True) -> LinearProduct:
    return LinearProduct(t["weight"], by_column, None, None, t["bias"], t["lora_A"], t["lora_B"], 0.5)


@compiled_only
@examples(sizes, st.sampled_from(DTYPES), st.sampled_from([2, 4, 16, 18]), st.booleans())
def test_forward_and_backward_match_reference(size, dtype, rank, by_column):
    t = inputs(*size, rank, dtype)
    t["weight"] = t["weight"] if by_column else t["weight"].t().contiguous()
    exact = {k: v.double() for k, v in t.items()}
    product = adapted(t, by_column)
    exact_product = adapted(exact, by_column)
    assert products.can_multiply(t["x"], product)
    y, h = products.linear(t["x"], product, t["added"])
    dx, grad_h = products.linear_backward(t["grad"], product, t["x"])
    expected = [*products.linear_reference(exact["x"], exact_product, exact["added"])]
    expected += [*products.linear_backward_reference(exact["grad"], exact_product, exact["x"])]
    for actual, exact_value in zip((y, h, dx, grad_h), expected, strict=True):
        assert_close(actual, exact_value, dtype)
    factors = products.factors_backward(t["x"], h, t["grad"], grad_h, 0.5)
    expected = products.factors_backward_reference(exact["x"], h.double(), exact["grad"], grad_h.double(), 0.5)
    for actual, exact_value in zip(factors, expected, strict=True):
        assert actual.dtype == torch.float32  # sums are returned unrounded
        assert_close(actual, exact_value, torch.float32)


@compiled_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_deep_products_are_deterministic(dtype, threads):
    """The inner dimension spans several packed groups and is split among threads because there are few columns.

    The second product has a power of two as row stride, for which operands are repacked to avoid cache conflicts.
    """
    t = inputs(130, 4800, 36, 2, dtype)
    actual = [products.linear(t["x"], adapted(t))[0] for _ in range(2)]
    assert torch.equal(*actual)
    exact = {name: tensor.double() for name, tensor in t.items()}
    assert_close(actual[0], products.linear_reference(exact["x"], adapted(exact))[0], dtype)
    grad = numbers(40, 4096).to(dtype)
    weight = numbers(4096, 64, seed=1).to(dtype)
    actual, _ = products.linear_backward(grad, LinearProduct(weight))
    assert_close(actual, grad.double() @ weight.double(), dtype)


@pytest.mark.parametrize("size", [(5, 7, 9), (3, 6, 10), (0, 8, 12)])
def test_unsupported_sizes_and_empty_inputs_use_reference(size):
    t = inputs(*size, 3, torch.bfloat16)
    y, h = products.linear(t["x"], adapted(t))
    exact, _ = products.linear_reference(t["x"].double(), adapted({k: v.double() for k, v in t.items()}))
    assert h.shape == (size[0], 3)
    assert_close(y, exact, torch.bfloat16)


@compiled_only
@examples(sizes, st.booleans(), st.booleans(), st.sampled_from(DTYPES))
def test_int8_products_are_exact_up_to_final_rounding(size, with_columns, in_blocks, dtype):
    rows, n_in, n_out = size
    t = inputs(rows, n_in, n_out, 4, dtype)
    int8, scale = quantize.quantize_rows(t["weight"])
    columns = torch.rand(n_in, generator=torch.Generator().manual_seed(0)) + 0.5 if with_columns else None
    int8_x, scales = quantize.quantize_activations(t["x"], columns, in_blocks)
    steps_reference, scales_reference = quantize.quantize_activations_reference(t["x"], columns, in_blocks)
    assert (int8_x.int() - steps_reference.int()).abs().max() <= 1  # ties may round either way
    torch.testing.assert_close(scales, scales_reference)
    product = LinearProduct(int8, True, scale, columns, None, t["lora_A"], t["lora_B"], 2.0, in_blocks)
    y, h = products.linear(t["x"], product, None, int8_x, scales)
    rounded = (int8_x.double() - 128) * quantize.expand_scales(scales.double(), n_in)
    base_product = rounded @ int8.double().t() * scale.double()
    assert_close(h, t["x"].double() @ t["lora_A"].double(), dtype)
    # h is rounded to the input dtype. The error can be large relative to a sum whose terms cancel.
    assert_close(y, base_product + h.double() @ (2.0 * t["lora_B"].double()), torch.bfloat16)
    if dtype == torch.bfloat16:  # quantizing on read gives the same int8 values
        row_scales = quantize.row_scales(t["weight"])
        on_read = LinearProduct(t["weight"], scale=row_scales, in_blocks=in_blocks)
        quantized_on_read, _ = products.linear(t["x"], on_read)
        quantized_before, _ = products.linear(t["x"], LinearProduct(int8, scale=row_scales, in_blocks=in_blocks))
        assert_close(quantized_on_read, quantized_before, torch.bfloat16)
    dx, _ = products.linear_backward(t["grad"], LinearProduct(int8, True, scale, columns))
    exact = torch.zeros(rows, n_in, dtype=torch.float64)
    for start in range(0, n_out, quantize.INT8_BLOCK):
        part = slice(start, start + quantize.INT8_BLOCK)
        g, g_scales = quantize.quantize_activations(t["grad"][:, part].contiguous(), scale[part].contiguous())
        exact += (g.double() - 128) @ int8[part].double() * g_scales.double()[:, None]
    assert_close(dx, exact if columns is None else exact * columns.double(), dtype)


def test_int8_is_in_range_for_largest_value_and_zero_rows():
    """Although 1 / scale rounds up for some rows, the largest value must be 127 steps and not 128."""
    x = (numbers(500, 16).abs() + 1e-3).to(torch.bfloat16)
    x[3] = 0
    steps, scales = quantize.quantize_activations(x, None)
    assert steps.min() >= 1 and steps.max() == 255 and scales[3] == 0 and (steps[3] == 128).all()
    restored = (steps.float() - 128) * scales[:, None]
    assert ((restored - x.float()).abs() <= 0.51 * scales[:, None]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_scales_confine_outlier_to_its_block(dtype, threads):
    t = inputs(70, 300, 40, 4, dtype)
    x = t["x"].clone()
    int8, scale = quantize.quantize_rows(t["weight"])
    x[:, 5] *= 300
    errors = {}
    for in_blocks in (False, True):
        y, _ = products.linear(x, LinearProduct(int8, scale=scale, in_blocks=in_blocks))
        wide = LinearProduct(int8, scale=scale.double(), in_blocks=in_blocks)
        expected, _ = products.linear_reference(x.double(), wide)
        assert_close(y, expected, torch.bfloat16)
        steps, scales = quantize.quantize_activations(x, None, in_blocks)
        rounded = (steps.double() - 128) * quantize.expand_scales(scales.double(), 300)
        errors[in_blocks] = (rounded - x.double())[:, 128:].norm() / x.double()[:, 128:].norm()
    assert errors[False] > 0.2 and errors[True] < 0.02


def class_gradients(rows: int, classes: int, spread: float, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax gradients of the logits, probabilities minus one at the target, and the targets."""
    targets = torch.arange(rows) * stride % classes
    grad = numbers(rows, classes, seed=1).mul(spread).softmax(-1)
    grad[torch.arange(rows), targets] -= 1.0
    return grad, targets


@compiled_only
@examples(st.integers(1, 80), st.integers(1, 1300), st.integers(1, 70), st.booleans())
def test_int8_class_gradient_matches_reference(rows, classes, width, negative):
    grad, targets = class_gradients(rows, classes, 4.0, 7)
    weight = numbers(classes, width).bfloat16()
    grad = (-grad if negative else grad).bfloat16()
    grad[0] = 0
    scale = quantize.row_scales(weight)
    expected = head.class_gradient_reference(grad.double(), targets, weight, scale.double())
    assert_close(head.class_gradient_(grad.clone(), targets, weight, scale), expected, torch.bfloat16)


@compiled_only
def test_int8_class_gradient_is_close_to_exact(threads):
    weight = numbers(5000, 64).bfloat16()
    grad, targets = class_gradients(90, 5000, 3.0, 50)
    exact = grad @ weight.double()
    scales = quantize.row_scales(weight)
    assert head.can_use_int8_classes(grad.bfloat16(), weight)
    actual, repeated = (head.class_gradient_(grad.bfloat16(), targets, weight, scales) for _ in range(2))
    assert ((actual - exact).norm(dim=1) / exact.norm(dim=1)).max() < 0.02
    assert torch.equal(repeated, actual)


@compiled_only
@pytest.mark.parametrize("outputs", [300, 3500])
def test_int8_gradient_with_outliers_preserves_small_values(threads, outputs):
    """A single int8 scale per row would round most of this gradient to zero."""
    weight, scale = quantize.quantize_rows(numbers(outputs, 64).float())
    grad = numbers(70, outputs, seed=1)
    grad[:, 10] *= 300
    actual, _ = products.linear_backward(grad.float(), LinearProduct(weight, scale=scale))
    expected, _ = products.linear_backward_reference(grad, LinearProduct(weight, scale=scale.double()))
    assert_close(actual, expected, torch.bfloat16)
    block_size = quantize.INT8_BLOCK
    exact = (grad * scale)[:, block_size:] @ weight.double()[block_size:]
    first_block = grad.float() * (torch.arange(outputs) < block_size)
    outlier_part, _ = products.linear_backward(first_block, LinearProduct(weight, scale=scale))
    assert (actual.double() - outlier_part.double() - exact).norm() < 0.02 * exact.norm()


@compiled_only
@examples(sizes, st.sampled_from([0, 4, 16]), st.booleans(), st.booleans())
def test_int8_gradients_of_bf16_weight_match_reference(size, rank, by_column, added):
    t = inputs(*size, rank, torch.bfloat16)
    weight = t["weight"] if by_column else t["weight"].t().contiguous()
    weight[size[2] % weight.shape[0]] = 0  # a zero row of the stored weight
    update = (t["lora_A"], t["lora_B"], 0.5) if rank else (None, None, 1.0)
    args = (t["grad"], LinearProduct(weight, by_column, None, None, None, *update), t["x"] if added else None)
    actual, grad_h = products.linear_backward(*args, in_int8=True)
    expected, _ = products.linear_backward_reference(*args, in_int8=True)
    assert_close(actual, expected, torch.bfloat16)
    exact, exact_grad_h = products.linear_backward(*args)
    assert torch.equal(grad_h, exact_grad_h)  # not quantized
    assert 0 < (actual - exact).double().norm() < 0.02 * exact.double().norm() or torch.equal(actual, exact)


@compiled_only
def test_int8_gradients_follow_process_setting(arithmetic):
    """Use a bf16 weight whose sizes are valid for both dtypes."""
    t = inputs(40, 64, 96, 4, torch.bfloat16)
    loader.use_arithmetic(replace(arithmetic, int8_gradients=False))
    product = LinearProduct(t["weight"])
    assert not products.uses_int8_gradients(t["grad"], adapted(t))
    with loader.temporary_arithmetic(replace(arithmetic, int8_gradients=True)):
        assert products.uses_int8_gradients(t["grad"], adapted(t))
        grad, _ = stored.multiply_backward(t["grad"], product)
        expected, _ = products.linear_backward(t["grad"], product, in_int8=True)
        assert torch.equal(grad, expected)
        assert not products.uses_int8_gradients(t["grad"], LinearProduct(t["weight"][:, :62].contiguous()))
        assert not products.uses_int8_gradients(t["grad"].float(), LinearProduct(t["weight"].float()))
        int8, _ = quantize.quantize_rows(t["weight"])
        assert not products.uses_int8_gradients(t["grad"], LinearProduct(int8))
    grad, _ = stored.multiply_backward(t["grad"], product)
    assert torch.equal(grad, products.linear_backward(t["grad"], product)[0])


@pytest.mark.parametrize("in_blocks", [False, True])
def test_int8_sums_of_any_depth_do_not_overflow(kernels, in_blocks):
    """The sum of the largest values exceeds 32 bits."""
    depth = quantize.MAX_SUM_LENGTH + 100
    x = torch.ones(3, depth)
    weight = torch.full((4, depth), 127, dtype=torch.int8)
    scale = torch.full((4,), 1 / 127)
    for sign in (1, -1):
        y, _ = products.linear(x * sign, LinearProduct(weight, scale=scale, in_blocks=in_blocks))
        torch.testing.assert_close(y, torch.full((3, 4), float(sign * depth)), rtol=1e-4, atol=0)
    assert Int8Linear.from_linear(torch.nn.Linear(depth, 4, bias=False)).in_blocks
    with pytest.raises(ValueError, match="too many"):
        DecoderLinear(weight, scale=scale)
