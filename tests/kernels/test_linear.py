"""Products with their low-rank update against references in float64: both ways, odd sizes, int8."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st

from deltaw.kernels import head_gradient as head
from deltaw.kernels import linear as products
from deltaw.kernels import loader, quantize
from deltaw.kernels.decode_reference import DecoderLinear
from deltaw.kernels.linear import Product
from deltaw.lora import stored
from deltaw.lora.layers_quantized import Int8Linear
from tests.kernels.conftest import close, compiled_only, examples

VARIANTS = "all"

DTYPES = [torch.float32, torch.bfloat16]
sizes = st.tuples(st.integers(1, 70), st.integers(1, 40).map(lambda n: 4 * n), st.integers(1, 40).map(lambda n: 4 * n))


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(rows: int, n_in: int, n_out: int, rank: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    shapes = {"x": (rows, n_in), "weight": (n_out, n_in), "bias": (n_out,), "added": (rows, n_out)}
    shapes |= {"grad": (rows, n_out), "lora_A": (n_in, rank), "lora_B": (rank, n_out)}
    made = {name: numbers(*shape, seed=seed).to(dtype) for seed, (name, shape) in enumerate(shapes.items())}
    return {name: tensor.float() if name.startswith("lora") else tensor for name, tensor in made.items()}


def adapted(t: dict[str, torch.Tensor], by_column: bool = True) -> Product:
    return Product(t["weight"], by_column, None, None, t["bias"], t["lora_A"], t["lora_B"], 0.5)


@compiled_only
@examples(sizes, st.sampled_from(DTYPES), st.sampled_from([2, 4, 16, 18]), st.booleans())
def test_forward_and_backward_equal_the_reference(size, dtype, rank, by_column):
    t = inputs(*size, rank, dtype)
    t["weight"] = t["weight"] if by_column else t["weight"].t().contiguous()
    exact = {k: v.double() for k, v in t.items()}
    of, wide = adapted(t, by_column), adapted(exact, by_column)
    assert products.can_multiply(t["x"], of)
    y, h = products.linear(t["x"], of, t["added"])
    dx, narrow = products.linear_backward(t["grad"], of, t["x"])
    expected = [
        *products.linear_reference(exact["x"], wide, exact["added"]),
        *products.linear_backward_reference(exact["grad"], wide, exact["x"]),
    ]
    for found, one in zip((y, h, dx, narrow), expected, strict=True):
        close(found, one, dtype)
    factors = products.factors_backward(t["x"], h, t["grad"], narrow, 0.5)
    expected = products.factors_backward_reference(exact["x"], h.double(), exact["grad"], narrow.double(), 0.5)
    for found, one in zip(factors, expected, strict=True):
        assert found.dtype == torch.float32  # the sums are given as they are
        close(found, one, torch.float32)


@compiled_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_deep_products_are_cut_and_summed_the_same_each_time(dtype, threads):
    """More groups than are packed at once, and too few columns to share out without cutting rows; and rows a
    power of two apart, whose parts are laid side by side where they would share their places in the cache."""
    t = inputs(130, 4800, 36, 2, dtype)
    found = [products.linear(t["x"], adapted(t))[0] for _ in range(2)]
    assert torch.equal(*found)
    exact = {name: tensor.double() for name, tensor in t.items()}
    close(found[0], products.linear_reference(exact["x"], adapted(exact))[0], dtype)
    grad, weight = numbers(40, 4096).to(dtype), numbers(4096, 64, seed=1).to(dtype)
    found, _ = products.linear_backward(grad, Product(weight))
    close(found, grad.double() @ weight.double(), dtype)


@pytest.mark.parametrize("size", [(5, 7, 9), (3, 6, 10), (0, 8, 12)])
def test_sizes_that_fill_no_group_go_to_the_reference_and_there_may_be_no_rows(size):
    t = inputs(*size, 3, torch.bfloat16)
    y, h = products.linear(t["x"], adapted(t))
    exact, _ = products.linear_reference(t["x"].double(), adapted({k: v.double() for k, v in t.items()}))
    assert h.shape == (size[0], 3)
    close(y, exact, torch.bfloat16)


@compiled_only
@examples(sizes, st.booleans(), st.booleans(), st.sampled_from(DTYPES))
def test_int8_products_are_exact_but_for_the_last_rounding(size, with_columns, in_blocks, dtype):
    rows, n_in, n_out = size
    t = inputs(rows, n_in, n_out, 4, dtype)
    int8, scale = quantize.quantized_rows(t["weight"])
    columns = torch.rand(n_in, generator=torch.Generator().manual_seed(0)) + 0.5 if with_columns else None
    steps, scales = quantize.quantized(t["x"], columns, in_blocks)
    steps_reference, scales_reference = quantize.quantized_reference(t["x"], columns, in_blocks)
    assert (steps.int() - steps_reference.int()).abs().max() <= 1  # a tie may go either way
    torch.testing.assert_close(scales, scales_reference)
    of = Product(int8, True, scale, columns, None, t["lora_A"], t["lora_B"], 2.0, in_blocks)
    y, h = products.linear(t["x"], of, None, steps, scales)
    rounded = (steps.double() - 128) * quantize.spread_scales(scales.double(), n_in)
    whole = rounded @ int8.double().t() * scale.double()
    close(h, t["x"].double() @ t["lora_A"].double(), dtype)
    # h is rounded to the inputs' type, which may be much of a sum that cancels.
    close(y, whole + h.double() @ (2.0 * t["lora_B"].double()), torch.bfloat16)
    if dtype == torch.bfloat16:  # rounded as it is read: the same int8
        by = quantize.scales_of_rows(t["weight"])
        on_the_way, _ = products.linear(t["x"], Product(t["weight"], scale=by, in_blocks=in_blocks))
        before, _ = products.linear(t["x"], Product(int8, scale=by, in_blocks=in_blocks))
        close(on_the_way, before, torch.bfloat16)
    dx, _ = products.linear_backward(t["grad"], Product(int8, True, scale, columns))
    exact = torch.zeros(rows, n_in, dtype=torch.float64)
    for at in range(0, n_out, quantize.INT8_BLOCK):
        part = slice(at, at + quantize.INT8_BLOCK)
        g, g_scales = quantize.quantized(t["grad"][:, part].contiguous(), scale[part].contiguous())
        exact += (g.double() - 128) @ int8[part].double() * g_scales.double()[:, None]
    close(dx, exact if columns is None else exact * columns.double(), dtype)


def test_int8_stays_in_range_at_the_largest_value_and_for_rows_of_zeros():
    """1 / scale rounds up for some rows: the largest value must still be 127 steps, not 128."""
    x = (numbers(500, 16).abs() + 1e-3).to(torch.bfloat16)
    x[3] = 0
    steps, scales = quantize.quantized(x, None)
    assert steps.min() >= 1 and steps.max() == 255 and scales[3] == 0 and (steps[3] == 128).all()
    restored = (steps.float() - 128) * scales[:, None]
    assert ((restored - x.float()).abs() <= 0.51 * scales[:, None]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_for_each_block_keeps_an_outlier_from_the_other_blocks(dtype, threads):
    t = inputs(70, 300, 40, 4, dtype)
    x, (int8, scale) = t["x"].clone(), quantize.quantized_rows(t["weight"])
    x[:, 5] *= 300
    errors = {}
    for in_blocks in (False, True):
        y, _ = products.linear(x, Product(int8, scale=scale, in_blocks=in_blocks))
        wide = Product(int8, scale=scale.double(), in_blocks=in_blocks)
        expected, _ = products.linear_reference(x.double(), wide)
        close(y, expected, torch.bfloat16)
        steps, scales = quantize.quantized(x, None, in_blocks)
        rounded = (steps.double() - 128) * quantize.spread_scales(scales.double(), 300)
        errors[in_blocks] = (rounded - x.double())[:, 128:].norm() / x.double()[:, 128:].norm()
    assert errors[False] > 0.2 and errors[True] < 0.02


def slopes_of_classes(rows: int, classes: int, spread: float, every: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of classes, less one for the target, and the targets."""
    targets, grad = torch.arange(rows) * every % classes, numbers(rows, classes, seed=1).mul(spread).softmax(-1)
    grad[torch.arange(rows), targets] -= 1.0
    return grad, targets


