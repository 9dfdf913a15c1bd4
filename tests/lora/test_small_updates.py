"""Small updates keep their full size in bf16, with and without compiled kernels.

Early in training the update is small relative to the layer's output, because B starts at zero. If the update were added
to an output already rounded to bf16, an update of a thousandth of it would lose half of its size.
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
from deltaw.kernels.quantize import quantize_rows
from deltaw.lora import LoRAConv1D, LoRALinear
from deltaw.lora.adapted import Activation
from deltaw.lora.math_dora import dora_linear
from deltaw.lora.stored import Scales, multiply_backward, product

ROWS = 400
IN = 128
OUT = 192
RANK = 8
BF16 = torch.bfloat16


def random(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


@torch.no_grad()
def check(operands: dict[str, Tensor], output: Tensor, base: Tensor, *, back: bool = False) -> None:
    """Check that ``output - base`` contains the entire update, up to chance.

    Args:
        operands: Operands of the layer.
        output: Output or, with ``back``, the gradient of the input.
        base: The same without the update.
        back: Check the gradient instead of the output.
    """
    operands = {name: tensor.double() for name, tensor in operands.items()}
    ahead = operands["x"] @ operands["lora_A"] @ operands["lora_B"]
    update = operands["grad"] @ operands["lora_B"].t() @ operands["lora_A"].t() if back else ahead
    share = float(((output.double() - base.double()) * update).sum() / update.square().sum())
    assert abs(share - 1) < 0.1


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def compute_backend(request):
    """Run with the process's default products, and with torch's."""
    if request.param == "compiled":
        if loader.library() is None:
            pytest.skip(loader.unavailable_reason() or "")
        yield
        return
    with loader.temporary_arithmetic(Arithmetic()):
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


@pytest.mark.parametrize("mode", ["plain", "dropout", "activated"])
@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_layer_keeps_small_update(operands, kind, mode):
    options = {"rank": RANK, "alpha": float(RANK), "dropout": 1e-9 if mode == "dropout" else 0.0}
    if kind == "linear":
        layer = LoRALinear.from_linear(nn.Linear(IN, OUT, bias=False, dtype=BF16), **options)
        layer.weight.data.copy_(operands["weight"])
    else:  # its bias starts at zero
        layer = LoRAConv1D.from_conv1d(Conv1D(OUT, IN).to(BF16), **options)
        layer.weight.data.copy_(operands["weight"].t())
    layer.lora_A.data.copy_(operands["lora_A"])
    layer.lora_B.data.copy_(operands["lora_B"])
    if mode == "activated":  # at all positions except the first
        layer.activation = Activation([1])
        layer.activation.active_mask = (torch.arange(ROWS) > 0)[None]
    x = operands["x"].requires_grad_(True)
    y = layer(x[None])[0]
    (dx,) = torch.autograd.grad(y, x, operands["grad"])
    check(operands, y, operands["x"].double() @ operands["weight"].double().t())
    if mode != "activated":  # autograd would round both parts of the gradient before adding them
        check(operands, dx, operands["grad"].double() @ operands["weight"].double(), back=True)


def test_dora_keeps_small_update(operands):
    x = operands["x"].requires_grad_(True)
    ones = torch.ones(OUT)
    y = dora_linear(x, operands["weight"], None, operands["lora_A"], operands["lora_B"], ones, ones, 1.0)
    (dx,) = torch.autograd.grad(y, x, operands["grad"])
    check(operands, y, x.double() @ operands["weight"].double().t())
    check(operands, dx, operands["grad"].double() @ operands["weight"].double(), back=True)


def test_int8_weights_keep_small_update(operands):
    int8, scale = quantize_rows(operands["weight"])
    adapted = product(int8, Scales(scale, None), True, None, operands["lora_A"], operands["lora_B"])
    exact = products.LinearProduct(int8, scale=scale.double())
    y, _ = products.linear(operands["x"], adapted)
    check(operands, y, products.linear_reference(operands["x"].double(), exact)[0])
    dx, _ = multiply_backward(operands["grad"], adapted)
    check(operands, dx, products.linear_backward_reference(operands["grad"].double(), exact)[0], back=True)


def test_block_quantized_weights_keep_small_update(operands):
    weight = quantize_nf4(operands["weight"])
    values = weight.dequantized(BF16, 0, OUT).double()
    adapted = products.LinearProduct.from_blocks(weight, None, operands["lora_A"], operands["lora_B"])
    y, _ = products.linear(operands["x"], adapted)
    check(operands, y, operands["x"].double() @ values.t())
    dx, _ = products.linear_backward(operands["grad"], adapted)
    check(operands, dx, operands["grad"].double() @ values, back=True)
