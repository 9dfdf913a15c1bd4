"""Planned scratch memory of the kernels' threads matches the measured peak of their arenas."""

from __future__ import annotations

import functools

import pytest
import torch

from deltaw.kernels import experts, head_gradient, loader
from deltaw.kernels.arithmetic import Arithmetic
from deltaw.kernels.block_linear import quantize_nf4
from deltaw.kernels.experts import ExpertActivation, ExpertProducts
from deltaw.kernels.layout import Layout
from deltaw.kernels.linear import LinearProduct
from deltaw.kernels.processor import second_level_cache
from deltaw.kernels.quantize import quantize_rows
from deltaw.memory import scratch
from deltaw.memory.scratch import arena_bytes, scratch_bytes
from deltaw.memory.simulation import fake_tensors
from tests.kernels.conftest import compiled_only, threads  # noqa: F401
from tests.peak_memory import peak_tensor_bytes

pytestmark = [compiled_only, pytest.mark.usefixtures("threads")]
ops = torch.ops.deltaw
PAGE = 4096


@pytest.fixture(params=[256 << 10, 1 << 20, 2 << 20], ids=lambda size: f"{size >> 10}K")
def cache(request: pytest.FixtureRequest):
    """Set the size of the second-level cache that kernels tile for. Plans must be correct for every CPU."""
    kernels = loader.kernels()
    kernels.dw_set_cache(request.param)
    yield
    kernels.dw_set_cache(second_level_cache() or 1 << 20)


def measured_arena_bytes(operator, args) -> int:
    """Return the peak arena bytes of the second run. The first run lets the arenas grow."""
    kernels = loader.kernels()
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # the largest number of threads in these tests: each thread releases its arena
    loader.release_scratch()
    torch.set_num_threads(before)
    operator(*args)
    kernels.dw_scratch_bytes(1)
    operator(*args)
    return kernels.dw_scratch_bytes(1)


def check_plan(operator, *args) -> None:
    """Check that planned bytes are within a tenth of the measured ones, plus the rounding of arenas."""
    planned = arena_bytes(operator.default, args)
    measured = measured_arena_bytes(operator, args)
    rounding = torch.get_num_threads() * (256 * 1024 + 8 * PAGE)
    assert 0.9 * measured - rounding <= planned <= 1.1 * measured + rounding, (planned, measured)


def random_factors(n_in: int, n_out: int) -> tuple[torch.Tensor, torch.Tensor]:
    return random(n_in, 16, dtype=torch.float32), random(16, n_out, dtype=torch.float32)


def product_calls(weights: LinearProduct, x: torch.Tensor, grad: torch.Tensor) -> tuple:
    """Return the forward and backward call of a product."""
    return (ops.linear, (x, *weights, None, None, None)), (ops.linear_backward, (grad, *weights, None, True, False))


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.each_value
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lengths", [[1500], [150] * 20])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(9, 3, 64), (8, 8, 96)])
def test_attention_scratch_matches_plan(dtype, lengths, heads, key_heads, size):
    layout = Layout.of_lengths(lengths)
    q = random(layout.length, heads, size, dtype=dtype)
    k, v = (random(layout.length, key_heads, size, dtype=dtype) for _ in range(2))
    options = (layout.segments(), 0, True, 0.1, 0.0, None)
    out, logs = ops.attention(q, k, v, *options)
    check_plan(ops.attention, q, k, v, *options)
    check_plan(ops.attention_backward, q, q, k, v, out, logs, *options)


@pytest.mark.each_pair
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "n_in", "n_out", "in_blocks"),
    [
        *((1024, 576, 1536, False), (200, 4864, 896, False), (512, 4096, 2048, False)),
        *((40, 1536, 576, True), (1200, 1536, 576, True)),
    ],
)
def test_product_scratch_matches_plan(cache, dtype, rows, n_in, n_out, in_blocks):
    x, weight, grad = (random(*shape, dtype=dtype) for shape in ((rows, n_in), (n_out, n_in), (rows, n_out)))
    A, B = random_factors(n_in, n_out)
    if in_blocks:
        calls = product_calls(LinearProduct.from_blocks(quantize_nf4(weight.float()), None, A, B), x, grad)
    else:
        calls = product_calls(LinearProduct(weight, lora_A=A, lora_B=B), x, grad)
        (_, h), (_, narrow) = (operator(*args) for operator, args in calls)
        calls += ((ops.factors_backward, (x, h, grad, narrow, 1.0)),)
    for operator, args in calls:
        check_plan(operator, *args)


