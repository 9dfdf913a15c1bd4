"""Products with weights in blocks, against sums in fp64 of the values that the blocks stand for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from deltaw.kernels import loader
from deltaw.kernels.block import Block, serves
from deltaw.kernels.block_linear import FORMATS, BlockWeight, quantize_nf4, reference_dequantize
from deltaw.kernels.layout import Layout
from deltaw.kernels.linear import Product, linear, linear_backward
from deltaw.kernels.rows import HalfNorms, Norm
from tests.kernels.conftest import TOLERANCE, compiled_only
from tests.kernels.test_block_formats import random_blocks

VARIANTS = "all"

DTYPES = [torch.float32, torch.bfloat16]


def columns_of(name: str, blocks: int) -> int:
    """Some whole blocks' numbers: 320 and more for the small ones."""
    return FORMATS[name].block * blocks * (5 if FORMATS[name].block < 256 else 1)


def near(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return float((found.double() - expected).norm()) <= tolerance * float(expected.norm())


def values(weight: BlockWeight) -> Tensor:
    """What W is, in fp64."""
    return reference_dequantize(weight, torch.float32).bfloat16().double()


@compiled_only
@pytest.mark.parametrize("name", list(FORMATS))
def test_compiled_values_are_the_formats(name: str) -> None:
    weight = random_blocks(name, 7, columns_of(name, 2))
    whole = reference_dequantize(weight, torch.float32)
    assert torch.equal(weight.dequantized(torch.float32), whole)
    assert torch.equal(weight.dequantized(torch.bfloat16, 2, 5), whole[2:5].bfloat16())
    places = torch.tensor([[6, 0], [3, 3]])
    assert torch.equal(weight.rows_at(places, torch.float32), whole[places])
    with pytest.raises(IndexError):
        weight.rows_at(torch.tensor([7]), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(FORMATS))
def test_products_are_those_of_the_values(kernels: str, name: str, dtype: torch.dtype) -> None:
    # Rows that fill no panel, more groups than go by at a time, and an update.
    for rows, out, blocks in ((3, 38, 1), (29, 70, 6)):
        weight = random_blocks(name, out, columns_of(name, blocks))
        made = torch.Generator().manual_seed(rows)
        x, grad, bias, added = (
            torch.randn(*shape, generator=made).to(dtype)
            for shape in ((rows, weight.columns), (rows, out), (out,), (rows, out))
        )
        A = torch.randn(weight.columns, 4, generator=made).to(dtype).float() / weight.columns**0.5
        B = (torch.randn(4, out, generator=made) * 0.1).to(dtype).float()
        wide = values(weight)
        y, h = linear(x, Product.of_blocks(weight, bias, A, B, 0.5), added)
        expected = x.double() @ wide.t() + bias + 0.5 * h.double() @ B.double() + added
        assert near(h, x.double() @ A.double(), TOLERANCE[dtype])
        assert near(y, expected, TOLERANCE[dtype])
        of = Product.of_blocks(weight, None, A, B, 0.5)
        dx, narrow = linear_backward(grad, of, x)
        assert near(narrow, 0.5 * grad.double() @ B.double().t(), TOLERANCE[dtype])
        assert near(dx, grad.double() @ wide + narrow.double() @ A.double().t() + x, TOLERANCE[dtype])
        alone, _ = linear(x, Product.of_blocks(weight))
        assert near(alone, x.double() @ wide.t(), TOLERANCE[dtype])
        nothing, again = linear_backward(grad, of, need_x=False)
        assert nothing.numel() == 0 and torch.equal(again, narrow)


@compiled_only
def test_threads_and_many_rows_give_the_same() -> None:
    """Rows shared out among threads, or columns, or neither."""
    weight, threads = random_blocks("Q5_K", 64, 768), torch.get_num_threads()
    x = torch.randn(900, 768, generator=torch.Generator().manual_seed(4)).bfloat16()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            y, _ = linear(x, Product.of_blocks(weight))
            dx, _ = linear_backward(y, Product.of_blocks(weight))
            few, _ = linear(x[:50], Product.of_blocks(weight))
            assert torch.equal(few, y[:50])
            found.append((y, dx))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@compiled_only
def test_products_round_as_those_of_plain_bf16() -> None:
    """The same panels give the same bits."""
    weight = quantize_nf4(torch.randn(48, 192, generator=torch.Generator().manual_seed(5)))
    if not loader.multiplies(loader.number(torch.bfloat16)):
        pytest.skip("torch multiplies bf16 here")
    x, plain = torch.randn(20, 192).bfloat16(), values(weight).bfloat16()
    assert torch.equal(linear(x, Product.of_blocks(weight))[0], linear(x, Product(plain))[0])
    grad = torch.randn(20, 48).bfloat16()
    assert torch.equal(linear_backward(grad, Product.of_blocks(weight))[0], linear_backward(grad, Product(plain))[0])


def test_operators_are_seen_by_what_observes_torch() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    weight = random_blocks("NF4", 24, 128)
    with FlopCounterMode(display=False) as counter:
        linear(torch.ones(3, 128), Product.of_blocks(weight))
    assert counter.get_total_flops() == 2 * 3 * 24 * 128
    with FakeTensorMode(allow_non_fake_inputs=True):
        of = Product.of_blocks(weight, None, torch.ones(128, 2), torch.ones(2, 24))
        y, h = linear(torch.ones(3, 128), of)
        dx, narrow = linear_backward(y, of)
    assert [tuple(t.shape) for t in (y, h, dx, narrow)] == [(3, 24), (3, 2), (3, 128), (3, 2)]


def test_shapes_that_do_not_fit_are_refused() -> None:
    weight = random_blocks("Q4_0", 6, 64)
    with pytest.raises(ValueError, match="left side"):
        linear(torch.ones(2, 32), Product.of_blocks(weight))
    with pytest.raises(ValueError, match="two factors"):
        linear(torch.ones(2, 64), Product.of_blocks(weight, None, torch.ones(64, 2)))
    with pytest.raises(ValueError, match="factor"):
        linear_backward(torch.ones(2, 6), Product.of_blocks(weight, None, torch.ones(64, 2), torch.ones(3, 6)))


@compiled_only
@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "NF4"])
def test_a_whole_block_gives_the_bits_of_its_values(name: str) -> None:
    """One call of a block with layers in blocks, and with the same numbers in plain bf16."""
    if not loader.multiplies(loader.number(torch.bfloat16)):
        pytest.skip("torch multiplies bf16 here")
    made = torch.Generator().manual_seed(6)
    sizes = {"query": (64, 64), "key": (64, 32), "value": (64, 32), "output": (64, 64)}
    sizes |= {"gate": (64, 128), "up": (64, 128), "down": (128, 64)}
    weights = {part: random_blocks(name, out, inputs, len(part)) for part, (inputs, out) in sizes.items()}
    factors = {
        part: (torch.randn(inputs, 4, generator=made) / 8, torch.randn(4, out, generator=made))
        for part, (inputs, out) in sizes.items()
    }
    norms = HalfNorms(Norm(torch.ones(64).bfloat16()))

    def halves(stored: bool) -> tuple[SimpleNamespace, SimpleNamespace]:
        layers = {
            part: SimpleNamespace(
                product=Product.of_blocks(weight, None, *factors[part], 0.5)
                if stored
                else Product(values(weight).bfloat16(), True, None, None, None, *factors[part], 0.5)
            )
            for part, weight in weights.items()
        }
        attention = SimpleNamespace(
            norms=norms,
            inputs=[layers["query"], layers["key"], layers["value"]],
            output=layers["output"],
            heads=4,
            key_heads=2,
            head_size=16,
            grouped=False,
            query_norm=None,
            key_norm=None,
            how={"scaling": 0.25},
        )
        mlp = SimpleNamespace(
            norms=norms, inputs=[layers["gate"], layers["up"]], output=layers["down"], gated=True, kind="silu"
        )
        return attention, mlp

    x, segments = torch.randn(20, 64, generator=made).bfloat16(), Layout.of_lengths([12, 8]).segments()
    found = []
    for stored in (True, False):
        attention, mlp = halves(stored)
        assert serves(x, attention, mlp, False)
        block = Block(attention, mlp, dtype=torch.bfloat16, parallel=False, turned=0)
        y, saved = block.forward(x, segments, None, None)
        dx, of_factors = block.backward(y, x, saved, segments, None, None, None, True, True)
        assert dx is not None
        found.append([y, dx, *of_factors])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