@compiled_only
@examples(st.integers(1, 80), st.integers(1, 1300), st.integers(1, 70), st.booleans())
def test_the_gradient_of_classes_in_int8_equals_its_reference(rows, classes, width, negative):
    grad, targets = slopes_of_classes(rows, classes, 4.0, 7)
    weight, grad = numbers(classes, width).bfloat16(), (-grad if negative else grad).bfloat16()
    grad[0] = 0
    scale = quantize.scales_of_rows(weight)
    expected = head.class_gradient_reference(grad.double(), targets, weight, scale.double())
    close(head.class_gradient_(grad.clone(), targets, weight, scale), expected, torch.bfloat16)


@compiled_only
def test_the_gradient_of_classes_in_int8_is_near_the_exact_one(threads):
    weight, (grad, targets) = numbers(5000, 64).bfloat16(), slopes_of_classes(90, 5000, 3.0, 50)
    exact, scales = grad @ weight.double(), quantize.scales_of_rows(weight)
    assert head.can_round_classes(grad.bfloat16(), weight)
    found, again = (head.class_gradient_(grad.bfloat16(), targets, weight, scales) for _ in range(2))
    assert ((found - exact).norm(dim=1) / exact.norm(dim=1)).max() < 0.02
    assert torch.equal(again, found)