@pytest.mark.each_pair
@pytest.mark.parametrize("by_column", [True, False])
@pytest.mark.parametrize(("rows", "n_in", "n_out"), [(1024, 576, 1536), (100, 40_000, 896)])
def test_int8_gradients_with_bf16_weight_match_plan(cache, rows, n_in, n_out, by_column):
    """Weights with many rows, whose scales dominate the additional memory."""
    weight = random(*((n_out, n_in) if by_column else (n_in, n_out)))
    grad = random(rows, n_out)
    for in_int8 in (True, False):
        args = (grad, *LinearProduct(weight, by_column), None, True, in_int8)
        check_plan(ops.linear_backward, *args)
        rounded = grad.numel() + 4 * rows * -(-n_out // 128)
        assert scratch_bytes(ops.linear_backward.default, args) == (rounded if in_int8 else 0)


@pytest.mark.each_value
def test_class_gradient_and_cross_entropy_match_plan(cache):
    rows = 300
    classes = 40000
    width = 576
    grad = random(rows, classes).softmax(-1)
    weight = random(classes, width)
    targets = torch.arange(rows)
    scale = torch.rand(classes) + 0.1
    check_plan(ops.class_gradient_, grad, targets, weight, scale)
    check_plan(ops.cross_entropy_, grad, targets, torch.ones(rows), 1.0, 0.0, True)


@pytest.mark.parametrize("rows", [1, 40, 300])
def test_head_gradient_matches_plan(rows):
    classes = 40000
    width = 576
    hidden = random(rows, width)
    weight = random(classes, width)
    logits = hidden @ weight.T
    slopes = torch.empty_like(hidden)
    shares = torch.empty(rows)
    unlikely = logits.new_empty(head_gradient.num_groups(rows), classes)
    targets = torch.arange(rows)
    check_plan(ops.head_gradient_, logits, targets, hidden, weight, None, 1.0, 0.0, slopes, shares, unlikely)


def test_plan_is_zero_without_kernels(monkeypatch):
    layout = Layout.of_lengths([500])
    q = random(500, 4, 64)
    args = (q, q, q, layout.segments(), 0, True, 0.1, 0.0, None)
    assert arena_bytes(ops.attention.default, args) > 0
    monkeypatch.setattr(loader, "library", lambda: None)
    assert arena_bytes(ops.attention.default, args) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("int8", "in_blocks"), [(False, False), (True, False), (True, True)])
def test_torch_products_match_plan(dtype, int8, in_blocks):
    x = random(400, 576, dtype=dtype)
    grad = random(400, 1536, dtype=dtype)
    weight = random(1536, 576, dtype=dtype)
    scale = None
    if int8:
        weight, scale = quantize_rows(weight)
    A, B = random_factors(576, 1536)
    alive = [t for t in (x, grad, weight, scale, A, B) if t is not None]
    with loader.temporary_arithmetic(Arithmetic(loader.variant())):
        product = LinearProduct(weight, True, scale, None, None, A, B, 1.0, in_blocks)
        for operator, args in product_calls(product, x, grad):
            results = bytes_of(*operator(*args))
            peak = peak_tensor_bytes(lambda operator=operator, args=args: operator(*args), alive=alive)
            planned = scratch_bytes(operator.default, args)
            measured = peak - bytes_of(*alive) - results
            assert arena_bytes(operator.default, args) == 0
            # Plans exclude the buffers of oneDNN's 16-bit products: with AMX, a copy of all or part of the weight.
            blocks = weight.numel() * 2 if dtype.itemsize == 2 and not int8 else 0
            slack = max((0.2 if int8 else 0.05) * measured, 2**18)
            assert measured - blocks - slack <= planned <= measured + slack


@pytest.mark.each_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_cross_entropy_reference_matches_plan(dtype, softcap, with_gradient, monkeypatch):
    monkeypatch.setattr(loader, "library", lambda: None)
    logits = random(200, 5000, dtype=dtype)
    targets = torch.arange(200)
    weights = torch.ones(200, dtype=torch.promote_types(dtype, torch.float32))
    args = (logits, targets, weights, 1.0, softcap, with_gradient)
    measured = peak_tensor_bytes(lambda: ops.cross_entropy_(*args), alive=args[:3]) - bytes_of(*args[:3])
    assert scratch_bytes(ops.cross_entropy_.default, args) == pytest.approx(measured, rel=0.01)


@pytest.mark.each_value
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize(("tokens", "count"), [(600, 16), (900, 4)])
def test_experts_scratch_matches_plan(dtype, rank, tokens, count, monkeypatch):
    def products(inputs, outputs):
        weight = random(count, outputs, inputs, dtype=dtype)
        if not rank:
            return ExpertProducts(weight)
        factors = random(count, inputs, rank, dtype=torch.float32), random(count, rank, outputs, dtype=torch.float32)
        return ExpertProducts(weight, True, None, *factors)

    x = random(tokens, 256, dtype=dtype)
    index = torch.stack([torch.randperm(count)[:3] for _ in range(tokens)])
    largest = min(int(index.flatten().bincount().max()), experts.MAX_ROWS)
    monkeypatch.setattr(scratch, "_rows_per_expert", lambda *_: largest)
    weights = random(tokens, 3, dtype=dtype)
    layers = (*products(256, 384), *products(192, 256), *ExpertActivation())
    _, *saved = ops.experts(x, index, weights, *layers)
    backward = (x, x, index, weights, *saved, True, *layers)
    for operator, args in ((ops.experts, (x, index, weights, *layers)), (ops.experts_backward, backward)):
        check_plan(operator, *args)
        with fake_tensors():
            results = operator(*args)
        planned = bytes_of(*results) + scratch_bytes(operator.default, args)
        measured = peak_tensor_bytes(functools.partial(operator, *args))
        assert measured == pytest.approx(planned, rel=0.05), (operator, planned, measured)
