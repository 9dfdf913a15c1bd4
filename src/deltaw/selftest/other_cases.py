"""Calls of the kernels between matrix products: norms, activations, attention, recurrences and decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deltaw.kernels import loader, rows
from deltaw.kernels.attention import packed_attention
from deltaw.kernels.block_linear import quantize_nf4
from deltaw.kernels.decode import Decoder, Pages
from deltaw.kernels.decode_reference import AttentionForm, DecoderBlock, DecoderLinear
from deltaw.kernels.dropout import apply_dropout
from deltaw.kernels.layout import Layout
from deltaw.kernels.paged_attention import PagedAttention, PagedRows, page_numbers
from deltaw.kernels.quantize import quantize_rows
from deltaw.kernels.recurrence import packed_recurrence
from deltaw.kernels.rows import HalfNorms, Norm
from deltaw.kernels.short_convolution import packed_convolution
from deltaw.selftest.kernel_call import Inputs, KernelCall

ROWS = 70
WIDTH = 200
# Segments of a prefix tree.
LENGTHS = (70, 1, 64, 130, 5)
PARENTS = (-1, 0, 0, -1, 3)
FP32 = (torch.float32,)


def other_cases() -> Iterator[KernelCall]:
    """Yield the calls."""
    for name, centered, offset in (("RMSNorm", False, 1.0), ("LayerNorm", True, 0.0)):
        yield KernelCall(name, partial(_norm, centered=centered, offset=offset))
    for kind in rows.ACTIVATIONS:
        yield KernelCall(f"activation {kind}", partial(_activation, kind=kind))
    yield KernelCall("rotary positions", _rotation)
    for cap in (0.0, 5.0):
        yield KernelCall(f"cross-entropy, soft cap {cap:g}", partial(_cross_entropy, softcap=cap))
    yield KernelCall("dropout", _dropout)
    yield KernelCall("sum", _sum)
    for window, softcap, heads in ((None, None, 2), (20, None, 4), (None, 5.0, 1)):
        name = f"attention, {heads} key heads, window {window}, soft cap {softcap}"
        compute = partial(_attention, key_heads=heads, window=window, softcap=softcap)
        yield KernelCall(name, compute, slack=4)
    for name, is_delta in (("delta rule", True), ("state-space scan", False)):
        yield KernelCall(name, partial(_recurrence, is_delta=is_delta), slack=8)
    yield KernelCall("short convolution", _convolution, slack=2)
    for kind in ("fp32", "bf16", "int8", "NF4"):
        # A value halfway between two steps of a rounded type may round either way in the input of a layer.
        slack = 4 if kind == "fp32" else 4e4
        yield KernelCall(f"decoding, {kind}", partial(_decoding, kind=kind), FP32, False, slack)
    yield KernelCall("attention over pages", _paged_attention, FP32, False, 4)


def _norm(given: Inputs, centered: bool, offset: float) -> Sequence[Tensor]:
    x = given.normal(ROWS, WIDTH)
    weight = given.normal(WIDTH, std=0.2)
    y, stats = rows.norm(x, weight, given.normal(WIDTH), offset=offset, eps=1e-5, centered=centered)
    grad, addend = given.normal(ROWS, WIDTH), given.normal(ROWS, WIDTH)
    dx = rows.norm_backward(grad, x, weight, stats, offset=offset, centered=centered, addend=addend)
    return y, stats, dx


def _activation(given: Inputs, kind: str) -> Sequence[Tensor]:
    gate, up, grad = (given.normal(ROWS, WIDTH, std=2) for _ in range(3))
    gated = rows.activation_backward(grad, gate, up, kind)
    plain = rows.activation_backward(grad, gate, None, kind)
    return rows.activation(gate, up, kind), rows.activation(gate, None, kind), *gated, *plain


def _rotation(given: Inputs) -> Sequence[Tensor]:
    x = given.normal(ROWS, 3, 40)
    angles = given.normal_fp32(ROWS, 16).repeat(1, 2)
    return [rows.rotate(x, angles.cos(), angles.sin(), backward=backward) for backward in (False, True)]


def _cross_entropy(given: Inputs, softcap: float) -> Sequence[Tensor]:
    logits = given.normal(ROWS, 1000, std=3)
    targets = given.integers(1000, ROWS)
    weights = given.uniform(ROWS)
    losses = rows.cross_entropy_(logits, targets, weights, scale=0.7, softcap=softcap, grad=True)
    return losses, logits


def _dropout(given: Inputs) -> Sequence[Tensor]:
    return (apply_dropout(given.normal(ROWS, WIDTH), torch.tensor([123456789012345]), 0.3),)


def _sum(given: Inputs) -> Sequence[Tensor]:
    a, b = given.normal(ROWS, WIDTH), given.normal(ROWS, WIDTH)
    if not loader.supports(a, b):
        return (a + b,)
    out = torch.empty_like(a)
    addresses = (a.data_ptr(), b.data_ptr(), out.data_ptr())
    loader.kernels().dw_add(loader.dtype_code(a.dtype), a.numel(), *addresses)
    return (out,)


def _with_gradients(out: Tensor, leaves: Sequence[Tensor], given: Inputs) -> Sequence[Tensor]:
    """Return a result and the gradients of its inputs."""
    grad = given.normal(*out.shape).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def _attention(given: Inputs, key_heads: int, window: int | None, softcap: float | None) -> Sequence[Tensor]:
    layout = Layout.of_lengths(LENGTHS, PARENTS)
    shapes = ((4, 32), (key_heads, 32), (key_heads, 48))
    query, key, value = (given.normal(heads, layout.length, size).requires_grad_() for heads, size in shapes)
    out = packed_attention(query, key, value, layout, window=window, softcap=softcap, scaling=0.2)
    return _with_gradients(out, (query, key, value), given)


def _recurrence(given: Inputs, is_delta: bool) -> Sequence[Tensor]:
    layout = Layout.of_lengths(LENGTHS, PARENTS)
    query = given.normal(layout.length, 2, 32).requires_grad_()
    key = given.normal(layout.length, 2, 32, std=0.2).requires_grad_()
    value = given.normal(layout.length, 4, 64).requires_grad_()
    decay = -given.uniform(layout.length, 4)
    rate = given.uniform(layout.length, 4) if is_delta else None
    out = packed_recurrence(query, key, value, decay, rate, layout, scaling=0.3, unit_vectors=is_delta)
    return _with_gradients(out, (query, key, value), given)


def _convolution(given: Inputs) -> Sequence[Tensor]:
    layout = Layout.of_lengths(LENGTHS, PARENTS)
    x, weight, bias = (given.normal(*shape).requires_grad_() for shape in ((layout.length, 48), (48, 4), (48,)))
    return _with_gradients(packed_convolution(x, weight, bias, layout, silu=True), (x, weight, bias), given)


def _decoding(given: Inputs, kind: str) -> Sequence[Tensor]:
    """Three steps of a decoder with two blocks: two prompts, and a token of each."""

    def layer(outputs: int, inputs: int) -> DecoderLinear:
        weight = given.normal_fp32(outputs, inputs, std=inputs**-0.5)
        if kind == "int8":
            rounded, scale = quantize_rows(weight)
            return DecoderLinear(rounded, scale=scale)
        if kind == "NF4":
            return DecoderLinear(quantize_nf4(weight))
        return DecoderLinear(weight.to(torch.bfloat16 if kind == "bf16" else torch.float32))

    def block() -> DecoderBlock:
        norms = [HalfNorms(Norm(given.uniform(64) + 0.5)) for _ in range(2)]
        layers: dict[str, Any] = {
            "query": layer(64, 64),
            "key": layer(32, 64),
            "value": layer(32, 64),
            "output": layer(64, 64),
        }
        layers |= {"gate": layer(128, 64), "up": layer(128, 64), "down": layer(64, 128)}
        sizes: dict[str, Any] = {"heads": 4, "key_heads": 2, "head_size": 16, "rotary_dims": 16, "scaling": 0.25}
        return DecoderBlock(**layers, **sizes, first=norms[0], second=norms[1])

    angles = torch.arange(64.0)[:, None] * torch.logspace(0, -3, 8)
    decoder = Decoder([block(), block()], Norm(given.uniform(64) + 0.5), layer(200, 64), [(angles.cos(), angles.sin())])
    factors = {(0, "query"): (given.normal_fp32(64, 5, std=0.1), given.normal_fp32(5, 64), 0.5)}
    adapter = decoder.pack_adapter(factors)
    pages = decoder.new_pages(6)
    table = torch.tensor([[4, 0, 2], [1, 5, 3]], dtype=torch.int32)
    results: list[Tensor] = []
    for positions, sequences in ((range(40), [0] * 40), (range(33), [1] * 33), ((40, 33), (0, 1))):
        indices = torch.tensor(list(sequences), dtype=torch.int32)
        hidden = given.normal_fp32(len(indices), 64)
        adapters = indices - 1  # the second sequence has the adapter
        arguments = (torch.tensor(list(positions), dtype=torch.int32), indices, table, adapters, [adapter])
        results += decoder.step(pages, hidden, *arguments)
    return results


def _paged_attention(given: Inputs) -> Sequence[Tensor]:
    form = AttentionForm(heads=4, key_heads=2, head_size=16, scaling=0.25)
    numbers = page_numbers(form, torch.float32)
    pages = Pages(2, numbers, torch.float32)
    indices = torch.arange(40, dtype=torch.int32)
    paged = PagedRows(pages, indices, torch.zeros_like(indices), torch.tensor([[1, 0]], dtype=torch.int32))
    query, key, value = (given.normal(40, heads, 16) for heads in (4, 2, 2))
    return (PagedAttention(form, 0, numbers, torch.float32)(query, key, value, paged),)
