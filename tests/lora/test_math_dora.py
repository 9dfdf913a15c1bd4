"""DoRA's closed form against its reference implementation, and the norm against the dense one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaw.lora.math_dora import base_squares, dora_linear, dora_linear_reference, weight_norm


def _operands(shape: tuple[int, ...], out: int, rank: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def normal(*size: int, kind: torch.dtype) -> Tensor:
        return torch.randn(size, generator=draw, dtype=torch.float64).to(kind)

    factor = torch.float64 if dtype == torch.float64 else torch.float32
    made = {
        "x": normal(*shape, kind=dtype),
        "weight": normal(out, shape[-1], kind=dtype),
        "bias": normal(out, kind=dtype),
        "lora_A": normal(shape[-1], rank, kind=factor),
        "lora_B": normal(rank, out, kind=factor),
        "magnitude": normal(out, kind=factor),
        "norm": normal(out, kind=factor).abs() + 0.5,
    }
    for name in ("x", "bias", "lora_A", "lora_B", "magnitude"):
        made[name].requires_grad_(True)
    return made


def _gradients(y: Tensor, operands: dict[str, Tensor]) -> list[Tensor]:
    toward = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(torch.autograd.grad(y, [t for t in operands.values() if t.requires_grad], toward.to(y.dtype)))


@settings(max_examples=40, deadline=None)
@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    n_in=st.integers(1, 9),
    n_out=st.integers(1, 9),
    rank=st.integers(1, 5),
    in_out=st.booleans(),
    dropout=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 99),
)
def test_dora_equals_its_reference_for_any_shape(leading, n_in, n_out, rank, in_out, dropout, seed):
    operands = _operands((*leading, n_in), n_out, rank, torch.float64, seed)
    if in_out:
        operands["weight"] = operands["weight"].t().contiguous()
    torch.manual_seed(seed)
    y = dora_linear(*operands.values(), 0.7, dropout, weight_is_in_out=in_out)
    torch.manual_seed(seed)
    mask = torch.empty_like(operands["x"], dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None
    reference = dora_linear_reference(*operands.values(), 0.7, mask, 1 - dropout, in_out)
    assert y.shape == (*leading, n_out)
    torch.testing.assert_close(y, reference)
    for ours, theirs in zip(_gradients(y, operands), _gradients(reference, operands), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dora_equals_its_reference_in_every_type(dtype):
    operands = _operands((3, 5, 8), 6, 4, dtype)
    y, reference = dora_linear(*operands.values(), 0.5), dora_linear_reference(*operands.values(), 0.5)
    tolerance = {"atol": 0.25, "rtol": 0.05} if dtype != torch.float32 else {}
    torch.testing.assert_close(y, reference, **tolerance)
    for ours, theirs in zip(_gradients(y, operands), _gradients(reference, operands), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("in_out", [False, True])
def test_dora_has_right_first_and_second_derivatives(in_out, dropout):
    operands = _operands((2, 3, 4), 5, 2, torch.float64)
    weight, norm = operands.pop("weight"), operands.pop("norm")
    weight = weight.t().contiguous() if in_out else weight

    def call(x: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor) -> Tensor:
        torch.manual_seed(3)
        return dora_linear(x, weight, bias, lora_A, lora_B, magnitude, norm, 1.3, dropout, in_out)

    assert torch.autograd.gradcheck(call, tuple(operands.values()))
    assert torch.autograd.gradgradcheck(call, tuple(operands.values()))


@settings(max_examples=25, deadline=None)
@given(n_in=st.integers(1, 40), n_out=st.integers(1, 40), rank=st.integers(1, 8), seed=st.integers(0, 9))
def test_the_norm_needs_no_dense_update(n_in, n_out, rank, seed):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_out, n_in, generator=draw)
    lora_A, lora_B = torch.randn(n_in, rank, generator=draw), torch.randn(rank, n_out, generator=draw)
    for stored in (weight, weight.bfloat16()):
        dense = stored.double() + 0.3 * (lora_A.double() @ lora_B.double()).t()
        norm = weight_norm(stored, base_squares(stored, torch.float32), lora_A, lora_B, 0.3)
        torch.testing.assert_close(norm.double(), dense.norm(dim=1), rtol=1e-4, atol=2e-3)


def test_norms_are_taken_block_by_block(monkeypatch):
    weight = torch.randn(7, 5).bfloat16()
    lora_A, lora_B = torch.randn(5, 2), torch.randn(2, 7)
    whole = weight_norm(weight, base_squares(weight, torch.float32), lora_A, lora_B, 0.3)
    monkeypatch.setattr("deltaw.lora.math_dora.BLOCK", 10)
    parts = weight_norm(weight, base_squares(weight, torch.float32), lora_A, lora_B, 0.3)
    torch.testing.assert_close(parts, whole)
