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
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


@torch.no_grad()
def check(of: dict[str, Tensor], found: Tensor, base: Tensor, *, back: bool = False) -> None:
    """All of the update is in ``found`` - ``base``, up to chance; of the output, or (``back``) of the gradient."""
    of = {name: tensor.double() for name, tensor in of.items()}
    ahead = of["x"] @ of["lora_A"] @ of["lora_B"]
    update = of["grad"] @ of["lora_B"].t() @ of["lora_A"].t() if back else ahead
    share = float(((found.double() - base.double()) * update).sum() / update.square().sum())
    assert abs(share - 1) < 0.1


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


@pytest.mark.parametrize("way", ["plain", "dropout", "activated"])
@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_of_a_layer(operands, kind, way):
    how = {"rank": RANK, "alpha": float(RANK), "dropout": 1e-9 if way == "dropout" else 0.0}
    if kind == "linear":
        layer = LoRALinear.from_linear(nn.Linear(IN, OUT, bias=False, dtype=BF16), **how)
        layer.weight.data.copy_(operands["weight"])
    else:  # whose bias begins at zero
        layer = LoRAConv1D.from_conv1d(Conv1D(OUT, IN).to(BF16), **how)
        layer.weight.data.copy_(operands["weight"].t())
    layer.lora_A.data.copy_(operands["lora_A"])
    layer.lora_B.data.copy_(operands["lora_B"])
    if way == "activated":  # at all places but the first
        layer.activation = Activation([1])
        layer.activation.places = (torch.arange(ROWS) > 0)[None]
    x = operands["x"].requires_grad_(True)
    y = layer(x[None])[0]
    (dx,) = torch.autograd.grad(y, x, operands["grad"])
    check(operands, y, operands["x"].double() @ operands["weight"].double().t())
    if way != "activated":  # where autograd rounds the two parts of the gradient before it adds them
        check(operands, dx, operands["grad"].double() @ operands["weight"].double(), back=True)


def test_of_dora(operands):
    x, ones = operands["x"].requires_grad_(True), torch.ones(OUT)
    y = dora_linear(x, operands["weight"], None, operands["lora_A"], operands["lora_B"], ones, ones, 1.0)
    (dx,) = torch.autograd.grad(y, x, operands["grad"])
    check(operands, y, x.double() @ operands["weight"].double().t())
    check(operands, dx, operands["grad"].double() @ operands["weight"].double(), back=True)


def test_of_int8_weights(operands):
    int8, scale = quantized_rows(operands["weight"])
    adapted = product(int8, Scales(scale, None), True, None, operands["lora_A"], operands["lora_B"])
    exact = products.Product(int8, scale=scale.double())
    y, _ = products.linear(operands["x"], adapted)
    check(operands, y, products.linear_reference(operands["x"].double(), exact)[0])
    dx, _ = multiply_backward(operands["grad"], adapted)
    check(operands, dx, products.linear_backward_reference(operands["grad"].double(), exact)[0], back=True)


def test_of_weights_in_blocks(operands):
    weight = quantize_nf4(operands["weight"])
    values = weight.dequantized(BF16, 0, OUT).double()
    adapted = products.Product.of_blocks(weight, None, operands["lora_A"], operands["lora_B"])
    y, _ = products.linear(operands["x"], adapted)
    check(operands, y, operands["x"].double() @ values.t())
    dx, _ = products.linear_backward(operands["grad"], adapted)
    check(operands, dx, operands["grad"].double() @ values, back=True)
