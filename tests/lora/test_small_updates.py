"""An update that is small beside the layer's own output counts in full in bf16, with and without kernels.

A training begins with such updates: B is zero at first. Added to an output that was rounded to bf16 before,
an update of a thousandth of it would lose half of its size, since most of its numbers are less than half of
the last digit of what they are added to.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaw.kernels import linear as products
from deltaw.kernels import loader
from deltaw.kernels.arithmetic import Arithmetic
from deltaw.kernels.block_linear import quantize_nf4
from deltaw.kernels.quantize import quantized_rows
from deltaw.lora import LoRAConv1D, LoRALinear
from deltaw.lora.adapted import Activation
from deltaw.lora.math_dora import dora_linear
from deltaw.lora.stored import Scales, multiply_backward, product

ROWS, IN, OUT, RANK = 400, 128, 192, 8
BF16 = torch.bfloat16


def random(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * size


def share(found: Tensor, base: Tensor, update: Tensor) -> float:
    """How much of ``update`` is in ``found`` - ``base``: 1 where all of it is, up to chance."""
    update = update.double()
    return float(((found.double() - base.double()) * update).sum() / update.square().sum())


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def computing(request):
    """With the process's own way of computing products, and with torch's products."""
    if request.param == "compiled":
        if loader.library() is None:
            pytest.skip(loader.why_not() or "")
        yield
        return
    with loader.computing(Arithmetic()):
        yield


@pytest.fixture
def operands() -> dict[str, Tensor]:
    return {
        "x": random(ROWS, IN, seed=0).to(BF16),
        "weight": random(OUT, IN, seed=1, size=IN**-0.5).to(BF16),
        "grad": random(ROWS, OUT, seed=2).to(BF16),
        "lora_A": random(IN, RANK, seed=3, size=IN**-0.5),
        "lora_B": random(RANK, OUT, seed=4, size=1e-3 * RANK**-0.5),
    }


def wide(of: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in of.items()}


@pytest.mark.parametrize("way", ["plain", "dropout", "activated"])
@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_of_a_layer(operands, kind, way):
    dropout = 1e-9 if way == "dropout" else 0.0
    if kind == "linear":
        base = nn.Linear(IN, OUT, bias=False, dtype=BF16)
        layer = LoRALinear.from_linear(base, RANK, float(RANK), dropout=dropout)
        layer.weight.data.copy_(operands["weight"])
    else:
        base = Conv1D(OUT, IN).to(BF16)
        nn.init.zeros_(base.bias)
        layer = LoRAConv1D.from_conv1d(base, RANK, float(RANK), dropout=dropout)
        layer.weight.data.copy_(operands["weight"].t())
    layer.lora_A.data.copy_(operands["lora_A"])
    layer.lora_B.data.copy_(operands["lora_B"])
    if way == "activated":  # at all places but the first
        layer.activation = Activation([1])
        layer.activation.places = (torch.arange(ROWS) > 0)[None]
    x = operands["x"].requires_grad_(True)
    y = layer(x[None])[0]
    (dx,) = torch.autograd.grad(y, x, operands["grad"])
    of = wide(operands)
    assert abs(share(y, of["x"] @ of["weight"].t(), of["x"] @ of["lora_A"] @ of["lora_B"]) - 1) < 0.1
    if way == "activated":
        return  # autograd rounds the two parts of the gradient before it adds them
    back = of["grad"] @ of["lora_B"].t() @ of["lora_A"].t()
    assert abs(share(dx, of["grad"] @ of["weight"], back) - 1) < 0.1


def test_of_dora(operands):
    of = wide(operands)
    x, ones = operands["x"].requires_grad_(True), torch.ones(OUT)
    y = dora_linear(x, operands["weight"], None, operands["lora_A"], operands["lora_B"], ones, ones, 1.0)
    (dx,) = torch.autograd.grad(y, x, operands["grad"])
    assert abs(share(y, of["x"] @ of["weight"].t(), of["x"] @ of["lora_A"] @ of["lora_B"]) - 1) < 0.1
    back = of["grad"] @ of["lora_B"].t() @ of["lora_A"].t()
    assert abs(share(dx, of["grad"] @ of["weight"], back) - 1) < 0.1


def test_of_int8_weights(operands):
    int8, scale = quantized_rows(operands["weight"])
    stored, of = Scales(scale, None), wide(operands)
    adapted = product(int8, stored, True, None, operands["lora_A"], operands["lora_B"])
    exact = products.Product(int8, scale=scale.double())
    y, _ = products.linear(operands["x"], adapted)
    base, _ = products.linear_reference(of["x"], exact)
    assert abs(share(y, base, of["x"] @ of["lora_A"] @ of["lora_B"]) - 1) < 0.1
    dx, _ = multiply_backward(operands["grad"], adapted)
    base, _ = products.linear_backward_reference(of["grad"], exact)
    assert abs(share(dx, base, of["grad"] @ of["lora_B"].t() @ of["lora_A"].t()) - 1) < 0.1


def test_of_weights_in_blocks(operands):
    weight, of = quantize_nf4(operands["weight"]), wide(operands)
    values = weight.dequantized(BF16, 0, OUT).double()
    adapted = products.Product.of_blocks(weight, None, operands["lora_A"], operands["lora_B"])
    y, _ = products.linear(operands["x"], adapted)
    assert abs(share(y, of["x"] @ values.t(), of["x"] @ of["lora_A"] @ of["lora_B"]) - 1) < 0.1
    dx, _ = products.linear_backward(operands["grad"], adapted)
    assert abs(share(dx, of["grad"] @ values, of["grad"] @ of["lora_B"].t() @ of["lora_A"].t()) - 1) < 0.1