@compiled_only
@pytest.mark.parametrize("outputs", [300, 3500])
def test_a_gradient_with_few_large_numbers_keeps_the_others(threads, outputs):
    """In int8: one scale for a whole row would round most of such a gradient to nothing."""
    weight, scale = quantize.quantized_rows(numbers(outputs, 64).float())
    grad = numbers(70, outputs, seed=1)
    grad[:, 10] *= 300
    found, _ = products.linear_backward(grad.float(), Product(weight, scale=scale))
    expected, _ = products.linear_backward_reference(grad, Product(weight, scale=scale.double()))
    close(found, expected, torch.bfloat16)
    first = quantize.INT8_BLOCK
    exact = (grad * scale)[:, first:] @ weight.double()[first:]
    large, _ = products.linear_backward(grad.float() * (torch.arange(outputs) < first), Product(weight, scale=scale))
    assert (found.double() - large.double() - exact).norm() < 0.02 * exact.norm()


@compiled_only
@examples(sizes, st.sampled_from([0, 4, 16]), st.booleans(), st.booleans())
def test_gradients_in_int8_with_a_bf16_weight_equal_their_reference(size, rank, by_column, added):
    t = inputs(*size, rank, torch.bfloat16)
    weight = t["weight"] if by_column else t["weight"].t().contiguous()
    weight[size[2] % weight.shape[0]] = 0  # a row of the stored weight has no largest number
    rest = (t["lora_A"], t["lora_B"], 0.5) if rank else (None, None, 1.0)
    asked = (t["grad"], Product(weight, by_column, None, None, None, *rest), t["x"] if added else None)
    found, narrow = products.linear_backward(*asked, in_int8=True)
    expected, _ = products.linear_backward_reference(*asked, in_int8=True)
    close(found, expected, torch.bfloat16)
    exact, exact_narrow = products.linear_backward(*asked)
    assert torch.equal(narrow, exact_narrow)  # which is not rounded
    assert 0 < (found - exact).double().norm() < 0.02 * exact.double().norm() or torch.equal(found, exact)


@compiled_only
def test_gradients_are_in_int8_where_the_process_computes_so(computing):
    """Of a layer with a bf16 weight whose sizes fill the groups of both types."""
    t = inputs(40, 64, 96, 4, torch.bfloat16)
    loader.compute_with(replace(computing, int8_gradients=False))
    of = Product(t["weight"])
    assert not products.rounds_gradients(t["grad"], adapted(t))
    with loader.computing(replace(computing, int8_gradients=True)):
        assert products.rounds_gradients(t["grad"], adapted(t))
        grad, _ = stored.multiply_backward(t["grad"], of)
        expected, _ = products.linear_backward(t["grad"], of, in_int8=True)
        assert torch.equal(grad, expected)
        assert not products.rounds_gradients(t["grad"], Product(t["weight"][:, :62].contiguous()))
        assert not products.rounds_gradients(t["grad"].float(), Product(t["weight"].float()))
        int8, _ = quantize.quantized_rows(t["weight"])
        assert not products.rounds_gradients(t["grad"], Product(int8))
    grad, _ = stored.multiply_backward(t["grad"], of)
    assert torch.equal(grad, products.linear_backward(t["grad"], of)[0])


@pytest.mark.parametrize("in_blocks", [False, True])
def test_int8_sums_over_any_depth_do_not_overflow(kernels, in_blocks):
    """The largest numbers there are, in a sum that is too long for 32 bits."""
    depth = quantize.LONGEST_SUM + 100
    x, weight = torch.ones(3, depth), torch.full((4, depth), 127, dtype=torch.int8)
    scale = torch.full((4,), 1 / 127)
    for sign in (1, -1):
        y, _ = products.linear(x * sign, Product(weight, scale=scale, in_blocks=in_blocks))
        torch.testing.assert_close(y, torch.full((3, 4), float(sign * depth)), rtol=1e-4, atol=0)
    assert Int8Linear.from_linear(torch.nn.Linear(depth, 4, bias=False)).in_blocks
    with pytest.raises(ValueError, match="too many"):
        DecoderLinear(weight, scale=scale)
