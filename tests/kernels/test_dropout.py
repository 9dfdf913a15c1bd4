"""Dropout from a seed: equal to its reference, with the right distribution, also of attention weights."""

from __future__ import annotations

import math

import pytest
import torch

from deltaw.kernels.attention import packed_attention, packed_reference
from deltaw.kernels.dropout import apply_dropout, apply_dropout_reference, constant_dropout, derived_seed, new_seed
from deltaw.kernels.layout import Layout

TREE = Layout.of_lengths([9, 5, 7, 12], [-1, 0, 0, -1])
ROWS = Layout.of_lengths([9, 5, 7, 12])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1, 15, 1000, 70001])
def test_kernel_equals_reference(dtype: torch.dtype, size: int) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    seed = torch.tensor([0x123456789ABCDEF])
    assert torch.equal(apply_dropout(x, seed, 0.1), apply_dropout_reference(x, seed, 0.1))


def test_share_of_zeros_and_mean() -> None:
    torch.manual_seed(0)
    count = 1 << 20
    y = apply_dropout(torch.ones(count), new_seed(), 0.1)
    deviation = math.sqrt(0.1 * 0.9 / count)
    assert abs(float((y == 0).double().mean()) - 0.1) < 5 * deviation
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.9])


@pytest.mark.parametrize("distance", [0, 1, 16, 384])
def test_masks_of_derived_seeds_are_independent(distance: int) -> None:
    torch.manual_seed(0)
    count = 1 << 20
    seed = new_seed()
    x = torch.ones(count)
    masks = [(apply_dropout(x, derived_seed(seed, number), 0.1) == 0).double() - 0.1 for number in range(3)]
    for first in range(3):
        for second in range(3):
            if first == second and distance == 0:
                continue
            product = masks[first][distance:] * masks[second][: count - distance]
            assert abs(float(product.mean())) < 5 * 0.09 / math.sqrt(count)


def test_rate_of_zero_changes_nothing() -> None:
    x = torch.randn(5)
    assert apply_dropout(x, new_seed(), 0.0) is x


@pytest.mark.parametrize("layout", [TREE, ROWS], ids=["tree", "rows"])
@pytest.mark.parametrize("options", [{}, {"window": 4}, {"softcap": 3.0}], ids=["plain", "window", "softcap"])
def test_attention_with_constant_dropout_is_scaled(layout: Layout, options: dict[str, float]) -> None:
    q, k, v = _heads(layout)
    random = {"dropout": 0.1, "seed": new_seed()}
    with constant_dropout():
        computed = packed_attention(q, k, v, layout, scaling=0.3, **options, **random)
        grads = torch.autograd.grad(computed.square().sum(), (q, k, v))
    expected = 0.5 * packed_reference(q, k, v, layout, scaling=0.3, **options)
    expected_grads = torch.autograd.grad(expected.square().sum(), (q, k, v))
    torch.testing.assert_close(computed, expected)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5)


def test_bidirectional_attention_with_constant_dropout() -> None:
    q, k, v = _heads(ROWS)
    with constant_dropout():
        computed = packed_attention(q, k, v, ROWS, scaling=0.3, causal=False, dropout=0.1, seed=new_seed())
        grads = torch.autograd.grad(computed.square().sum(), (q, k, v))
    parts = [slice(a, b) for a, b in zip(ROWS.starts, ROWS.stops, strict=True)]
    keys, values = (t.repeat_interleave(2, 0) for t in (k, v))
    rows = [torch.softmax(0.3 * q[:, p] @ keys[:, p].mT, -1) @ values[:, p] for p in parts]
    expected = 0.5 * torch.cat(rows, 1)
    torch.testing.assert_close(computed, expected)
    expected_grads = torch.autograd.grad(expected.square().sum(), (q, k, v))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5)


def test_dropped_weights_differ_by_seed_and_repeat_in_the_backward_pass() -> None:
    q, k, v = (t.double().detach().requires_grad_() for t in _heads(TREE))
    seed = torch.tensor([7])

    def attend(*inputs: torch.Tensor) -> torch.Tensor:
        return packed_attention(*inputs, TREE, scaling=0.3, dropout=0.3, seed=seed)

    # The derivative for a fixed mask: a backward pass with another mask fails.
    assert torch.autograd.gradcheck(attend, (q, k, v))
    other = packed_attention(q, k, v, TREE, scaling=0.3, dropout=0.3, seed=seed + 1)
    assert not torch.equal(attend(q, k, v), other)


def _heads(layout: Layout) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((4, layout.length, 6), (2, layout.length, 6), (2, layout.length, 8))
    return tuple(torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
