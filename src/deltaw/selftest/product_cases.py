"""Calls of the matrix products and of quantization."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from deltaw.kernels.block_linear import FORMATS, BlockWeight, nf4_blocks, quantize_nf4
from deltaw.kernels.head_gradient import class_gradient_, head_gradient_, num_groups
from deltaw.kernels.linear import LinearProduct, factors_backward, linear, linear_backward
from deltaw.kernels.quantize import quantize_activations, quantize_rows, row_scales
from deltaw.selftest.kernel_call import Inputs, KernelCall

# Rows, inputs and outputs: less than a panel, one that no block size divides, wide, and enough rows that threads share
# rows instead of columns.
SIZES = ((3, 64, 40), (37, 300, 108), (5, 1536, 576), (1600, 192, 136))
RANK = 16
BF16 = (torch.bfloat16,)
# Offsets of the fp16 scales within a block.
_SCALES = {"Q4_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def product_cases() -> Iterator[KernelCall]:
    """Yield the calls."""
    for rows, inputs, outputs in SIZES:
        size = f"{rows} × {inputs} × {outputs}"
        for by_column in (True, False):
            order = "" if by_column else ", transposed"
            yield KernelCall(f"product {size}{order}", _plain(rows, inputs, outputs, by_column))
        yield KernelCall(f"product {size}, update", _adapted(rows, inputs, outputs), slack=2)
        for in_blocks in (False, True):
            scales = ", scales of blocks" if in_blocks else ""
            # An input halfway between two steps may round either way, which fp32 results show.
            for dtype, slack in ((torch.float32, 2e3), (torch.bfloat16, 1.0)):
                compute = _int8(rows, inputs, outputs, in_blocks)
                yield KernelCall(f"int8 product {size}{scales}", compute, (dtype,), is_exact=False, slack=slack)
            quantization = _quantization(rows, inputs, in_blocks)
            yield KernelCall(f"quantization {rows} × {inputs}{scales}", quantization, is_exact=False)
        yield KernelCall(f"int8 gradient {size}", _int8_gradient(rows, inputs, outputs), BF16, is_exact=False)
    for name in FORMATS:
        for rows in (3, 70):
            yield KernelCall(f"{name} product, {rows} rows", _blocks(name, rows))
        yield KernelCall(f"{name} decoded", _decoded(name))
    yield KernelCall("NF4 encoded", lambda inputs: nf4_blocks(inputs.normal(70, 192)), is_exact=False)
    yield KernelCall("gradient of classes in int8", _class_gradient, BF16, is_exact=False)
    yield KernelCall("gradient of a head", _head_gradient, BF16, slack=4)


Compute = Callable[[Inputs], Sequence[Tensor]]


def _plain(rows: int, inputs: int, outputs: int, by_column: bool) -> Compute:
    def compute(given: Inputs) -> Sequence[Tensor]:
        shape = (outputs, inputs) if by_column else (inputs, outputs)
        product = LinearProduct(given.normal(*shape, std=inputs**-0.5), by_column, bias=given.normal(outputs))
        y, _ = linear(given.normal(rows, inputs), product, given.normal(rows, outputs))
        dx, _ = linear_backward(given.normal(rows, outputs), product, given.normal(rows, inputs))
        return y, dx

    return compute


def _adapted(rows: int, inputs: int, outputs: int) -> Compute:
    def compute(given: Inputs) -> Sequence[Tensor]:
        A = given.normal_fp32(inputs, RANK, std=inputs**-0.5)
        B = given.normal_fp32(RANK, outputs, std=RANK**-0.5)
        weight = given.normal(outputs, inputs, std=inputs**-0.5)
        product = LinearProduct(weight, bias=given.normal(outputs), lora_A=A, lora_B=B, scaling=0.5)
        x = given.normal(rows, inputs)
        grad = given.normal(rows, outputs)
        y, h = linear(x, product)
        dx, narrow = linear_backward(grad, product)
        h = h.to(x.dtype)
        return y, h, dx, narrow, *factors_backward(x, h, grad, narrow, 0.5)

    return compute


def _int8(rows: int, inputs: int, outputs: int, in_blocks: bool) -> Compute:
    def compute(given: Inputs) -> Sequence[Tensor]:
        smooth = None if in_blocks else given.uniform(inputs) + 0.5
        weight = given.normal_fp32(outputs, inputs, std=inputs**-0.5)
        rounded, scale = quantize_rows(weight if smooth is None else weight / smooth)
        product = LinearProduct(rounded, scale=scale, smooth_scales=smooth, in_blocks=in_blocks)
        y, _ = linear(given.normal(rows, inputs), product)
        dx, _ = linear_backward(given.normal(rows, outputs), product)
        return y, dx

    return compute


def _int8_gradient(rows: int, inputs: int, outputs: int) -> Compute:
    def compute(given: Inputs) -> Sequence[Tensor]:
        product = LinearProduct(given.normal(outputs, inputs, std=inputs**-0.5))
        dx, _ = linear_backward(given.normal(rows, outputs), product, in_int8=True)
        return (dx,)

    return compute


def _quantization(rows: int, width: int, in_blocks: bool) -> Compute:
    def compute(given: Inputs) -> Sequence[Tensor]:
        return quantize_activations(given.normal(rows, width), given.uniform(width) + 0.5, in_blocks)

    return compute


def _blocks(name: str, rows: int) -> Compute:
    def compute(given: Inputs) -> Sequence[Tensor]:
        weight = _random_blocks(name, 72, given)
        x = given.normal(rows, weight.columns, std=weight.columns**-0.5)
        product = LinearProduct.from_blocks(weight)
        y, _ = linear(x, product)
        dx, _ = linear_backward(given.normal(rows, 72), product)
        return y, dx

    return compute


def _decoded(name: str) -> Compute:
    def compute(given: Inputs) -> Sequence[Tensor]:
        weight = _random_blocks(name, 9, given)
        return weight.dequantized(given.dtype), weight.rows_at(torch.tensor([8, 0, 3]), given.dtype)

    return compute


def _random_blocks(name: str, rows: int, given: Inputs) -> BlockWeight:
    """Return a weight (rows, 768) of random bytes with fp16 scales of usual sizes."""
    columns = 768
    block_format = FORMATS[name]
    if name == "NF4":
        return quantize_nf4(given.normal_fp32(rows, columns, std=0.1).float())
    blocks = rows * columns // block_format.block
    data = given.integers(256, blocks, block_format.bytes).to(torch.uint8)
    for offset in _SCALES.get(name, (0,)):
        data[:, offset : offset + 2] = given.normal_fp32(blocks, 1, std=0.02).half().view(torch.uint8)
    return BlockWeight(data.view(rows, -1), name, columns)


def _class_gradient(given: Inputs) -> Sequence[Tensor]:
    weight = given.normal(600, 96)
    targets = given.integers(600, 70)
    grad = given.normal(70, 600).softmax(-1)
    grad[torch.arange(70), targets] -= 1
    return (class_gradient_(grad, targets, weight, row_scales(weight)),)


def _head_gradient(given: Inputs) -> Sequence[Tensor]:
    rows, classes, width = 35, 900, 64
    hidden = given.normal(rows, width)
    weight = given.normal(classes, width, std=0.4)
    logits = (hidden @ weight.t()).contiguous()
    targets = given.integers(classes, rows)
    slopes = torch.empty_like(hidden)
    shares = torch.empty(rows, dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    unlikely = torch.empty(num_groups(rows), classes, dtype=hidden.dtype)
    parts = {"slopes": slopes, "shares": shares, "unlikely": unlikely}
    losses = head_gradient_(logits, targets, hidden, weight, None, scale=1.0, softcap=0.0, **parts)
    groups = torch.arange(rows) // -(-rows // num_groups(rows))
    complete = slopes.double() + shares.double()[:, None] * (unlikely.double() @ weight.double())[groups]
    return losses, complete.to(hidden.dtype)
