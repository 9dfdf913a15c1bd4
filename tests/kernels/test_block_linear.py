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
from tests.kernels.conftest import close, compiled_only, same_bits
from tests.kernels.test_block_formats import random_blocks
from tests.kernels.test_linear import DTYPES, inputs, numbers

VARIANTS = "all"


def columns_of(name: str, blocks: int) -> int:
    """Some whole blocks' numbers: 320 and more for the small ones."""
    return FORMATS[name].block * blocks * (5 if FORMATS[name].block < 256 else 1)


def values(weight: BlockWeight) -> Tensor:
    """What W is, in fp64."""
    return reference_dequantize(weight, torch.float32).bfloat16().double()


def as_plain(weight: BlockWeight, *factors: Tensor | float) -> Product:
    """A product with the same numbers in plain bf16."""
    return Product(values(weight).bfloat16(), True, None, None, None, *factors)


@pytest.mark.parametrize("name", list(FORMATS))
def test_values_are_the_formats(kernels: str, name: str) -> None:
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
        t, wide = inputs(rows, weight.columns, out, 4, dtype), values(weight)
        x, grad, bias, added, A, B = (t[name] for name in ("x", "grad", "bias", "added", "lora_A", "lora_B"))
        A, B = A / weight.columns**0.5, B * 0.1
        y, h = linear(x, Product.of_blocks(weight, bias, A, B, 0.5), added)
        of = Product.of_blocks(weight, None, A, B, 0.5)
        dx, narrow = linear_backward(grad, of, x)
        alone, _ = linear(x, Product.of_blocks(weight))
        close(h, x.double() @ A.double(), dtype)
        close(y, x.double() @ wide.t() + bias + 0.5 * h.double() @ B.double() + added, dtype)
        close(narrow, 0.5 * grad.double() @ B.double().t(), dtype)
        close(dx, grad.double() @ wide + narrow.double() @ A.double().t() + x, dtype)
        close(alone, x.double() @ wide.t(), dtype)
        nothing, again = linear_backward(grad, of, need_x=False)
        assert nothing.numel() == 0 and torch.equal(again, narrow)


@compiled_only
def test_threads_and_many_rows_give_the_same() -> None:
    """Rows shared out among threads, or columns, or neither."""
    of, x, found = Product.of_blocks(random_blocks("Q5_K", 64, 768)), numbers(900, 768).bfloat16(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        y, _ = linear(x, of)
        dx, _ = linear_backward(y, of)
        assert torch.equal(linear(x[:50], of)[0], y[:50])
        found.append((y, dx))
    assert same_bits(*found)


@compiled_only
def test_products_round_as_those_of_plain_bf16() -> None:
    """The same panels give the same bits."""
    weight = quantize_nf4(numbers(48, 192).float())
    if not loader.multiplies(loader.number(torch.bfloat16)):
        pytest.skip("torch multiplies bf16 here")
    x, grad = numbers(20, 192).bfloat16(), numbers(20, 48).bfloat16()
    both = (Product.of_blocks(weight), as_plain(weight))
    assert same_bits(*((linear(x, of)[0], linear_backward(grad, of)[0]) for of in both))


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
    weight, A = random_blocks("Q4_0", 6, 64), torch.ones(64, 2)
    with pytest.raises(ValueError, match="left side"):
        linear(torch.ones(2, 32), Product.of_blocks(weight))
    with pytest.raises(ValueError, match="two factors"):
        linear(torch.ones(2, 64), Product.of_blocks(weight, None, A))
    with pytest.raises(ValueError, match="factor"):
        linear_backward(torch.ones(2, 6), Product.of_blocks(weight, None, A, torch.ones(3, 6)))


SIZES = {"query": (64, 64), "key": (64, 32), "value": (64, 32), "output": (64, 64)}
SIZES |= {"gate": (64, 128), "up": (64, 128), "down": (128, 64)}


@compiled_only
@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "NF4"])
def test_a_whole_block_gives_the_bits_of_its_values(name: str) -> None:
    """One call of a block with layers in blocks, and with the same numbers in plain bf16."""
    if not loader.multiplies(loader.number(torch.bfloat16)):
        pytest.skip("torch multiplies bf16 here")
    x, segments, found = numbers(20, 64).bfloat16(), Layout.of_lengths([12, 8]).segments(), []
    for stored in (True, False):
        layers = {}
        for part, (inner, out) in SIZES.items():
            weight = random_blocks(name, out, inner, len(part))
            factors = numbers(inner, 4).float() / 8, numbers(4, out).float(), 0.5
            of = Product.of_blocks(weight, None, *factors) if stored else as_plain(weight, *factors)
            layers[part] = SimpleNamespace(product=of)
        query, key, value, output, gate, up, down = layers.values()
        own = {"heads": 4, "key_heads": 2, "head_size": 16, "grouped": False, "query_norm": None, "key_norm": None}
        norms = HalfNorms(Norm(torch.ones(64).bfloat16()))
        own |= {"norms": norms, "inputs": [query, key, value], "output": output, "how": {"scaling": 0.25}}
        attention = SimpleNamespace(**own)
        mlp = SimpleNamespace(norms=norms, inputs=[gate, up], output=down, gated=True, kind="silu")
        assert serves(x, attention, mlp, False)
        block = Block(attention, mlp, dtype=torch.bfloat16, parallel=False, turned=0)
        y, saved = block.forward(x, segments, None, None)
        dx, of_factors = block.backward(y, x, saved, segments, None, None, None, True, True)
        assert dx is not None
        found.append([y, dx, *of_factors])
    assert same_bits(*found)
