"""The bytes that the kernels' threads hold at their peak, as planned and as their arenas counted them."""

from __future__ import annotations

import pytest
import torch

from deltaw.kernels import head_gradient, loader
from deltaw.kernels.arithmetic import Arithmetic
from deltaw.kernels.block_linear import quantize_nf4
from deltaw.kernels.layout import Layout
from deltaw.kernels.linear import Product
from deltaw.kernels.processor import second_level_cache
from deltaw.kernels.quantize import quantized_rows
from deltaw.memory.measure import peak_tensor_bytes
from deltaw.memory.scratch import arena_bytes, scratch_bytes
from tests.kernels.conftest import compiled_only, threads  # noqa: F401

pytestmark = [compiled_only, pytest.mark.usefixtures("threads")]
ops = torch.ops.deltaw
PAGE = 4096


@pytest.fixture(params=[256 << 10, 1 << 20, 2 << 20], ids=lambda size: f"{size >> 10}K")
def cache(request: pytest.FixtureRequest):
    """The kernels cut products to fit a second-level cache of this size: the plan must hold for every
    processor's."""
    kernels = loader.kernels()
    kernels.dw_set_cache(request.param)
    yield
    kernels.dw_set_cache(second_level_cache() or 1 << 20)


def held(operator, args) -> int:
    """Bytes of the arenas while it runs again: the first run shows them how much is needed."""
    kernels, before = loader.kernels(), torch.get_num_threads()
    torch.set_num_threads(2)  # the largest team of these tests: each thread gives back its own
    loader.release_scratch()
    torch.set_num_threads(before)
    operator(*args)
    kernels.dw_scratch_held(1)
    operator(*args)
    return kernels.dw_scratch_held(1)


def agree(operator, *args) -> None:
    """What is planned and what is held, within a tenth or what pieces of an arena are rounded up to."""
    planned, found = arena_bytes(operator.default, args), held(operator, args)
    rounding = torch.get_num_threads() * (256 * 1024 + 8 * PAGE)
    assert 0.9 * found - rounding <= planned <= 1.1 * found + rounding, (planned, found)


def random_factors(n_in: int, n_out: int) -> tuple[torch.Tensor, torch.Tensor]:
    return random(n_in, 16, dtype=torch.float32), random(16, n_out, dtype=torch.float32)


def product_calls(of: Product, x: torch.Tensor, grad: torch.Tensor) -> tuple:
    """A product's forward and backward."""
    return (ops.linear, (x, *of, None, None, None)), (ops.linear_backward, (grad, *of, None, True, False))


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.each_value
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lengths", [[1500], [150] * 20])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(9, 3, 64), (8, 8, 96)])
def test_attention(dtype, lengths, heads, key_heads, size):
    layout = Layout.of_lengths(lengths)
    q = random(layout.length, heads, size, dtype=dtype)
    k, v = (random(layout.length, key_heads, size, dtype=dtype) for _ in range(2))
    rest = (layout.segments(), 0, True, 0.1, 0.0, None)
    out, logs = ops.attention(q, k, v, *rest)
    agree(ops.attention, q, k, v, *rest)
    agree(ops.attention_backward, q, q, k, v, out, logs, *rest)


@pytest.mark.each_pair
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "n_in", "n_out", "in_blocks"),
    [
        *((1024, 576, 1536, False), (200, 4864, 896, False), (512, 4096, 2048, False)),
        *((40, 1536, 576, True), (1200, 1536, 576, True)),
    ],
)
def test_products(cache, dtype, rows, n_in, n_out, in_blocks):
    x, weight, grad = (random(*shape, dtype=dtype) for shape in ((rows, n_in), (n_out, n_in), (rows, n_out)))
    A, B = random_factors(n_in, n_out)
    if in_blocks:
        calls = product_calls(Product.of_blocks(quantize_nf4(weight.float()), None, A, B), x, grad)
    else:
        calls = product_calls(Product(weight, lora_A=A, lora_B=B), x, grad)
        (_, h), (_, narrow) = (operator(*args) for operator, args in calls)
        calls += ((ops.factors_backward, (x, h, grad, narrow, 1.0)),)
    for operator, args in calls:
        agree(operator, *args)


@pytest.mark.each_pair
@pytest.mark.parametrize("by_column", [True, False])
@pytest.mark.parametrize(("rows", "n_in", "n_out"), [(1024, 576, 1536), (100, 40_000, 896)])
def test_gradients_in_int8_with_a_bf16_weight(cache, rows, n_in, n_out, by_column):
    """Weights of many rows, whose scales are most of what is held beside a product's own."""
    weight, grad = random(*((n_out, n_in) if by_column else (n_in, n_out))), random(rows, n_out)
    for in_int8 in (True, False):
        args = (grad, *Product(weight, by_column), None, True, in_int8)
        agree(ops.linear_backward, *args)
        rounded = grad.numel() + 4 * rows * -(-n_out // 128)
        assert scratch_bytes(ops.linear_backward.default, args) == (rounded if in_int8 else 0)


@pytest.mark.each_value
def test_the_gradient_of_classes_and_cross_entropy(cache):
    rows, classes, width = 300, 40000, 576
    grad, weight = random(rows, classes).softmax(-1), random(classes, width)
    targets, scale = torch.arange(rows), torch.rand(classes) + 0.1
    agree(ops.class_gradient_, grad, targets, weight, scale)
    agree(ops.cross_entropy_, grad, targets, torch.ones(rows), 1.0, 0.0, True)


@pytest.mark.parametrize("rows", [1, 40, 300])
def test_the_gradient_of_a_head(rows):
    classes, width = 40000, 576
    hidden, weight = random(rows, width), random(classes, width)
    logits = hidden @ weight.T
    slopes, shares = torch.empty_like(hidden), torch.empty(rows)
    unlikely = logits.new_empty(head_gradient.groups(rows), classes)
    targets = torch.arange(rows)
    agree(ops.head_gradient_, logits, targets, hidden, weight, None, 1.0, 0.0, slopes, shares, unlikely)


def test_nothing_is_added_without_the_kernels(monkeypatch):
    layout = Layout.of_lengths([500])
    q = random(500, 4, 64)
    args = (q, q, q, layout.segments(), 0, True, 0.1, 0.0, None)
    assert arena_bytes(ops.attention.default, args) > 0
    monkeypatch.setattr(loader, "library", lambda: None)
    assert arena_bytes(ops.attention.default, args) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("int8", "in_blocks"), [(False, False), (True, False), (True, True)])
def test_products_that_torch_computes_take_what_is_planned(dtype, int8, in_blocks):
    x, grad = random(400, 576, dtype=dtype), random(400, 1536, dtype=dtype)
    weight, scale = random(1536, 576, dtype=dtype), None
    if int8:
        weight, scale = quantized_rows(weight)
    A, B = random_factors(576, 1536)
    alive = [t for t in (x, grad, weight, scale, A, B) if t is not None]
    with loader.computing(Arithmetic(loader.variant())):
        for operator, args in product_calls(Product(weight, True, scale, None, None, A, B, 1.0, in_blocks), x, grad):
            results = bytes_of(*operator(*args))
            peak = peak_tensor_bytes(lambda operator=operator, args=args: operator(*args), alive=alive)
            planned, found = scratch_bytes(operator.default, args), peak - bytes_of(*alive) - results
            assert arena_bytes(operator.default, args) == 0
            # Nothing is planned of what oneDNN's products in 16 bits hold: where tiles multiply, a copy of
            # the weight or of a part of it.
            blocks = weight.numel() * 2 if dtype.itemsize == 2 and not int8 else 0
            slack = max((0.2 if int8 else 0.05) * found, 2**18)
            assert found - blocks - slack <= planned <= found + slack


@pytest.mark.each_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_the_reference_of_cross_entropy_takes_what_is_planned(dtype, softcap, with_gradient, monkeypatch):
    monkeypatch.setattr(loader, "library", lambda: None)
    logits = random(200, 5000, dtype=dtype)
    targets, weights = torch.arange(200), torch.ones(200, dtype=torch.promote_types(dtype, torch.float32))
    args = (logits, targets, weights, 1.0, softcap, with_gradient)
    found = peak_tensor_bytes(lambda: ops.cross_entropy_(*args), alive=args[:3]) - bytes_of(*args[:3])
    assert scratch_bytes(ops.cross_entropy_.default, args) == pytest.approx(found, rel=0.01)
